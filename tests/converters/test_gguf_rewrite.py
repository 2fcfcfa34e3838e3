"""Oracles: the gguf package's writer, reader and arithmetic, formulas in float64, and llama.cpp's logits."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_models import finish

import safelora_gguf
from converters import copying, gguf_rounding, libggml
from converters.changes import Change
from converters.errors import FormatError, UnsupportedError
from converters.ggml import encode
from converters.gguf_file import entry_bytes, text, texts, uint32
from converters.gguf_model import GgufModel, open_gguf_model
from converters.gguf_rewrite import rewrite_gguf, rewritten_size

TINY = Path(safelora_gguf.__file__).parent / "tiny_family" / "aligned.gguf"
ROOT = Path(__file__).parents[2]
LOGITS = ROOT / "tests" / "conformance" / "llama_child.py"

NUMPY_TYPES = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_1, Type.MXFP4]
LIBGGML_TYPES = [Type.Q2_K, Type.Q4_K, Type.Q6_K, Type.IQ4_XS]
_SHAPE = (3, 5, 256)  # a stack
needs_libggml = pytest.mark.skipif(libggml.find_library() is None, reason="needs llama-cpp-python")


def _values(seed: int, shape: Sequence[int] = _SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _model(path: Path, qtypes: Sequence[Type], *, alignment: int | None = None, **options: object) -> Path:
    """Tensors w0, w1, ... of these types with something small before each, and keys of every kind."""
    writer = gguf.GGUFWriter(path, "llama", **options)  # type: ignore[arg-type]
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_name("a model")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([b"a", "ä".encode(), b"\xff\xfe", b""])
    writer.add_token_types([1, 2, 3, 4])
    writer.add_token_scores([0.5, -1.0, 2.0, 3.0])
    writer.add_bool("x.flag", True)
    writer.add_float64("x.double", 1.25)
    writer.add_int64("x.long", -(1 << 40))
    writer.add_array("x.flags", [True, False])
    for place, qtype in enumerate(qtypes):
        writer.add_tensor(f"small{place}.weight", _values(100 + place, (7,)))
        stored = np.frombuffer(encode(torch.from_numpy(_values(place)), qtype), np.uint8)
        writer.add_tensor(f"w{place}.weight", stored.reshape(*_SHAPE[:-1], -1), raw_dtype=qtype)
    finish(writer)
    return path


def _doubled_and_moved(model: GgufModel, name: str) -> Change:
    """2 W + 0.125, exact in float32 for what float types hold."""
    return Change(name, lambda start, stop: model.rows(name, start, stop).float() * 2 + 0.125)


def _fields(path: Path, without: Sequence[str] = ()) -> dict[str, bytes]:
    fields = gguf.GGUFReader(path).fields.items()
    return {
        key: b"".join(part.tobytes() for part in field.parts)
        for key, field in fields
        if not key.startswith("GGUF.") and key not in without
    }


def _tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("in_kernel", [True, False])
@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_without_changes_the_file_is_the_writers_own(
    alignment: int | None, in_kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_kernel:
        monkeypatch.setattr(copying, "_copied_in_kernel", lambda *arguments: 0)
    source = _model(tmp_path / "model.gguf", [Type.F16, Type.Q8_0, Type.Q4_0], alignment=alignment)
    assert rewrite_gguf(open_gguf_model(source), tmp_path / "out.gguf", []) == {}
    assert (tmp_path / "out.gguf").read_bytes() == source.read_bytes()


def test_a_part_of_a_file_lands_where_it_should(tmp_path: Path) -> None:
    """Between what is written before and behind it, whatever is still in buffers."""
    data = bytes(range(256)) * 5000
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("w+b") as target:
        target.write(b"head")
        assert copying.copy_range(source, 1001, target, 4, 1_000_000) == 1_000_000
        target.write(b"tail")
        assert copying.copy_range(source, len(data) - 3, target, 1_000_008, 10) == 3
    assert (tmp_path / "target").read_bytes() == b"head" + data[1001:1_001_001] + b"tail" + data[-3:]


@pytest.mark.parametrize("version", [2, 3])
def test_keys_order_and_other_tensors_are_kept_byte_for_byte(version: int, tmp_path: Path) -> None:
    source = _model(tmp_path / "model.gguf", [*NUMPY_TYPES, Type.F32], alignment=64)
    data = bytearray(source.read_bytes())
    data[4] = version
    source.write_bytes(data)
    model = open_gguf_model(source)
    rewrite_gguf(model, tmp_path / "out.gguf", [_doubled_and_moved(model, "w1.weight")])
    before, after = _tensors(source), _tensors(tmp_path / "out.gguf")
    assert list(after) == list(before)
    assert _fields(tmp_path / "out.gguf") == _fields(source)
    assert list(_fields(tmp_path / "out.gguf")) == list(_fields(source))
    for name, tensor in after.items():
        assert tensor.tensor_type == before[name].tensor_type
        assert tensor.data_offset % 64 == 0
        assert (tensor.data.tobytes() == before[name].data.tobytes()) == (name != "w1.weight")


@pytest.mark.parametrize("elements", [256, 1000, 1 << 21])
@pytest.mark.parametrize("qtype", NUMPY_TYPES)
def test_a_changed_tensor_is_what_the_gguf_package_makes_of_its_values(
    qtype: Type, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_rounding, "_ELEMENTS", elements)  # a row, a few, all of them at once
    source = _model(tmp_path / "model.gguf", [Type.F32, qtype, Type.F16])
    model = open_gguf_model(source)
    errors = rewrite_gguf(model, tmp_path / "out.gguf", [_doubled_and_moved(model, "w1.weight")])
    stored = gguf.quants.dequantize(_tensors(source)["w1.weight"].data, qtype)
    wanted = (stored * np.float32(2) + np.float32(0.125)).astype(np.float32)
    made = _tensors(tmp_path / "out.gguf")["w1.weight"].data
    assert made.tobytes() == gguf.quants.quantize(wanted, qtype).tobytes()
    _assert_error(errors["w1.weight"], wanted, gguf.quants.dequantize(made, qtype))


def _assert_error(error: gguf_rounding.StoredError, wanted: np.ndarray, stored: np.ndarray) -> None:
    off = np.linalg.norm((stored.astype(np.float64) - wanted).ravel())
    assert error.absolute == pytest.approx(off, rel=1e-5)
    assert error.relative == pytest.approx(off / np.linalg.norm(wanted.astype(np.float64).ravel()), rel=1e-5)


@needs_libggml
@pytest.mark.parametrize("qtype", LIBGGML_TYPES)
def test_k_quants_lose_what_their_rounding_costs(qtype: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_rounding, "_ELEMENTS", 1000)
    source = _model(tmp_path / "model.gguf", [qtype])
    model, wanted = open_gguf_model(source), _values(9)
    flat = torch.from_numpy(wanted).reshape(-1, _SHAPE[-1])
    errors = rewrite_gguf(model, tmp_path / "out.gguf", [Change("w0.weight", lambda start, stop: flat[start:stop])])
    stored = gguf.quants.dequantize(_tensors(tmp_path / "out.gguf")["w0.weight"].data, qtype)
    _assert_error(errors["w0.weight"], wanted, stored)
    assert 0.01 < errors["w0.weight"].relative < 0.4


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e25])
def test_errors_are_right_at_any_scale(scale: float, tmp_path: Path) -> None:
    model, wanted = open_gguf_model(_model(tmp_path / "model.gguf", [Type.BF16])), _values(9) * np.float32(scale)
    flat = torch.from_numpy(wanted).reshape(-1, _SHAPE[-1])
    errors = rewrite_gguf(model, tmp_path / "out.gguf", [Change("w0.weight", lambda start, stop: flat[start:stop])])
    stored = gguf.quants.dequantize(_tensors(tmp_path / "out.gguf")["w0.weight"].data, Type.BF16)
    _assert_error(errors["w0.weight"], wanted, stored)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_q8_0_is_the_gguf_packages_at_any_scale() -> None:
    scales = np.array([1e-45, 1e-40, 1e-38, 1e-10, 1, 1e4, 1e8, 1e36], np.float32)[:, None]
    ties = np.tile(np.arange(-127, 129, dtype=np.float32) / 2, (8, 1))
    for values in (_values(3, (8, 256)) * scales, ties * scales, np.zeros((8, 256), np.float32)):
        assert encode(torch.from_numpy(values), Type.Q8_0) == gguf.quants.quantize(values, Type.Q8_0).tobytes()


def test_a_change_can_name_another_type(tmp_path: Path) -> None:
    source = _model(tmp_path / "model.gguf", [Type.Q4_0, Type.F16])
    model = open_gguf_model(source)
    changes = [Change("w0.weight", lambda start, stop: model.rows("w0.weight", start, stop), qtype=Type.F32)]
    assert rewrite_gguf(model, tmp_path / "out.gguf", changes)["w0.weight"].absolute == 0
    before, after = _tensors(source), _tensors(tmp_path / "out.gguf")
    assert after["w0.weight"].tensor_type == Type.F32
    assert (after["w0.weight"].data == gguf.quants.dequantize(before["w0.weight"].data, Type.Q4_0)).all()
    assert after["w1.weight"].data.tobytes() == before["w1.weight"].data.tobytes()
    assert rewritten_size(model, changes) == (tmp_path / "out.gguf").stat().st_size


def test_added_keys_follow_and_replace(tmp_path: Path) -> None:
    source = _model(tmp_path / "model.gguf", [Type.F16])
    model, added = open_gguf_model(source), [("x.new", uint32(7)), ("general.name", text("an ö")), ("x.b", text("c"))]
    rewrite_gguf(model, tmp_path / "out.gguf", [], added=added)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert [fields[key].contents() for key, _ in added] == [7, "an ö", "c"]
    replaced = ("general.name", "x.new", "x.b")
    assert _fields(tmp_path / "out.gguf", without=replaced) == _fields(source, without=replaced)
    assert list(_fields(tmp_path / "out.gguf")) == [*_fields(source), "x.new", "x.b"]
    assert rewritten_size(model, added=added) == (tmp_path / "out.gguf").stat().st_size
    again = open_gguf_model(tmp_path / "out.gguf")
    rewrite_gguf(again, tmp_path / "again.gguf", [], added=added)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_shards_become_one_file(tmp_path: Path) -> None:
    qtypes = [Type.F16, Type.Q8_0, Type.F32]
    whole = _model(tmp_path / "whole.gguf", qtypes)
    _model(tmp_path / "parts.gguf", qtypes, split_max_tensors=2)
    model = open_gguf_model(tmp_path / "parts-00001-of-00003.gguf")
    rewrite_gguf(model, tmp_path / "out.gguf", [])
    assert (tmp_path / "out.gguf").read_bytes() == whole.read_bytes()
    rewrite_gguf(model, tmp_path / "changed.gguf", [_doubled_and_moved(model, "w2.weight")])
    changed = _tensors(tmp_path / "changed.gguf")["w2.weight"].data
    assert (changed == _values(2) * np.float32(2) + np.float32(0.125)).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.int8])
def test_types_that_are_no_weights_are_refused_beforehand(dtype: type, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("w.weight", np.zeros((2, 8), dtype))
    finish(writer)
    model = open_gguf_model(tmp_path / "model.gguf")
    with pytest.raises(UnsupportedError, match=r"w\.weight.*can't be stored as [IF]\d"):
        rewrite_gguf(
            model, tmp_path / "out.gguf", [Change("w.weight", lambda start, stop: torch.zeros(stop - start, 8))]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("value", [1e6, np.inf, np.nan])
@pytest.mark.parametrize("qtype", [Type.F16, Type.Q8_0, Type.F32])
def test_values_that_a_type_can_not_hold_are_refused(value: float, qtype: Type, tmp_path: Path) -> None:
    model = open_gguf_model(_model(tmp_path / "model.gguf", [qtype]))
    change = Change("w0.weight", lambda start, stop: torch.full((stop - start, _SHAPE[-1]), value))
    if np.isfinite(value) and qtype is not Type.F16:
        rewrite_gguf(model, tmp_path / "out.gguf", [change])
        return
    with pytest.raises(UnsupportedError, match=rf"w0\.weight.*{qtype.name}"):
        rewrite_gguf(model, tmp_path / "out.gguf", [change])
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_big_endian_models_are_refused(tmp_path: Path) -> None:
    source = _model(tmp_path / "model.gguf", [Type.F32], endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedError, match="gguf-convert-endian"):
        rewrite_gguf(open_gguf_model(source), tmp_path / "out.gguf", [])


def test_a_source_that_shrinks_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    source = _model(tmp_path / "model.gguf", [Type.F16, Type.F16])
    model = open_gguf_model(source)

    def cut(start: int, stop: int) -> torch.Tensor:
        with source.open("r+b") as file:
            file.truncate(source.stat().st_size - 64)
        return torch.zeros(stop - start, _SHAPE[-1])

    with pytest.raises(FormatError, match="changed while it was read"):
        rewrite_gguf(model, tmp_path / "out.gguf", [Change("w0.weight", cut)])
    with pytest.raises(FormatError, match="changed while it was read"):
        rewrite_gguf(model, tmp_path / "out.gguf", [])
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


_CHILD = """
import os, resource, signal, sys
from pathlib import Path
import torch
from converters.errors import Error
from converters.gguf_model import open_gguf_model
from converters.changes import Change
from converters.gguf_rewrite import rewrite_gguf
what, source, target = sys.argv[1:]
def rows(start, stop):
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(stop - start, 256)
if what != "kill":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(what), int(what)))
try:
    rewrite_gguf(open_gguf_model(Path(source)), Path(target), [Change("w1.weight", rows)], force=True)
except Error as error:
    print(error.kind)
"""


def _child(what: str, source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _CHILD, what, source, target]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
@pytest.mark.parametrize("limit", ["100", "9000", "20000"])
def test_a_device_that_takes_no_more_is_a_write_error(limit: str, tmp_path: Path) -> None:
    source = _model(tmp_path / "model.gguf", [Type.F32, Type.F16])  # w0 is copied up to byte 16,000, w1 stored
    (tmp_path / "out.gguf").write_bytes(b"old")
    done = _child(limit, source, tmp_path / "out.gguf")
    assert (done.returncode, done.stdout) == (0, "write\n"), done.stderr
    assert (tmp_path / "out.gguf").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_after_sigkill_the_target_is_untouched_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    source, target = _model(tmp_path / "model.gguf", [Type.F32, Type.F16]), tmp_path / "out.gguf"
    target.write_bytes(b"old")
    assert _child("kill", source, target).returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 3
    rewrite_gguf(open_gguf_model(source), target, [], force=True)
    assert target.read_bytes() == source.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def _logits(model: Path) -> np.ndarray:
    command = [sys.executable, LOGITS, model, "-", "1,5,9,13"]
    made = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    return np.load(io.BytesIO(made))


@pytest.mark.llama
@needs_libggml
def test_llama_cpp_runs_the_result(tmp_path: Path) -> None:
    """Scores are q k: with q halved and k doubled, both exact, the logits stay; with q halved alone they don't."""
    model = open_gguf_model(TINY)

    def times(factor: float, part: str) -> list[Change]:
        names = [name for name in model.infos if part in name]
        return [
            Change(name, lambda start, stop, name=name: model.rows(name, start, stop).float() * factor)  # type: ignore[misc]
            for name in names
        ]

    both = [*times(0.5, "attn_q.weight"), *times(2, "attn_k.weight")]
    errors = rewrite_gguf(model, tmp_path / "both.gguf", both)
    rewrite_gguf(model, tmp_path / "half.gguf", times(0.5, "attn_q.weight"))
    expected = _logits(TINY)
    assert all(error.absolute < 1e-6 for error in errors.values())
    np.testing.assert_allclose(_logits(tmp_path / "both.gguf"), expected, atol=1e-4)
    assert np.abs(_logits(tmp_path / "half.gguf") - expected).max() > 0.01


def test_tensors_that_are_new_or_grow_stand_where_they_should(tmp_path: Path) -> None:
    source = _model(tmp_path / "model.gguf", [Type.Q8_0, Type.F16])
    model, bias = open_gguf_model(source), torch.from_numpy(_values(7, (256,)))
    grown, odd = torch.from_numpy(_values(8, (20, 256))), torch.from_numpy(_values(9, (2, 33)))
    changes = [
        Change("w0.weight", lambda start, stop: grown[start:stop], shape=(20, 256)),
        Change("w0.bias", lambda start, stop: bias[None][start:stop], shape=(256,), after="w0.weight"),
        Change("w0.more", lambda start, stop: grown[start:stop], shape=(20, 256), after="w0.weight"),
        Change("w0.odd", lambda start, stop: odd[start:stop], shape=(2, 33), after="w0.more"),
    ]
    rewrite_gguf(model, tmp_path / "out.gguf", changes)
    before, after = _tensors(source), _tensors(tmp_path / "out.gguf")
    assert list(after) == ["small0.weight", "w0.weight", "w0.bias", "w0.more", "w0.odd", "small1.weight", "w1.weight"]
    assert after["w0.weight"].data.tobytes() == gguf.quants.quantize(grown.numpy(), Type.Q8_0).tobytes()
    assert after["w0.more"].data.tobytes() == after["w0.weight"].data.tobytes()
    assert list(after["w0.weight"].shape) == [256, 20]
    assert (after["w0.bias"].data == bias.numpy()).all()
    assert after["w0.bias"].tensor_type == Type.F32
    assert after["w0.odd"].data.tobytes() == odd.numpy().astype(np.float16).tobytes()
    for name in ("small0.weight", "small1.weight", "w1.weight"):
        assert after[name].data.tobytes() == before[name].data.tobytes()
    assert rewritten_size(model, changes) == (tmp_path / "out.gguf").stat().st_size


def test_keys_can_be_left_out_and_given_as_they_are_stored(tmp_path: Path) -> None:
    source = _model(tmp_path / "model.gguf", [Type.F16])
    tokens = entry_bytes("tokenizer.ggml.tokens", texts(["x", "y"]))
    rewrite_gguf(
        open_gguf_model(source), tmp_path / "out.gguf", [], added=[("tokenizer.ggml.tokens", tokens)],
        dropped=["tokenizer.ggml.scores", "x.flags", "no.such"],
    )  # fmt: skip
    gone = ("tokenizer.ggml.scores", "x.flags", "tokenizer.ggml.tokens")
    assert _fields(tmp_path / "out.gguf", without=gone) == _fields(source, without=gone)
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents() == ["x", "y"]
    assert "x.flags" not in fields


def _imatrix(path: Path, importance: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    writer.add_tensor("w0.weight.in_sum2", np.ascontiguousarray(importance * 3))
    writer.add_tensor("w0.weight.counts", np.full((len(importance), 1), 3, np.float32))
    finish(writer)
    return path


@needs_libggml
@pytest.mark.parametrize("qtype", [Type.IQ2_XXS, Type.IQ2_XS, Type.IQ1_S])
def test_types_made_for_an_importance_matrix_do_better_with_one_and_do_without(qtype: Type, tmp_path: Path) -> None:
    """Oracle: the error weighted by the importance, of values that the gguf package reads."""
    blocks = np.zeros((*_SHAPE[:-1], gguf.GGML_QUANT_SIZES[qtype][1]), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("w0.weight", blocks, raw_dtype=qtype)
    finish(writer)
    model, wanted = open_gguf_model(tmp_path / "model.gguf"), _values(3)
    importance = np.exp(2 * _values(4, (_SHAPE[0], _SHAPE[2])))
    flat = torch.from_numpy(wanted).reshape(-1, _SHAPE[-1])
    change, weighted = Change("w0.weight", lambda start, stop: flat[start:stop]), []
    for imatrix in (None, _imatrix(tmp_path / "imatrix.gguf", importance)):
        errors = rewrite_gguf(model, tmp_path / "out.gguf", [change], imatrix=imatrix, force=True)
        stored = gguf.quants.dequantize(_tensors(tmp_path / "out.gguf")["w0.weight"].data, qtype).reshape(_SHAPE)
        _assert_error(errors["w0.weight"], wanted, stored)
        assert errors["w0.weight"].flat == (imatrix is None)
        weighted.append(float((importance[:, None] * np.square(stored.astype(np.float64) - wanted)).sum()))
    assert weighted[1] < 0.9 * weighted[0]


def test_types_that_only_libggml_writes_are_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("w.weight", np.zeros((2, gguf.GGML_QUANT_SIZES[Type.Q4_K][1]), np.uint8), raw_dtype=Type.Q4_K)
    finish(writer)
    model = open_gguf_model(tmp_path / "model.gguf")
    monkeypatch.setattr(libggml, "library", lambda: None)
    change = Change("w.weight", lambda start, stop: pytest.fail("was asked for rows"))
    for attempt in (
        lambda: rewrite_gguf(model, tmp_path / "out.gguf", [change]),
        lambda: rewritten_size(model, [change]),
    ):
        with pytest.raises(UnsupportedError, match=r"w\.weight.*Q4_K.*install llama-cpp-python.*--outtype"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]

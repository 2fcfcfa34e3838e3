"""Oracles: the gguf package's reader and arithmetic, libggml's quantizer called directly, and the directory listing."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from converters import fingerprint, gguf_rounding, libggml
from converters.ahead import ahead
from converters.errors import FileMissingError, FormatError, MismatchError, OutputPathError, UnsupportedError
from converters.gguf_file import entry_bytes, text, uint32
from converters.gguf_layout import Entry
from converters.gguf_rounding import column_importance
from converters.gguf_stream import ModelTensor, Rounded, Stored, gguf_model_size, write_gguf_model
from converters.gguf_types import TENSOR_TYPES

ENTRIES: list[Entry] = [(key, entry_bytes(key, value)) for key, value in (
    ("general.architecture", text("llama")), ("x.number", uint32(7)))]  # fmt: skip
FLAT = [Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS]
needs_libggml = pytest.mark.skipif(libggml.find_library() is None, reason="needs llama-cpp-python")


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(
    name: str, tensor: torch.Tensor, qtype: int, importance: Callable[[int], torch.Tensor | None] | None = None
) -> ModelTensor:
    flat = tensor.reshape(-1, tensor.shape[-1])
    data = Rounded(lambda start, stop: flat[start:stop], importance)
    return ModelTensor(name, tuple(tensor.shape), qtype, data, Path("origin"))


def read(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_copied_pieces_and_rounded_rows_stand_where_the_reader_expects_them(tmp_path: Path) -> None:
    experts, weight = values(1, 3, 5, 7), values(2, 4, 33)
    (tmp_path / "a").write_bytes(b"....." + experts[:2].numpy().tobytes())
    (tmp_path / "b").write_bytes(experts[2].numpy().tobytes() + b"behind")
    pieces = ((tmp_path / "a", 5, 2 * 5 * 7 * 4), (tmp_path / "b", 0, 5 * 7 * 4))
    tensors = [
        ModelTensor("stack", (3, 5, 7), Type.F32, Stored(pieces), tmp_path / "a"),
        rounded("half", weight, Type.F16),
        ModelTensor("none", (0, 7), Type.F32, Stored(()), tmp_path / "a"),
        rounded("vector", values(3, 9), Type.F32),
    ]
    told: list[tuple[int, int, str]] = []
    errors = write_gguf_model(
        tmp_path / "out.gguf", ENTRIES, tensors, force=False, progress=lambda *step: told.append(step)
    )
    made = read(tmp_path / "out.gguf")
    assert list(made) == ["stack", "half", "none", "vector"]
    assert made["stack"].data.tobytes() == experts.numpy().tobytes()
    assert made["half"].data.tobytes() == weight.numpy().astype(np.float16).tobytes()
    assert made["vector"].data.tobytes() == values(3, 9).numpy().tobytes()
    assert list(errors) == ["half", "vector"]
    assert [field for field in gguf.GGUFReader(tmp_path / "out.gguf").fields if "." in field and field[0] != "G"] == [
        "general.architecture",
        "x.number",
    ]
    size = (tmp_path / "out.gguf").stat().st_size
    assert size == gguf_model_size(ENTRIES, tensors)
    assert [(total, name) for _, total, name in told] == [(size, name) for name in ("stack", "half", "vector")]
    assert all(done == made[name].data_offset for done, _, name in told)


@pytest.mark.parametrize("elements", [40, 1 << 21])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("qtype", [Type.BF16, Type.F16, Type.F32, Type.Q8_0])
def test_rows_of_any_float_type_are_stored_as_the_gguf_package_stores_them(
    qtype: Type, dtype: torch.dtype, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_rounding, "_ELEMENTS", elements)
    weight = values(4, 5, 64).to(dtype)
    errors = write_gguf_model(tmp_path / "out.gguf", ENTRIES, [rounded("w", weight, qtype)], force=False)
    wanted = weight.float().numpy()
    made = read(tmp_path / "out.gguf")["w"].data
    assert made.tobytes() == gguf.quants.quantize(wanted, qtype).tobytes()
    off = np.linalg.norm(gguf.quants.dequantize(made, qtype).astype(np.float64) - wanted)
    assert errors["w"].absolute == pytest.approx(off, rel=1e-5)


def test_a_types_own_bits_pass_whatever_they_mean(tmp_path: Path) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).reshape(256, 256)  # also NaN
    for qtype, dtype in ((Type.BF16, torch.bfloat16), (Type.F16, torch.float16)):
        tensor = rounded("w", bits.view(dtype), qtype)
        assert write_gguf_model(tmp_path / "out.gguf", ENTRIES, [tensor], force=True)["w"].absolute == 0
        assert read(tmp_path / "out.gguf")["w"].data.tobytes() == bits.numpy().tobytes()


@pytest.mark.parametrize(("value", "told"), [(1e6, "values up to 9.99e.05, too large for F16"), (float("nan"), "NaN")])
def test_a_source_that_its_new_type_can_not_hold_is_refused(value: float, told: str, tmp_path: Path) -> None:
    weight = values(5, 300, 64).to(torch.bfloat16)
    weight[290, 3] = value
    with pytest.raises(UnsupportedError, match=rf"origin: w: .*{told}"):
        write_gguf_model(tmp_path / "out.gguf", ENTRIES, [rounded("w", weight, Type.F16)], force=False)
    assert not list(tmp_path.iterdir())


@needs_libggml
@pytest.mark.parametrize("number", TENSOR_TYPES)
def test_every_type_that_ggml_quantizes_is_stored(number: int, tmp_path: Path) -> None:
    """Their values as the gguf package reads them are close, and as far off as is said."""
    library = libggml.library()
    assert library is not None
    if not library.quantizes(number) or number not in gguf.quants._type_traits:
        pytest.skip("is not for weights, or read by ggml alone")
    weight = values(6, 2, 8, 512) * 0.02
    errors = write_gguf_model(tmp_path / "out.gguf", ENTRIES, [rounded("w", weight, number)], force=False)
    stored = gguf.quants.dequantize(read(tmp_path / "out.gguf")["w"].data, Type(number)).astype(np.float64)
    off = np.linalg.norm(stored - weight.numpy())
    assert errors["w"].absolute == pytest.approx(off, rel=1e-5)
    assert errors["w"].relative < (0.85 if "TQ" in TENSOR_TYPES[number].name else 0.6)
    assert errors["w"].flat == (number in FLAT)


@needs_libggml
@pytest.mark.parametrize("qtype", [Type.IQ2_XS, Type.Q4_K])
def test_each_matrix_of_a_stack_has_an_importance_of_its_own(
    qtype: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_rounding, "_ELEMENTS", 3 * 512)  # across the borders of the matrices
    library, weight = libggml.library(), values(7, 3, 4, 512)
    assert library is not None
    weights = {"w": values(8, 3 * 512).square().numpy()}
    importance = column_importance(weights, "w", (3, 4, 512), Path("imatrix"))
    errors = write_gguf_model(tmp_path / "out.gguf", ENTRIES, [rounded("w", weight, qtype, importance)], force=False)
    made = read(tmp_path / "out.gguf")["w"].data.reshape(3, -1)
    for number in range(3):
        matrix, blocks = weight[number].contiguous(), np.zeros_like(made[number])
        columns = np.ascontiguousarray(weights["w"].reshape(3, 512)[number])
        library.quantize(qtype, matrix.data_ptr(), blocks.ctypes.data, start=0, rows=4, columns=512,
                         importance=columns.ctypes.data)  # fmt: skip
        assert made[number].tobytes() == blocks.tobytes()
    assert not errors["w"].flat


def test_an_importance_matrix_of_another_model_is_refused() -> None:
    ones = np.ones(512, np.float32)
    with pytest.raises(MismatchError, match=r"imatrix: w: has 512 columns .* 3 x 512"):
        column_importance({"w": ones}, "w", (3, 4, 512), Path("imatrix"))
    for bad in (-ones, ones * np.float32(1e30)):
        with pytest.raises(FormatError, match="squares of activations"):
            column_importance({"w": bad}, "w", (4, 512), Path("imatrix"))
    assert column_importance({"w": ones}, "v", (4, 512), Path("imatrix")) is None
    assert column_importance({"token_embd.weight": ones[:1]}, "token_embd.weight", (4, 512), Path("imatrix")) is None


@needs_libggml
@pytest.mark.parametrize("qtype", [Type.IQ2_XS, Type.IQ3_XXS])
def test_values_on_which_libggml_would_end_the_process_are_refused(qtype: Type, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"too large for {qtype.name}"):
        tensor = rounded("w", values(9, 2, 256) * 1e30, qtype)
        write_gguf_model(tmp_path / "out.gguf", ENTRIES, [tensor], force=False)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_after_an_error_in_either_thread_nothing_stays(error: type[BaseException], tmp_path: Path) -> None:
    tensors = [rounded(f"w{number}", values(number, 8, 64), Type.F16) for number in range(20)]

    def failing(*_: object) -> torch.Tensor:
        raise error

    late = ModelTensor("late", (8, 64), Type.F16, Rounded(failing), Path("origin"))
    with pytest.raises(error):
        write_gguf_model(tmp_path / "out.gguf", ENTRIES, [*tensors, late], force=False)
    with pytest.raises(error):
        write_gguf_model(tmp_path / "out.gguf", ENTRIES, tensors, force=False, progress=failing)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    assert not list(tmp_path.iterdir())


def test_pieces_come_in_order_and_no_more_are_made_than_may_wait() -> None:
    made: list[int] = []

    def pieces() -> object:
        for number in range(50):
            made.append(number)
            yield number

    seen = []
    for number in ahead(pieces(), 3):  # type: ignore[var-annotated, arg-type]
        assert len(made) <= number + 4
        seen.append(number)
    assert seen == made == list(range(50))


def test_rows_are_computed_in_the_callers_mode(tmp_path: Path) -> None:
    """What is made in torch's inference mode may be changed in place there alone."""
    with torch.inference_mode():
        weight = values(1, 4, 64)
        data = Rounded(lambda start, stop: weight[start:stop].add_(1))
        write_gguf_model(
            tmp_path / "out.gguf", ENTRIES, [ModelTensor("w", (4, 64), Type.F32, data, Path("o"))], force=False
        )
    assert np.allclose(read(tmp_path / "out.gguf")["w"].data, values(1, 4, 64).numpy() + 1)


def test_sources_that_are_gone_shorter_or_the_target_itself(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(100))
    for name, error in (("short", FormatError), ("gone", FileMissingError), ("out.gguf", OutputPathError)):
        tensor = ModelTensor("w", (32,), Type.F32, Stored(((tmp_path / name, 0, 128),)), tmp_path / name)
        with pytest.raises(error):
            write_gguf_model(tmp_path / "out.gguf", ENTRIES, [tensor], force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["short"]


@pytest.mark.parametrize("split", [None, 24 << 20])
def test_the_hash_is_known_when_a_large_file_is_written(
    split: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, copied = values(3, 3000, 1024), values(4, 5 << 20).numpy().tobytes()
    (tmp_path / "source").write_bytes(b"..." + copied)
    stored = Stored(((tmp_path / "source", 3, len(copied)),))
    tensors = [
        rounded("half", weight, Type.F16),
        ModelTensor("copied", (5 << 20,), Type.F32, stored, tmp_path / "source"),
        rounded("vector", values(5, 9), Type.F32),
        rounded("whole", values(6, 5000, 1024), Type.F32),
    ]
    write_gguf_model(tmp_path / "out.gguf", ENTRIES, tensors, force=False, split_max_size=split)
    large = [path for path in tmp_path.glob("out*.gguf") if path.stat().st_size > 16 << 20]
    assert len(large) == (1 if split is None else 2)
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in large]
    monkeypatch.setattr(hashlib, "file_digest", _read_again)
    assert [fingerprint.sha256_file(path) for path in large] == expected


def _read_again(*_: object) -> None:
    raise AssertionError("the file was read again")

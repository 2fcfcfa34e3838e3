"""Oracles: the gguf package's reader and its Q8_0, llama.h's constants, and llama.cpp, which runs what came out.

What the quantizer says of tensors that it stores in another type is its own log's word for it.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_models import finish

import safelora_gguf
from converters import free_space, libggml
from converters.errors import (
    FileMissingError,
    FormatError,
    LlamaError,
    MissingLlamaError,
    UsageError,
    WriteError,
)
from converters.free_space import free_space_for
from converters.gguf_shards import read_gguf_headers
from converters.imatrix import read_imatrix
from converters.quantization import FILE_TYPES, file_type, quantized_size
from converters.quantizer import Quantized, quantize_gguf

pytest.importorskip("llama_cpp")

TINY = Path(safelora_gguf.__file__).parent / "tiny_family" / "aligned.gguf"
LOGITS = Path(__file__).parents[1] / "conformance" / "llama_child.py"
ROOT = Path(__file__).parents[2]


def _quantized(source: Path, target: Path, name: str, **options: object) -> Quantized:
    return quantize_gguf(source, target, name, threads=1, **options)  # type: ignore[arg-type]


def _small_model(path: Path, columns: int, alignment: int = 32) -> Path:
    """As much of a llama as the quantizer looks at, with rows that k-quants can't hold."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_context_length(64)
    writer.add_embedding_length(columns)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    source = np.random.default_rng(0)
    shapes = {"token_embd": (64, columns), "output": (64, columns), "blk.0.attn_v": (columns, columns),
              "blk.0.attn_q": (columns, columns), "blk.0.ffn_down": (columns, 256),
              "blk.0.attn_norm": (columns,), "blk.0.one_row": (1, columns)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", source.standard_normal(shape, np.float32))
    finish(writer)
    return path


def _imatrix(path: Path, model: Path, counts: float = 3) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    source = np.random.default_rng(1)
    for tensor in gguf.GGUFReader(model).tensors:
        if len(tensor.shape) > 1:
            sums = source.random((1, int(tensor.shape[0])), np.float32)
            writer.add_tensor(f"{tensor.name}.in_sum2", sums + 1)
            writer.add_tensor(f"{tensor.name}.counts", np.full((1, 1), counts, np.float32))
    finish(writer)
    return path


def _logits(model: Path) -> np.ndarray:
    command = [sys.executable, LOGITS, model, "-", "1,5,9,13"]
    made = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    return np.load(io.BytesIO(made))


@pytest.mark.llama
def test_every_name_has_llama_cpps_number() -> None:
    import llama_cpp.llama_cpp as lib

    for name, kind in FILE_TYPES.items():
        prefix = "ALL" if name == "F32" else "MOSTLY"
        assert kind.number == getattr(lib, f"LLAMA_FTYPE_{prefix}_{name}"), name
    assert file_type("q4_k") == file_type("Q4_K_M")


@pytest.mark.llama
def test_q8_0_holds_the_blocks_that_the_gguf_package_makes(tmp_path: Path) -> None:
    result = _quantized(TINY, tmp_path / "out.gguf", "q8_0")
    made = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    for tensor in gguf.GGUFReader(TINY).tensors:
        stored = made[tensor.name].data
        if len(tensor.shape) > 1:
            expected = gguf.quants.quantize(tensor.data.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
            assert made[tensor.name].tensor_type == gguf.GGMLQuantizationType.Q8_0
        else:
            expected = tensor.data
        assert stored.tobytes() == expected.tobytes(), tensor.name
    assert result.nbytes == (tmp_path / "out.gguf").stat().st_size
    assert result.types == {"Q8_0": 23, "F32": 7}
    before, after = (gguf.GGUFReader(path).fields for path in (TINY, tmp_path / "out.gguf"))
    assert {key for key in before if before[key].contents() != after[key].contents()} <= {"general.file_type"}
    assert result.fallbacks == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf"]


@pytest.mark.llama
def test_llama_cpp_runs_a_mixture(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    result = _quantized(TINY, tmp_path / "out.gguf", "Q4_K_M", progress=lambda *step: told.append(step))
    exact, rounded = _logits(TINY), _logits(tmp_path / "out.gguf")
    assert rounded.shape == exact.shape
    assert 0 < np.abs(rounded - exact).max() < 0.5 * np.abs(exact).max()
    assert {"Q4_K", "Q6_K"} < set(result.types)
    assert {name for *_, name in told} == {tensor.name for tensor in gguf.GGUFReader(TINY).tensors}


@pytest.mark.llama
@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "Q4_K_M", "Q3_K_L", "IQ4_XS", "Q4_0", "Q2_K", "TQ1_0", "F16"])
@pytest.mark.parametrize("columns", [96, 256])
def test_the_announced_size_is_enough_and_no_more_than_twice_as_much(name: str, columns: int, tmp_path: Path) -> None:
    model = _small_model(tmp_path / "model.gguf", columns)
    made = _quantized(model, tmp_path / "out.gguf", name).nbytes
    announced = quantized_size(read_gguf_headers(model), file_type(name))
    assert made <= announced <= 2 * made


@pytest.mark.llama
@pytest.mark.parametrize(
    ("name", "columns"), [("Q4_K_S", 96), ("Q6_K", 96), ("IQ4_XS", 96), ("Q4_0", 96), ("Q8_0", 80), ("Q4_K_S", 256)]
)
def test_types_that_rows_did_not_allow_are_told(name: str, columns: int, tmp_path: Path) -> None:
    model = _small_model(tmp_path / "model.gguf", columns)
    request = {"source": str(model), "target": str(tmp_path / "log.gguf"), "number": file_type(name).number,
               "threads": 1, "requantize": False, "realign": False, "imatrix": None}  # fmt: skip
    command = [sys.executable, "-m", "converters.quantizer_child"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT) as child:
        assert child.stdin is not None and child.stderr is not None
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        log = child.stderr.read().decode()
    warned = {(found[0], found[1].upper()) for found in re.findall(r"warning: (\S+) .*falling back to +(\S+)", log)}
    told = {(fallback.name, fallback.dtype) for fallback in _quantized(model, tmp_path / "out.gguf", name).fallbacks}
    silent = {("output.weight", "Q8_0")} if columns == 96 else set()  # of this one the log says nothing
    assert told == warned | silent
    assert bool(told) == (columns != 256)


@pytest.mark.llama
@pytest.mark.parametrize("alignment", [8, 64, 1024])
def test_a_source_of_any_alignment_gives_a_sound_file(alignment: int, tmp_path: Path) -> None:
    """Left alone, the quantizer announces the source's alignment and pads to 32 bytes."""
    model = _small_model(tmp_path / "model.gguf", 96, alignment)
    _quantized(model, tmp_path / "out.gguf", "Q8_0")
    before, after = (
        {t.name: t for t in gguf.GGUFReader(tmp_path / name).tensors} for name in ("model.gguf", "out.gguf")
    )
    vectors = {"blk.0.attn_norm.weight", "blk.0.one_row.weight"}
    assert all(after[name].data.tobytes() == before[name].data.tobytes() for name in vectors)
    for name in before.keys() - vectors:
        expected = gguf.quants.quantize(before[name].data, gguf.GGMLQuantizationType.Q8_0)
        assert after[name].data.tobytes() == expected.tobytes(), name


@pytest.mark.llama
def test_a_refusal_has_llama_cpps_reason_and_leaves_nothing(tmp_path: Path) -> None:
    _quantized(TINY, tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(LlamaError, match="requantizing from type q8_0 is disabled"):
        _quantized(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q8.gguf"]
    assert "Q4_K" in _quantized(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M", allow_requantize=True).types


@pytest.mark.llama
def test_the_smallest_types_take_an_importance_matrix(tmp_path: Path) -> None:
    with pytest.raises(LlamaError, match="requires an importance matrix"):
        _quantized(TINY, tmp_path / "out.gguf", "IQ2_XXS")
    imatrix = _imatrix(tmp_path / "imatrix.gguf", TINY)
    assert "IQ2_XXS" in _quantized(TINY, tmp_path / "out.gguf", "IQ2_XXS", imatrix=imatrix).types


def test_the_importance_of_a_column_is_its_mean_square_or_one(tmp_path: Path) -> None:
    seen, unseen = _imatrix(tmp_path / "seen", TINY, 4), _imatrix(tmp_path / "unseen", TINY, 0)
    sums = {tensor.name: tensor.data for tensor in gguf.GGUFReader(seen).tensors}
    weights = read_imatrix(seen)
    assert weights.keys() == {name.removesuffix(".counts") for name in sums if name.endswith(".counts")}
    for name, values in weights.items():
        np.testing.assert_array_equal(values, sums[f"{name}.in_sum2"].reshape(-1) / 4)
    assert all((values == 1).all() for values in read_imatrix(unseen).values())


def test_a_file_that_is_no_importance_matrix_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no importance matrix"):
        _quantized(TINY, tmp_path / "out.gguf", "IQ2_XXS", imatrix=TINY)
    with pytest.raises(FileMissingError):
        _quantized(TINY, tmp_path / "out.gguf", "IQ2_XXS", imatrix=tmp_path / "none")
    infinite = tmp_path / "infinite.gguf"
    writer = gguf.GGUFWriter(infinite, "llama")
    writer.add_tensor("a.in_sum2", np.full((1, 32), np.inf, np.float32))
    writer.add_tensor("a.counts", np.ones((1, 1), np.float32))
    finish(writer)
    with pytest.raises(FormatError, match="not finite"):
        read_imatrix(infinite)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Q4_K_M.*IQ4_XS"):
        _quantized(TINY, tmp_path / "out.gguf", "Q4_K_XL")


_FAKES = {
    "raise RuntimeError('libllama.so: no such file')": (MissingLlamaError, "llama-cpp-python is not installed"),
    "import os; os.write(2, b'/a/b/ggml.c:7: GGML_ASSERT(x) failed\\n'); os.abort()": (
        LlamaError, r"crashed while quantizing \(SIGABRT\); its last words: ggml.c:7: GGML_ASSERT\(x\) failed"),
    "import time; time.sleep(60)": (LlamaError, "llama.cpp hung: quantizing took more than 1 s"),
}  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("code", _FAKES)
def test_a_child_that_dies_or_hangs_leaves_nothing(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "path" / "llama_cpp"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(fake.parent))
    error, message = _FAKES[code]
    timeout = 1 if "sleep" in code else 60
    with pytest.raises(error, match=message):
        _quantized(TINY, tmp_path / "new" / "out.gguf", "Q8_0", timeout=timeout)
    assert [path.name for path in tmp_path.iterdir()] == ["path"]


def test_without_llama_cpp_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libggml, "find_library", lambda: None)
    with pytest.raises(MissingLlamaError, match=r"safelora-gguf\[llama\]"):
        _quantized(TINY, tmp_path / "out.gguf", "Q8_0")
    assert list(tmp_path.iterdir()) == []


_LIMITED = """
import resource, sys
from pathlib import Path
from converters.errors import Error
from converters.quantizer import quantize_gguf
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    quantize_gguf(Path(sys.argv[1]), Path(sys.argv[2]), "Q8_0", threads=1)
except Error as error:
    print(error.kind)
"""


@pytest.mark.llama
@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_device_that_takes_no_more_is_a_write_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LIMITED, TINY, tmp_path / "out.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    assert done.stdout == "write\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_room_is_found_out_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_space_for(tmp_path / "new" / "out", 1) >= 1
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(free_space.shutil, "disk_usage", lambda place: usage(0, 0, 1_000_000))
    with pytest.raises(WriteError, match=r"takes 2,500.0 MB, and .* has .* MB free"):
        free_space_for(tmp_path / "out", 2_500_000_000)
    with pytest.raises(WriteError, match="the model in Q8_0 takes"):
        _quantized(TINY, tmp_path / "out.gguf", "Q8_0")
    assert os.listdir(tmp_path) == []  # noqa: PTH208

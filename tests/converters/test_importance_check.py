"""Importance matrices of another model, and values that are no numbers, found before the quantizer is started.

Oracles: llama.cpp's quantizer, which refuses the same when it comes to it; the gguf package's reader; numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_models import finish
from models import Sizes, config, save_model, weights
from rewriting import edits_of, listing
from tokenizers_tiny import write_sentencepiece

from converters.changes import Edits
from converters.errors import Error, LlamaError, MismatchError, UnsupportedError
from converters.model_output import ModelOutput, ModelRequest, plan_model_output
from converters.opening import open_model
from converters.quantizer import quantize_gguf

pytestmark = pytest.mark.llama

TINY = Path(__file__).parents[2] / "safelora_gguf" / "tiny_family" / "aligned.gguf"
MATRICES = [tensor.name for tensor in gguf.GGUFReader(TINY).tensors if len(tensor.shape) > 1]
LAYERS = [name for name in MATRICES if name.startswith("blk.")]
QUERY, GATE, DOWN = "blk.0.attn_q.weight", "blk.1.ffn_gate.weight", "blk.1.ffn_down.weight"


def imatrix(path: Path, columns: Mapping[str, int], **more: object) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    for key, value in more.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"imatrix.{key}", value)  # type: ignore[operator]
    for name, count in columns.items():
        writer.add_tensor(f"{name}.in_sum2", np.linspace(1, 50, count, dtype=np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.array([[2]], dtype=np.float32))
    finish(writer)
    return path


def plan(out: Path, outtype: str, matrix: Path | None, edits: Edits | None = None, **request: object) -> ModelOutput:
    wanted = ModelRequest(out, outtype, matrix, **request)  # type: ignore[arg-type]
    return plan_model_output(open_model(TINY), edits or Edits(), wanted)


def refused_by_llama_cpp(matrix: Path, outtype: str, place: Path) -> Error:
    with pytest.raises(Error) as caught:
        quantize_gguf(TINY, place / "theirs.gguf", outtype, threads=1, imatrix=matrix)
    assert not (place / "theirs.gguf").exists()
    return caught.value


@pytest.mark.parametrize(
    ("columns", "outtype", "tensor", "words"),
    [
        ({**dict.fromkeys(MATRICES, 256), GATE: 128}, "Q4_K_M", GATE, "128 columns"),
        ({**dict.fromkeys(MATRICES, 256), QUERY: 512}, "Q4_0", QUERY, "512 columns"),
        ({name: 256 for name in MATRICES if name != GATE}, "IQ2_XXS", GATE, "lacks 1"),
        ({name: 256 for name in MATRICES if name != QUERY}, "IQ1_S", QUERY, "lacks 1"),
        ({name: 256 for name in MATRICES if name != GATE}, "Q2_K_S", GATE, "lacks 1"),
    ],
)
def test_what_llama_cpp_refuses_is_refused_at_once(
    columns: Mapping[str, int], outtype: str, tensor: str, words: str, tmp_path: Path
) -> None:
    matrix = imatrix(tmp_path / "i.gguf", columns)
    theirs = refused_by_llama_cpp(matrix, outtype, tmp_path)
    assert theirs.exit_status == 3 and tensor in theirs.message and theirs.file == str(matrix)
    with pytest.raises(MismatchError, match=words) as caught:
        plan(tmp_path / "a.gguf", outtype, matrix)
    assert (str(caught.value.file), caught.value.tensor) == (str(matrix), tensor)
    assert listing(tmp_path) == ["i.gguf"]


def test_what_the_quantizer_alone_knows_to_be_missing(tmp_path: Path) -> None:
    """Which of these matrices get a better type is its own affair; it says so of the imatrix, and leaves nothing."""
    name = "blk.1.attn_k.weight"
    matrix = imatrix(tmp_path / "i.gguf", {one: 256 for one in MATRICES if one != name})
    with pytest.raises(MismatchError, match=name):
        plan(tmp_path / "a.gguf", "IQ2_XXS", matrix).write({})
    assert listing(tmp_path) == ["i.gguf"]


def test_an_imatrix_of_other_tensors(tmp_path: Path) -> None:
    matrix = imatrix(tmp_path / "i.gguf", {"blk.0.ssm_in.weight": 256, "output.weight": 256})
    with pytest.raises(MismatchError, match=r"none of the model's \d+ matrices"):
        plan(tmp_path / "a.gguf", "Q4_K_M", matrix)


def test_what_is_missing_and_not_needed_is_told(tmp_path: Path) -> None:
    matrix = imatrix(tmp_path / "i.gguf", {one: 256 for one in LAYERS if one != DOWN})
    output = plan(tmp_path / "a.gguf", "Q4_K_M", matrix)
    (note,) = (note for note in output.notes if "lacks" in note)
    assert f"1 of {len(LAYERS)}" in note and DOWN in note
    output.write({})
    quantize_gguf(TINY, tmp_path / "theirs.gguf", "Q4_K_M", threads=1, imatrix=matrix)
    ours, theirs = (gguf.GGUFReader(tmp_path / name).tensors for name in ("a.gguf", "theirs.gguf"))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("outtype", ["MXFP4_MOE", "F16", "Q8_0"])
def test_types_that_take_none(outtype: str, tmp_path: Path) -> None:
    matrix = imatrix(tmp_path / "i.gguf", dict.fromkeys(MATRICES, 256))
    output = plan(tmp_path / "a.gguf", outtype, matrix)
    assert sum("not used" in note for note in output.notes) == 1
    output.write({})
    plan(tmp_path / "b.gguf", outtype, None).write({})
    ours, without = (gguf.GGUFReader(tmp_path / name).tensors for name in ("a.gguf", "b.gguf"))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(ours, without, strict=True))


@pytest.mark.parametrize("known", [True, False])
def test_the_model_says_what_it_was_quantized_with(known: bool, tmp_path: Path) -> None:
    more = {"datasets": ["wiki.txt", "code.txt"], "chunk_count": 7, "chunk_size": 512} if known else {}
    (tmp_path / "deep").mkdir()
    matrix = imatrix(tmp_path / "deep" / "mine.gguf", dict.fromkeys(MATRICES, 256), **more)
    plan(tmp_path / "a.gguf", "IQ4_XS", matrix).write({})
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    found = {key: (fields[key].types[0], fields[key].contents()) for key in fields if key.startswith("quantize.")}
    text, number = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32
    expected = {"file": (text, "mine.gguf"), "entries_count": (number, len(MATRICES))}
    if known:
        expected |= {"dataset": (text, "wiki.txt"), "chunks_count": (number, 7)}
    assert found == {f"quantize.imatrix.{key}": value for key, value in expected.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_no_numbers(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """As stored, or made by a change; llama.cpp's quantizer stops at them, too."""
    sizes = Sizes(hidden=256, ffn=256, vocab=384, heads=4, kv_heads=2)
    tensors = weights(sizes, 1, dtype)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][200, 255] = value
    source = save_model(tmp_path / "m", tensors, config(sizes))
    write_sentencepiece(source, vocab_size=384)
    request = ModelRequest(tmp_path / "a.gguf", "Q4_0")
    before = listing(tmp_path)
    with pytest.raises(UnsupportedError, match="NaN or Inf") as caught:
        plan_model_output(open_model(source), Edits(), request).write({})
    assert str(caught.value.file) == str(source / "model.safetensors") and caught.value.tensor == DOWN
    assert listing(tmp_path) == before
    if dtype is torch.bfloat16:  # which is copied as it is
        plan_model_output(open_model(source), Edits(), ModelRequest(tmp_path / "f.gguf")).write({})
        with pytest.raises(LlamaError, match=r"invalid data|validation|nan|inf"):
            quantize_gguf(tmp_path / "f.gguf", tmp_path / "theirs.gguf", "Q4_0", threads=1)


def test_a_change_that_is_no_number(tmp_path: Path) -> None:
    broken = torch.full((256, 256), 0.5)
    broken[3, 3] = torch.nan
    with pytest.raises(UnsupportedError, match="NaN or Inf") as caught:
        plan(tmp_path / "a.gguf", "Q4_K_M", None, edits_of({QUERY: broken})).write({})
    assert caught.value.tensor == QUERY
    assert listing(tmp_path) == []

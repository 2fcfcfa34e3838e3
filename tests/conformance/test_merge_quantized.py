"""`merge` into quantized GGUF models: how far rounding takes the merged weights, tensor by tensor.

Oracle: PEFT's merge on the model as it is, W + scaling * B @ A with W dequantized by the gguf package, in float64; and
libggml's own rounding of that to the same type, which nobody can beat but by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import models
import numpy as np
import pytest
import torch
from gguf_models import finish, permuted, put

from converters.ggml import QType, decode, encode
from safelora_gguf.merge import merge_adapters

pytestmark = pytest.mark.conformance

SIZES = models.Sizes(hidden=256, ffn=512, layers=1, heads=4, kv_heads=2, vocab=64)
ADAPTED = {module: shape for module, shape in SIZES.modules().items() if not module.endswith("up_proj")}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q2_K")
NO_WORSE = 1.05
ALPHA, RANK = 8.0, 4


HEADS = {"q_proj": SIZES.heads, "k_proj": SIZES.kv_heads}


def in_llama_cpp(module: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and order of rows there."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES.layers)
    heads = HEADS.get(module.rpartition(".")[2])
    return f"{names.get_name(module)}.weight", permuted(weight, heads) if heads else weight


def importance_of(columns: int) -> torch.Tensor:
    return 0.5 + torch.rand(columns, generator=torch.Generator().manual_seed(columns))


def write_model(path: Path, qtype: QType, *, weighted: bool = False, tied: bool = False) -> Path:
    """A Llama whose matrices are in one type; rounded with importances where the type asks for them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(SIZES.heads)
    writer.add_head_count_kv(SIZES.kv_heads)
    for name, tensor in models.weights(replace(SIZES, tied=tied), 1).items():
        own, weight = in_llama_cpp(name.removesuffix(".weight"), tensor.numpy())
        if weight.ndim > 1 and weighted:
            data = encode(torch.from_numpy(weight), qtype, importance_of(weight.shape[-1]))
            writer.add_tensor(own, np.frombuffer(data, np.uint8).reshape(len(weight), -1), raw_dtype=qtype)
        else:
            put(writer, own, weight, qtype if weight.ndim > 1 else QType.F32)
    finish(writer)
    return path


def write_imatrix(path: Path, model: Path) -> Path:
    writer = gguf.GGUFWriter(path, "")
    for tensor in gguf.GGUFReader(model).tensors:
        if len(tensor.shape) > 1:
            sums = importance_of(int(tensor.shape[0])).numpy()[None]
            writer.add_tensor(f"{tensor.name}.in_sum2", sums)
            writer.add_tensor(f"{tensor.name}.counts", np.ones((1, 1), np.float32))
    finish(writer)
    return path


def tensors(path: Path) -> Mapping[str, gguf.gguf_reader.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: gguf.gguf_reader.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)


def deltas(pairs: Mapping[str, torch.Tensor]) -> Mapping[str, np.ndarray]:
    """PEFT's scaling * B @ A of every module, in llama.cpp's order of rows."""
    found = []
    for module in ADAPTED:
        a, b = (pairs[f"base_model.model.{module}.lora_{half}.weight"].double().numpy() for half in "AB")
        found.append(in_llama_cpp(module, ALPHA / RANK * b @ a))
    return dict(found)


def check(model: Path, out: Path, wanted: Mapping[str, np.ndarray], *, weighted: bool = False) -> None:
    before, after = tensors(model), tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].tensor_type == tensor.tensor_type
        if name not in wanted:
            assert after[name].data.tobytes() == tensor.data.tobytes(), name
            continue
        merged = values(tensor) + wanted[name]
        rows, qtype = torch.from_numpy(merged.astype(np.float32)), int(tensor.tensor_type)
        data = encode(rows, qtype, importance_of(rows.shape[1]) if weighted else None)
        least = np.linalg.norm(decode(data, tuple(rows.shape), qtype).double().numpy() - merged)
        error = np.linalg.norm(values(after[name]) - merged)
        assert error <= NO_WORSE * least + 1e-6 * np.linalg.norm(merged), name


@pytest.mark.parametrize("kind", TYPES)
def test_no_worse_than_rounding_pefts_merge(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", QType[kind])
    pairs = models.pairs(ADAPTED, 3, r=RANK)
    adapter = models.save_adapter(tmp_path / "adapter", pairs, models.adapter_config(r=RANK, alpha=ALPHA))
    report = merge_adapters(model, [(adapter, 1.0)], tmp_path / "out.gguf", device="cpu")
    check(model, tmp_path / "out.gguf", deltas(pairs))
    assert {tensor.type for tensor in report.tensors} == {kind}
    assert {tensor.name for tensor in report.tensors} == set(deltas(pairs))


@pytest.mark.parametrize("kind", ["F16", "Q4_K", "IQ2_XXS"])
def test_an_output_matrix_that_parts_unchanged_keeps_its_bytes(kind: str, tmp_path: Path) -> None:
    """A pair on the input of a tied model: the output stays what the one tensor was, and is not rounded again."""
    model = write_model(tmp_path / "model.gguf", QType[kind], weighted=True, tied=True)
    name = "base_model.model.model.embed_tokens.lora_embedding"
    tokens, width = SIZES.vocab, SIZES.hidden
    pairs = {f"{name}_A": torch.randn(RANK, tokens), f"{name}_B": torch.randn(width, RANK)}
    adapter = models.save_adapter(tmp_path / "adapter", pairs, models.adapter_config(r=RANK, alpha=ALPHA))
    report = merge_adapters(model, [(adapter, 1.0)], tmp_path / "out.gguf", device="cpu")
    before, after = tensors(model), tensors(tmp_path / "out.gguf")
    assert after["output.weight"].data.tobytes() == before["token_embd.weight"].data.tobytes()
    assert after["output.weight"].tensor_type == before["token_embd.weight"].tensor_type
    assert after["token_embd.weight"].data.tobytes() != before["token_embd.weight"].data.tobytes()
    assert {tensor.name: tensor.adapters for tensor in report.tensors}["output.weight"] == ()


def test_a_type_that_needs_an_importance_matrix(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", QType.IQ2_XXS, weighted=True)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model)
    pairs = models.pairs(ADAPTED, 3, r=RANK)
    adapter = models.save_adapter(tmp_path / "adapter", pairs, models.adapter_config(r=RANK, alpha=ALPHA))
    merge_adapters(model, [(adapter, 1.0)], tmp_path / "out.gguf", imatrix=imatrix, device="cpu")
    check(model, tmp_path / "out.gguf", deltas(pairs), weighted=True)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K"])
def test_the_change_is_measured_before_rounding(kind: str, tmp_path: Path) -> None:
    """delta_norm is ||B A scaling|| / ||W|| with W as the file has it."""
    model = write_model(tmp_path / "model.gguf", QType[kind])
    pairs = models.pairs(ADAPTED, 3, r=RANK)
    adapter = models.save_adapter(tmp_path / "adapter", pairs, models.adapter_config(r=RANK, alpha=ALPHA))
    report = merge_adapters(model, [(adapter, 0.5)], tmp_path / "out.gguf", device="cpu")
    stored, wanted = tensors(model), deltas(pairs)
    for tensor in report.tensors:
        expected = 0.5 * np.linalg.norm(wanted[tensor.name]) / np.linalg.norm(values(stored[tensor.name]))
        assert tensor.delta_norm == pytest.approx(expected, rel=1e-5)

"""GGUF adapters as sources. Oracle: the numbers handed to the gguf package's writer, and llama.cpp's rule
scale = alpha / r of each pair, or 1 without alpha."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_bytes import BIG, LITTLE, Packer, Tensor, adapter_keys
from gguf_models import QType, adapter_writer, finish, put

from converters.adapters.gguf import open_gguf_adapter
from converters.adapters.gguf_pairs import MAX_EXPERTS
from converters.errors import FormatError, UnsupportedError

RANDOM = np.random.default_rng(0)
Q, EMBEDDING, EXPERTS = "blk.0.attn_q.weight", "token_embd.weight", "blk.0.ffn_up_exps.weight"


def noise(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def saved(
    path: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]], alpha: float | None = 8.0, **types: QType
) -> Path:
    writer = adapter_writer(path / "adapter.gguf", "llama", alpha)
    for name, (a, b) in pairs.items():
        put(writer, f"{name}.lora_a", a, types.get("a", QType.F32))
        put(writer, f"{name}.lora_b", b, types.get("b", QType.F32))
    finish(writer)
    return path / "adapter.gguf"


def test_ordinary_embedding_and_expert_pairs(tmp_path: Path) -> None:
    pairs = {
        Q: (noise(4, 64), noise(96, 4)),
        EMBEDDING: (noise(100, 2), noise(64, 2)),
        EXPERTS: (noise(12, 8, 64), noise(12, 48, 8)),
        "blk.10.attn_q.weight": (noise(4, 64), noise(96, 4)),
    }
    adapter = open_gguf_adapter(saved(tmp_path, pairs))
    names = [f"blk.0.ffn_up_exps[{expert}]" for expert in range(12)]
    assert list(adapter.pairs) == ["blk.0.attn_q", *names, "blk.10.attn_q", "token_embd"]
    assert (adapter.architecture, adapter.lora_alpha, adapter.format) == ("llama", 8.0, "gguf")

    pair = adapter.pairs["blk.0.attn_q"]
    assert (pair.shape, pair.rank, pair.scaling, pair.weight) == ((96, 64), 4, 2.0, "blk.0.attn_q")
    for found, exact in zip(adapter.load("blk.0.attn_q"), pairs[Q], strict=True):
        assert np.array_equal(found, exact)

    table = adapter.pairs["token_embd"]
    assert (table.shape, table.rank, table.scaling, table.embedding) == ((100, 64), 2, 4.0, True)
    a, b = adapter.load("token_embd")
    assert np.array_equal(a, pairs[EMBEDDING][0].T) and np.array_equal(b, pairs[EMBEDDING][1])

    for expert, name in enumerate(names):
        pair = adapter.pairs[name]
        assert (pair.shape, pair.rank, pair.expert, pair.weight) == ((48, 64), 8, expert, "blk.0.ffn_up_exps")
        assert pair.key == EXPERTS
        for found, exact in zip(adapter.load(name), pairs[EXPERTS], strict=True):
            assert np.array_equal(found, exact[expert])


@pytest.mark.parametrize("qtype", [QType.F16, QType.BF16, QType.Q8_0, QType.Q4_0])
def test_stored_types(qtype: QType, tmp_path: Path) -> None:
    a, b = noise(32, 64), noise(96, 32)
    adapter = open_gguf_adapter(saved(tmp_path, {Q: (a, b)}, a=qtype, b=qtype))
    for found, exact in zip(adapter.load("blk.0.attn_q"), (a, b), strict=True):
        expected = gguf.quants.dequantize(gguf.quants.quantize(exact, qtype), qtype)
        assert torch.equal(found.float(), torch.from_numpy(expected))


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_alpha_nothing_is_scaled(alpha: float | None, tmp_path: Path) -> None:
    adapter = open_gguf_adapter(saved(tmp_path, {Q: (noise(4, 64), noise(96, 4))}, alpha))
    assert adapter.pairs["blk.0.attn_q"].scaling == 1.0
    assert adapter.lora_alpha == 4.0  # with which alpha / r says the same
    assert any("unscaled" in note for note in adapter.notes)


def test_a_file_in_the_other_byte_order(tmp_path: Path) -> None:
    a, b = noise(4, 8), noise(6, 4)
    tensors = [Tensor(f"{Q}.lora_a", (4, 8)), Tensor(f"{Q}.lora_b", (6, 4))]
    for packer, order in ((LITTLE, "<"), (BIG, ">")):
        data = b"".join(struct.pack(f"{order}{matrix.size}f", *matrix.flatten()) for matrix in (a, b))
        path = tmp_path / "adapter.gguf"
        path.write_bytes(_header(packer, tensors, len(data)) + data)
        adapter = open_gguf_adapter(path)
        for found, exact in zip(adapter.load("blk.0.attn_q"), (a, b), strict=True):
            assert np.array_equal(found, exact)


def _header(packer: Packer, tensors: list[Tensor], data: int) -> bytes:
    whole = packer.file(adapter_keys(packer), tensors)
    return whole[: len(whole) - data]


def test_norms_are_told_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    writer = adapter_writer(path, "llama")
    put(writer, f"{Q}.lora_a", noise(4, 64))
    put(writer, f"{Q}.lora_b", noise(96, 4))
    put(writer, "blk.0.attn_norm.weight", noise(64))
    finish(writer)
    adapter = open_gguf_adapter(path)
    assert list(adapter.pairs) == ["blk.0.attn_q"]
    assert any("blk.0.attn_norm.weight" in note for note in adapter.notes)


def test_nothing_to_project_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no LoRA pairs"):
        open_gguf_adapter(saved(tmp_path, {}))


def test_a_stack_of_more_experts_than_any_model_has(tmp_path: Path) -> None:
    count = MAX_EXPERTS + 1
    with pytest.raises(FormatError, match=f"claims {count} experts"):
        open_gguf_adapter(saved(tmp_path, {EXPERTS: (noise(count, 1, 2), noise(count, 2, 1))}))


@pytest.mark.parametrize("name", [Q, EMBEDDING])
def test_four_dimensions_are_no_pair(name: str, tmp_path: Path) -> None:
    a, b = (noise(2, 3, 4, 8), noise(2, 3, 6, 4)) if name == Q else (noise(2, 3, 8, 4), noise(2, 3, 6, 4))
    with pytest.raises(UnsupportedError, match="expected"):
        open_gguf_adapter(saved(tmp_path, {name: (a, b)}))

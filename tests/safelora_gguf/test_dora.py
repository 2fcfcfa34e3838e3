"""Oracles: PEFT's own merge of DoRA layers, mlx-lm's `fuse` in float64 and, where it is installed, mlx-lm itself; the
exact singular value decomposition in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Sizes, adapter_config, config, pairs, save_adapter, save_model, weights
from safetensors.torch import save_file

from converters.adapters.lora import LoraAdapter
from converters.adapters.mlx import open_mlx
from converters.adapters.peft import open_peft
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.errors import FormatError, InputError, MismatchError, UnsupportedError, UsageError
from safelora_gguf.dora import NearestPairs, dora_delta, nearest_pair, rank_within

SIZES = Sizes()
TABLE = "model.embed_tokens"
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.conformance
@pytest.mark.parametrize("embedding", [False, True])
def test_the_delta_is_pefts_merge(embedding: bool) -> None:
    """For an embedding PEFT takes the lengths over all tokens: as many as the table is wide."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(80, 48) if embedding else torch.nn.Linear(80, 48, bias=False))
    weight = model[0].weight.detach().clone()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True))
    layer = adapted.base_model.model[0]
    halves = (layer.lora_embedding_A, layer.lora_embedding_B) if embedding else (layer.lora_A, layer.lora_B)
    a, b = (half["default"] if embedding else half["default"].weight for half in halves)
    with torch.no_grad():
        a.normal_(0, 0.2)
        b.normal_(0, 0.2)
        layer.lora_magnitude_vector["default"].weight.mul_(torch.linspace(0.5, 1.5, 48))
    a, b = a.detach().clone(), b.detach().clone()
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().clone()
    merged = adapted.merge_and_unload()[0].weight.detach()

    delta = dora_delta(weight.T if embedding else weight, a, b, 1.5, magnitude)

    expected = (merged - weight).T if embedding else merged - weight
    assert float((delta - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("by_column", [False, True])
def test_little_cancels_in_a_small_update(by_column: bool) -> None:
    """A length that trained by a thousandth, in float64 and in ours."""
    generator = torch.Generator().manual_seed(0)
    w = 0.05 * torch.randn(300, 200, generator=generator)
    a, b = torch.randn(2, 200, generator=generator), 1e-5 * torch.randn(300, 2, generator=generator)
    m = torch.linalg.vector_norm(w, dim=0 if by_column else 1, keepdim=True) * 1.001
    directed = w.double() + 2.0 * b.double() @ a.double()
    exact = m.double() / directed.norm(dim=0 if by_column else 1, keepdim=True) * directed - w.double()
    delta = dora_delta(w, a, b, 2.0, m if by_column else m[:, 0])
    assert float((delta - exact).norm() / exact.norm()) < 1e-5


def test_rows_of_zeros_stay_zeros() -> None:
    """A table's padding: W, A and m are 0 there, and W' = m / 0 * 0 says nothing of them."""
    w, a, m = torch.ones(6, 4), torch.ones(2, 4), torch.full((1, 4), 3.0)
    w[:, 2], a[:, 2], m[:, 2] = 0, 0, 0
    delta = dora_delta(w, a, torch.ones(6, 2), 1.0, m)
    assert delta.isfinite().all() and not delta[:, 2].any() and delta[:, 3].any()


def decomposed(shape: tuple[int, int], rank: int, fall: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, falling singular values and V^T in float64."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator, dtype=torch.float64))[0]
    return left, fall ** torch.arange(rank, dtype=torch.float64), right.T


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (300, 400), (400, 300)])
def test_the_pair_is_the_truncated_decomposition(shape: tuple[int, int]) -> None:
    left, values, right = decomposed(shape, min(shape), 0.7)
    delta = ((left * values) @ right).float()
    for rank in (1, 5, 40):
        a, b, error = nearest_pair(delta, rank)
        exact = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        assert float((b.double() @ a.double() - exact).norm() / exact.norm()) < 1e-5
        assert error == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", [(60, 90), (700, 300)])
@pytest.mark.parametrize("fall", [0.5, 0.97, 1.0])
def test_the_smallest_rank_within_an_error(shape: tuple[int, int], fall: float) -> None:
    left, values, right = decomposed(shape, min(shape), fall)
    delta = ((left * values) @ right).float()
    exact = torch.linalg.svdvals(delta.double())
    left_out = [float(exact[k:].norm() / exact.norm()) for k in range(len(exact) + 1)]
    fewest = next(k for k, share in enumerate(left_out) if share <= 0.01)
    assert rank_within(delta) == (fewest, pytest.approx(left_out[fewest], rel=1e-4, abs=1e-7))


def test_a_pair_of_more_rank_than_there_is() -> None:
    left, values, right = decomposed((60, 90), 3, 0.7)
    delta = ((left * values) @ right).float()
    a, b, error = nearest_pair(delta, 8)
    assert (a.shape, b.shape) == ((8, 90), (60, 8)) and error < 1e-6
    assert float((b @ a - delta).norm() / delta.norm()) < 1e-6
    nothing = torch.zeros(60, 90)
    assert rank_within(nothing) == (1, 0.0)
    a, b, error = nearest_pair(nothing, 2)
    assert (a.shape, b.shape, error) == ((2, 90), (60, 2), 0.0) and not (b @ a).any()


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save_model(tmp_path / "base", weights(SIZES, 1), config(SIZES)))


def mlx_dora(root: Path, base: Checkpoint, modules: Mapping[str, tuple[int, int]]) -> LoraAdapter:
    """An MLX DoRA adapter whose lengths have moved by up to a tenth."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for module, (out, into) in modules.items():
        first, last = (out, into) if module == TABLE else (into, out)
        tensors[f"{module}.lora_a"] = 0.1 * torch.randn(first, 3, generator=generator)
        tensors[f"{module}.lora_b"] = 0.1 * torch.randn(3, last, generator=generator)
        lengths = base.load(f"{module}.weight").norm(dim=1)
        tensors[f"{module}.m"] = lengths * (0.9 + 0.2 * torch.rand(out, generator=generator))
    root.mkdir()
    settings = {"fine_tune_type": "dora", "lora_parameters": {"rank": 3, "scale": 2.0}}
    (root / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, root / "adapters.safetensors")
    return open_mlx(root, dora=True)


def fused(adapter: LoraAdapter, base: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """W' - W by DoRALinear.fuse and DoRAEmbedding.fuse, in float64."""
    for module in adapter.pairs:
        stored = {half: load(adapter, module, half) for half in ("lora_a", "lora_b", "m")}
        before = base.load(f"{module}.weight").double()
        product = 2.0 * stored["lora_a"] @ stored["lora_b"]
        weight = before + (product if module == TABLE else product.T)
        yield module, (stored["m"] / weight.norm(dim=1))[:, None] * weight - before


def load(adapter: LoraAdapter, module: str, half: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(adapter.tensor_file, "pt") as file:
        return file.get_tensor(f"{module}.{half}").double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("rank", [None, 6, 32, 48])
def test_mlx_adapters_as_pairs(rank: int | None, base: Checkpoint, tmp_path: Path) -> None:
    adapter = mlx_dora(tmp_path / "adapter", base, {**SIZES.modules(), TABLE: (128, 64)})
    found = NearestPairs(adapter, base, rank)
    for module, exact in fused(adapter, base):
        a, b = (half.double() for half in found.load(module))
        pair, values = found.pairs[module], torch.linalg.svdvals(exact)
        product = (b @ a).T if pair.embedding else b @ a
        best = float(values[pair.rank :].norm() / values.norm())
        assert pair.rank == (min(rank, *pair.shape) if rank else pair.rank)
        assert (pair.scaling, len(a), b.shape[1]) == (1.0, pair.rank, pair.rank)
        assert product.shape == pair.shape == exact.shape
        assert float((product - exact).norm() / exact.norm()) == pytest.approx(best, rel=1e-3, abs=1e-5)
        how = "exact" if pair.rank == min(pair.shape) else f"off by {best:.2%} "
        assert any(module in told and f" {how}" in told for told in found.losses), module
        if rank is None:
            assert best <= 0.01 < float(values[pair.rank - 1 :].norm() / values.norm())
    assert len(found.losses) == len(found.pairs) == 15


class Unread:
    """A model whose tensors nobody may read."""

    def __init__(self, model: Checkpoint) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def load(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")


def test_with_a_rank_nothing_is_computed_before_it_is_loaded(base: Checkpoint, tmp_path: Path) -> None:
    adapter = mlx_dora(tmp_path / "adapter", base, {Q0: (64, 64)})
    found = NearestPairs(adapter, Unread(base), 4)
    assert found.pairs[Q0].rank == 4
    assert [told.partition(":")[0] for told in found.losses] == [Q0] and "known once it is written" in found.losses[0]
    with pytest.raises(AssertionError, match="was read"):
        found.load(Q0)


def test_pairs_that_are_large_advise_to_merge(base: Checkpoint, tmp_path: Path) -> None:
    adapter = mlx_dora(tmp_path / "adapter", base, {Q0: (64, 64)})
    assert "merge" not in NearestPairs(adapter, base, 16).losses[0]  # 16 * (64 + 64) of 64 * 64 numbers
    assert "has 53% of the numbers of the weight itself: merge" in NearestPairs(adapter, base, 17).losses[0]


def test_what_does_not_belong_together(base: Checkpoint, tmp_path: Path) -> None:
    adapter = mlx_dora(tmp_path / "adapter", base, {Q0: (64, 64)})
    with pytest.raises(UsageError, match="rank 65 is more than any module has: 64"):
        NearestPairs(adapter, base, 65)
    other = weights(SIZES, 1)
    wrong: list[tuple[torch.Tensor | None, type[InputError]]] = [
        (None, MismatchError), (torch.zeros(64, 32), MismatchError), (torch.zeros(64, 64).byte(), UnsupportedError),
    ]  # fmt: skip
    for number, (weight, error) in enumerate(wrong):
        tensors = {**other, f"{Q0}.weight": weight}
        found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        model = open_checkpoint(save_model(tmp_path / str(number), found, config(SIZES)))
        with pytest.raises(error):
            NearestPairs(adapter, model, 4)


@pytest.mark.parametrize("rank", [None, 4])
def test_lengths_that_are_not_finite(rank: int | None, base: Checkpoint, tmp_path: Path) -> None:
    tensors = pairs({Q0: (64, 64)}, 1)
    tensors[f"base_model.model.{Q0}.lora_magnitude_vector"] = torch.full((64,), float("nan"))
    adapter = open_peft(save_adapter(tmp_path / "adapter", tensors, adapter_config(use_dora=True)), dora=True)
    with pytest.raises(FormatError, match="not finite"):
        NearestPairs(adapter, base, rank).load(Q0)


@pytest.mark.conformance
@pytest.mark.parametrize("embedding", [False, True])
def test_as_mlx_lm_fuses(embedding: bool) -> None:
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    dora = pytest.importorskip("mlx_lm.tuner.dora")
    plain = nn.Embedding(80, 48) if embedding else nn.Linear(48, 80, bias=False)
    layer = (dora.DoRAEmbedding if embedding else dora.DoRALinear).from_base(plain, r=4, scale=1.5)
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    layer.m = layer.m * mx.linspace(0.5, 1.5, 80)
    a, b, m, before, after = (torch.tensor(array.tolist(), dtype=torch.float64) for array in (
        layer.lora_a, layer.lora_b, layer.m, plain.weight, layer.fuse().weight))  # fmt: skip
    weight = before.T if embedding else before
    delta = dora_delta(weight, a.T, b.T, 1.5, m[None, :] if embedding else m)
    exact = after - before
    assert float(((delta.T if embedding else delta) - exact).norm() / exact.norm()) < 1e-5

"""Oracles: PEFT's own merge of a DoRA adapter, and the exact singular value decomposition in float64."""

from __future__ import annotations

import pytest
import torch

from safelora_gguf.dora import dora_delta, nearest_pair


@pytest.mark.conformance
def test_the_delta_is_pefts_merge() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 80, bias=False))
    weight = model[0].weight.detach().clone()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True))
    layer = adapted.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(0, 0.2)
        layer.lora_magnitude_vector["default"].weight.mul_(torch.linspace(0.5, 1.5, 80))
    a, b = (half["default"].weight.detach().clone() for half in (layer.lora_A, layer.lora_B))
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().clone()
    merged = adapted.merge_and_unload()[0].weight.detach()

    delta = dora_delta(weight, a, b, 1.5, magnitude)

    assert float((delta - (merged - weight)).norm() / (merged - weight).norm()) < 1e-5


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (300, 400)])
def test_the_pair_is_the_truncated_decomposition(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    side = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], side, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(shape[1], side, generator=generator, dtype=torch.float64))[0]
    values = 0.7 ** torch.arange(side, dtype=torch.float64)
    delta = (left * values) @ right.T

    for rank in (1, 5):
        a, b, error = nearest_pair(delta.float(), rank)
        exact = (left[:, :rank] * values[:rank]) @ right[:, :rank].T
        assert float((b.double() @ a.double() - exact).norm() / exact.norm()) < 1e-5
        assert error == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-4)

    a, b, error = nearest_pair(delta.float(), None, 0.01)
    fewest = next(k for k in range(1, side) if values[k:].norm() <= 0.01 * values.norm())
    assert (len(a), b.shape[1]) == (fewest, fewest)
    assert error <= 0.01

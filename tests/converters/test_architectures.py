"""Oracles: the gguf package's own name map, and a permutation written as a loop over rows."""

from __future__ import annotations

import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from converters.architectures import KNOWN, Architecture, HeadCounts, architecture_of
from converters.architectures.transforms import PermuteHeads
from converters.errors import FormatError, UnsupportedError

HEADS = HeadCounts(query=4, key_value=2)


def _upstream(architecture: Architecture, module: str) -> str | None:
    kind = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    assert isinstance(kind, MODEL_ARCH)
    found: str | None = get_tensor_name_map(kind, 200).get_name(module)
    return found


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: architecture.name)
def test_every_name_agrees_with_the_gguf_package_and_leads_back(architecture: Architecture) -> None:
    for rule in architecture.rules:
        for layer in (0, 7, 123):
            module = rule.source.replace("{i}", str(layer))
            found = architecture.to_gguf(module)
            assert found is not None
            assert found[0] == _upstream(architecture, module)
            back = architecture.to_hugging_face(found[0])
            assert back is not None
            assert back[0] == module


@pytest.mark.parametrize(
    "module", ["h.0.attn.c_attn", "model.layers.x.mlp.up_proj", "model.layers.00.mlp.up_proj", "model.layers.0.mlp"]
)
def test_unknown_names_have_no_place(module: str) -> None:
    assert all(architecture.to_gguf(module) is None for architecture in KNOWN)


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: architecture.name)
def test_transforms_of_weights_and_pairs_agree_and_can_be_undone(architecture: Architecture) -> None:
    a, b = torch.randn(3, 10), torch.randn(32, 3)
    for rule in architecture.rules:
        moved_a, moved_b = rule.pair(a, b, HEADS)
        torch.testing.assert_close(moved_b @ moved_a, rule.weight(b @ a, HEADS))
        assert torch.equal(rule.inverse().weight(rule.weight(b, HEADS), HEADS), b)


def test_the_permutation_interleaves_the_halves_of_each_head() -> None:
    weight = torch.arange(16.0)[:, None]  # two heads of eight rows
    moved = PermuteHeads("key_value").weight(weight, HEADS)
    assert moved.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_rows_that_are_no_heads_are_refused() -> None:
    with pytest.raises(FormatError, match="heads"):
        PermuteHeads("query").weight(torch.zeros(20, 2), HEADS)


def test_unknown_classes_are_named() -> None:
    with pytest.raises(UnsupportedError, match="FooForCausalLM"):
        architecture_of("FooForCausalLM", "Do this instead.")

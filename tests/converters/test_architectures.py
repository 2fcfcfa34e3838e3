"""Oracles: the gguf package's own name map, permutations written out row by row, what Gemma's norm multiplies by.

More on whole models stands in `conformance.test_other_architectures`.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from converters.architectures import KNOWN, Architecture, HeadCounts, Rule, architecture_of
from converters.architectures.transforms import AddOne, PermuteHeads, UngroupHeads
from converters.errors import FormatError, UnsupportedError

HEADS = HeadCounts(query=4, key_value=2)
RULES = sorted({rule for architecture in KNOWN for rule in architecture.rules}, key=str)


@cache
def _upstream(architecture: str) -> TensorNameMap:
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(kind, 124)


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: architecture.name)
def test_every_name_agrees_with_the_gguf_package_and_leads_back(architecture: Architecture) -> None:
    for rule in architecture.rules:
        for layer in (0, 7, 123):
            module = rule.source.replace("{i}", str(layer))
            found = architecture.to_gguf(module)
            assert found is not None
            assert found[0] == _upstream(architecture.name).get_name(module)
            back = architecture.to_hugging_face(found[0])
            assert back is not None
            assert rule.one_way or back[0] == module


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: architecture.name)
def test_no_name_stands_twice(architecture: Architecture) -> None:
    """A dict would let the last one win."""
    sources = Counter(rule.source for rule in architecture.rules)
    targets = Counter(rule.target for rule in architecture.rules if not rule.one_way)
    assert [name for name, count in (sources + targets).items() if count > 1] == []


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: architecture.name)
def test_output_matrices_have_a_place_where_llama_cpp_has_one(architecture: Architecture) -> None:
    found = architecture.to_gguf("lm_head")
    assert (found and found[0]) == _upstream(architecture.name).get_name("lm_head")


def test_no_class_has_two_architectures() -> None:
    names = Counter(name for architecture in KNOWN for name in (architecture.name, *architecture.classes))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    "module", ["h.0.attn.c_attn", "model.layers.x.mlp.up_proj", "model.layers.00.mlp.up_proj", "model.layers.0.mlp"]
)
def test_unknown_names_have_no_place(module: str) -> None:
    assert all(architecture.to_gguf(module) is None for architecture in KNOWN)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.source)
def test_transforms_of_weights_and_pairs_agree_and_can_be_undone(rule: Rule) -> None:
    """Adding a delta and moving to the other layout are the same in either order."""
    weight, a, b = torch.randn(32, 10), torch.randn(3, 10), torch.randn(32, 3)
    moved_a, moved_b = rule.pair(a, b, HEADS)
    torch.testing.assert_close(rule.weight(weight, HEADS) + moved_b @ moved_a, rule.weight(weight + b @ a, HEADS))
    back_a, back_b = rule.inverse().pair(moved_a, moved_b, HEADS)
    assert torch.equal(back_a, a)
    assert torch.equal(back_b, b)
    back = rule.inverse().weight(rule.weight(weight, HEADS), HEADS)
    torch.testing.assert_close(back, weight, rtol=0, atol=2**-22 if AddOne() in rule.transforms else 0)


def test_the_permutation_interleaves_the_halves_of_each_head() -> None:
    weight = torch.arange(16.0)[:, None]  # two heads of eight rows
    moved = PermuteHeads("key_value").weight(weight, HEADS)
    assert moved.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_rows_that_are_no_heads_are_refused() -> None:
    with pytest.raises(FormatError, match="heads"):
        PermuteHeads("query").weight(torch.zeros(20, 2), HEADS)


def test_ungrouping_gives_all_queries_then_all_keys_then_all_values() -> None:
    """Two groups of two queries, one key, one value, with heads of two rows."""
    names = ["q0", "q0'", "q1", "q1'", "k0", "k0'", "v0", "v0'", "q2", "q2'", "q3", "q3'", "k1", "k1'", "v1", "v1'"]
    places = UngroupHeads().weight(torch.arange(16), HEADS).tolist()
    assert " ".join(names[place] for place in places) == ("q0 q0' q1 q1' q2 q2' q3 q3' k0 k0' k1 k1' v0 v0' v1 v1'")


def test_one_key_for_all_queries_is_in_order_already() -> None:
    rows = torch.arange(12)
    assert torch.equal(UngroupHeads().weight(rows, HeadCounts(4, 1)), rows)


@pytest.mark.parametrize(("rows", "heads"), [(20, HEADS), (32, HeadCounts(query=4, key_value=3))])
def test_rows_that_are_no_groups_are_refused(rows: int, heads: HeadCounts) -> None:
    with pytest.raises(FormatError, match=f"{rows} rows can't be"):
        UngroupHeads().weight(torch.zeros(rows, 2), heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_norm_becomes_what_gemma_multiplies_by(dtype: torch.dtype) -> None:
    """1 + weight, which 16 bits can't hold: the smallest step above 1 is 2^-7 in bfloat16."""
    weight = torch.tensor([0.0, 2**-9, -1.5, 3.0]).to(dtype)
    moved = AddOne().weight(weight, HEADS)
    assert moved.dtype == torch.float32
    assert moved.tolist() == [1.0, 1.001953125, -0.5, 4.0]


@pytest.mark.parametrize(
    ("config", "query", "key_value"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, 8, 2),
        ({"num_attention_heads": 8}, 8, 8),
        ({"num_attention_heads": 8, "num_key_value_heads": None}, 8, 8),
        ({"model_type": "gemma3", "text_config": {"num_attention_heads": 16, "num_key_value_heads": 8}}, 16, 8),
        ({"num_attention_heads": 8, "text_config": {"vocab_size": 9}}, 8, 8),
        (
            {"num_attention_heads": 71, "multi_query": True, "new_decoder_architecture": False, "num_kv_heads": 71},
            71,
            1,
        ),
        (
            {"num_attention_heads": 128, "multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 8},
            128,
            8,
        ),
        ({"n_head": 71, "multi_query": True}, 71, 1),
        ({"n_head": 128, "n_head_kv": 8}, 128, 8),
    ],
)
def test_heads_by_configuration(config: dict[str, object], query: int, key_value: int) -> None:
    """Written from the configurations of Llama, Gemma 3 and Falcon 7B and 40B, the latter in two dialects each."""
    assert HeadCounts.from_config(config) == HeadCounts(query, key_value)


@pytest.mark.parametrize(
    "config", [{}, {"num_attention_heads": 0}, {"num_attention_heads": "8"}, {"text_config": {}}, {"text_config": 3},
               {"num_attention_heads": 8, "num_key_value_heads": True}]
)  # fmt: skip
def test_heads_that_are_no_counts_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="attention heads"):
        HeadCounts.from_config(config)


def test_unknown_classes_are_named() -> None:
    with pytest.raises(UnsupportedError, match="FooForCausalLM"):
        architecture_of("FooForCausalLM", "Do this instead.")

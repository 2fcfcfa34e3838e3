"""Oracles: the gguf package's own name map, permutations written out row by row, what Gemma's norm multiplies by.

More on whole models stands in `conformance.test_other_architectures`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache

import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES, TensorNameMap, get_tensor_name_map

from converters.architectures import KNOWN, Architecture, HeadCounts, Rule, architecture_of
from converters.architectures.transforms import (
    AddOne,
    HeadParts,
    PermuteHeads,
    StoredTransposed,
    SwapFactors,
    TakeRows,
    Transform,
    UngroupHeads,
)
from converters.errors import FormatError, UnsupportedError

HEADS = HeadCounts(query=4, key_value=2, latent_key=3)
RULES = sorted({rule for architecture in KNOWN for rule in architecture.rules}, key=str)
EXPERT = 2
OF_MIXTURES = ("_exps", "_shexp", ".ffn_gate_inp", ".exp_probs_b", ".attn_k_b", ".attn_v_b")
PARTS: set[frozenset[Transform]] = {
    frozenset({TakeRows("first"), TakeRows("second")}),
    frozenset({TakeRows("even"), TakeRows("odd")}),
    frozenset({HeadParts("key"), HeadParts("value")}),
}
"""Transforms that share out a matrix among several."""


def _kind(architecture: str) -> MODEL_ARCH:
    return next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)


@cache
def _upstream(architecture: str) -> TensorNameMap:
    return get_tensor_name_map(_kind(architecture), 124)


def _upstreams_name(architecture: str, module: str) -> str | None:
    """Upstream renames an expert's modules and stacks them under that name, and splits one before it looks."""
    name = module.replace(f".experts.{EXPERT}.", ".experts.")
    return None if name.endswith(".kv_b_proj") else _upstream(architecture).get_name(name)


def _tensors(architecture: str, layer: int) -> set[str]:
    """Every tensor that llama.cpp looks for in a model."""
    return {TENSOR_NAMES[tensor].format(bid=layer) for tensor in MODEL_TENSORS[_kind(architecture)]}


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: architecture.name)
def test_every_name_agrees_with_the_gguf_package_and_leads_back(architecture: Architecture) -> None:
    """Of mixtures upstream doesn't meet all names; `conformance.test_mixtures` holds them against its models."""
    for rule in architecture.rules:
        for layer in (0, 7, 123):
            module = rule.source.replace("{i}", str(layer)).replace("{e}", str(EXPERT))
            found = next(place for place in architecture.to_gguf(module) if place.rule == rule)
            assert found.expert == (EXPERT if "{e}" in rule.source else None)
            assert found.name in _tensors(architecture.name, layer)
            upstreams = _upstreams_name(architecture.name, module)
            assert upstreams == found.name or (upstreams is None and rule.target.endswith(OF_MIXTURES))
            back = architecture.to_hugging_face(found.name)
            assert (back and back.name) == module or rule.one_way


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: architecture.name)
def test_no_name_stands_twice(architecture: Architecture) -> None:
    """But for what becomes several, each of which is another part of it."""
    sources = defaultdict(list)
    for rule in architecture.rules:
        sources[rule.source].append(rule)
    shared = [{rule.transforms[-1] for rule in rules} for rules in sources.values() if len(rules) > 1]
    assert all(parts in PARTS for parts in shared)
    assert all(len({rule.target for rule in rules}) == len(rules) for rules in sources.values())
    targets = Counter(rule.target for rule in architecture.rules if not rule.one_way)
    assert [name for name, count in targets.items() if count > 1] == []


@pytest.mark.parametrize("architecture", KNOWN, ids=lambda architecture: architecture.name)
def test_output_matrices_have_a_place_where_llama_cpp_has_one(architecture: Architecture) -> None:
    found = [place.name for place in architecture.to_gguf("lm_head")]
    expected = _upstream(architecture.name).get_name("lm_head")
    assert found == ([] if expected is None else [expected])


def test_no_class_has_two_architectures() -> None:
    names = Counter(name for architecture in KNOWN for name in (architecture.name, *architecture.classes))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    "module",
    [
        "h.0.attn.c_attn",
        "model.layers.x.mlp.up_proj",
        "model.layers.00.mlp.up_proj",
        "model.layers.0.mlp",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.experts.x.up_proj",
        "model.layers.0.mlp.experts.01.up_proj",
        "model.layers.0.mlp.experts.1.2.up_proj",
        "model.layers.0.mlp.experts.1.gate_up_proj",
        "model.layers.0.3.mlp.up_proj",
    ],
)
def test_unknown_names_have_no_place(module: str) -> None:
    assert all(architecture.to_gguf(module) == () for architecture in KNOWN)


def _reversible(rule: Rule) -> bool:
    return not any(isinstance(transform, TakeRows | HeadParts | StoredTransposed) for transform in rule.transforms)


@pytest.mark.parametrize("rule", [rule for rule in RULES if _reversible(rule)], ids=lambda rule: rule.source)
def test_transforms_of_weights_and_pairs_agree_and_can_be_undone(rule: Rule) -> None:
    """Adding a delta and moving to the other layout are the same in either order."""
    weight, a, b = torch.randn(32, 10), torch.randn(3, 10), torch.randn(32, 3)
    moved_a, moved_b = rule.pair(a, b, HEADS)
    torch.testing.assert_close(rule.weight(weight, HEADS) + moved_b @ moved_a, rule.weight(weight + b @ a, HEADS))
    assert rule.pair_shape((32, 10), HEADS) == (len(moved_b), moved_a.shape[1])
    assert rule.weight_shape((32, 10), HEADS) == rule.weight(weight, HEADS).shape
    back_a, back_b = rule.inverse().pair(moved_a, moved_b, HEADS)
    assert torch.equal(back_a, a)
    assert torch.equal(back_b, b)
    back = rule.inverse().weight(rule.weight(weight, HEADS), HEADS)
    torch.testing.assert_close(back, weight, rtol=0, atol=2**-22 if AddOne() in rule.transforms else 0)


@pytest.mark.parametrize(
    ("parts", "rows"),
    [(("first", "second"), ([0, 1, 2], [3, 4, 5])), (("even", "odd"), ([0, 2, 4], [1, 3, 5]))],
)
def test_parts_of_the_rows(parts: tuple[str, str], rows: tuple[list[int], list[int]]) -> None:
    """Each is some rows of weight and B, and the deltas of both, brought back, add up to the whole's."""
    weight, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    total = torch.zeros(6, 5)
    for part, places in zip(parts, rows, strict=True):
        rule = Rule("both", part, (TakeRows(part),))
        assert torch.equal(rule.weight(weight, HEADS), weight[places])
        moved_a, moved_b = rule.pair(a, b, HEADS)
        assert torch.equal(moved_b @ moved_a, b[places] @ a)
        back_a, back_b = rule.inverse().pair(moved_a, moved_b, HEADS)
        total += back_b @ back_a
    torch.testing.assert_close(total, b @ a)


def test_an_odd_number_of_rows_is_no_gate_and_up() -> None:
    with pytest.raises(FormatError, match="7 rows"):
        TakeRows("first").weight(torch.zeros(7, 2), HEADS)


def test_latent_keys_and_values() -> None:
    """Two heads of two key rows and three value rows, which DeepSeek has one head after the other."""
    heads = HeadCounts(query=2, key_value=1, latent_key=2)
    names = torch.tensor([[10 * row + column for column in range(4)] for row in range(10)])
    keys, values = (HeadParts(part).weight(names, heads) for part in ("key", "value"))
    assert keys.tolist() == [[[0, 10], [1, 11], [2, 12], [3, 13]], [[50, 60], [51, 61], [52, 62], [53, 63]]]
    assert values[:, :, 0].tolist() == [[20, 30, 40], [70, 80, 90]]


@pytest.mark.parametrize(("rows", "key"), [(9, 2), (10, 5), (10, 0)])
def test_rows_that_are_no_latent_heads_are_refused(rows: int, key: int) -> None:
    with pytest.raises(FormatError, match=f"{rows} rows can't be 2 heads"):
        HeadParts("key").weight(torch.zeros(rows, 4), HeadCounts(query=2, key_value=1, latent_key=key))


def test_weights_stored_the_other_way_round() -> None:
    """gpt-oss multiplies x W, W (in, out), and PEFT adds (B A).T to it; GGUF has what multiplies W.T x."""
    stored, a, b = torch.randn(5, 6), torch.randn(2, 5), torch.randn(6, 2)
    rule = Rule("stored", "gguf", (StoredTransposed(), TakeRows("odd")))
    moved_a, moved_b = rule.pair(a, b, HEADS)
    expected = rule.weight(stored + (b @ a).T, HEADS)
    torch.testing.assert_close(rule.weight(stored, HEADS) + moved_b @ moved_a, expected)
    assert torch.equal(rule.weight(stored, HEADS), stored.T[1::2])


def test_factors_of_the_transposed_delta() -> None:
    a, b = torch.randn(2, 5), torch.randn(6, 2)
    swapped_a, swapped_b = SwapFactors().pair(a, b, HEADS)
    torch.testing.assert_close(swapped_b @ swapped_a, (b @ a).T)
    back_a, back_b = SwapFactors().inverse().pair(swapped_a, swapped_b, HEADS)
    assert torch.equal(back_a, a)
    assert torch.equal(back_b, b)


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


def test_heads_of_a_latent_vector() -> None:
    """DeepSeek V2's config.json; llama.cpp's metadata for it has attention.head_count_kv = 1."""
    config = {
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
    }
    assert HeadCounts.from_config(config) == HeadCounts(query=128, key_value=1, latent_key=128)
    with pytest.raises(FormatError, match="qk_nope_head_dim"):
        HeadCounts.from_config({**config, "qk_nope_head_dim": "128"})


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

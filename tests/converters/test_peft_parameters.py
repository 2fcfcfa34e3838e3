"""Oracle: the formula of PEFT's ParamWrapper.get_delta_weight, einsum("o r e, e r i -> e o i", B, A), in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapter_config, pairs, save_adapter

from converters.adapters.gguf_pairs import MAX_EXPERTS
from converters.adapters.lora import LoraPair
from converters.adapters.peft import PeftAdapter, open_peft
from converters.errors import FormatError, UnsupportedError

EXPERTS = "model.layers.0.mlp.experts"
Q0 = "model.layers.0.self_attn.q_proj"
NESTED = {EXPERTS: (8, 6), f"{EXPERTS}.base_layer": (12, 5)}  # down_proj around gate_up_proj
BOTH = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def open_with(root: Path, tensors: dict[str, torch.Tensor], targets: list[str], **settings: Any) -> PeftAdapter:
    return open_peft(save_adapter(root / "adapter", tensors, adapter_config(target_parameters=targets, **settings)))


def delta(adapter: PeftAdapter, pair: LoraPair) -> torch.Tensor:
    a, b = (half.double() for half in adapter.load(pair.module))
    return pair.scaling * (b @ a)


def formula(tensors: dict[str, torch.Tensor], key: str, experts: int, scaling: float) -> torch.Tensor:
    a, b = (tensors[f"base_model.model.{key}.lora_{half}.weight"].double() for half in "AB")
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
    return torch.einsum("ore,eri->eoi", b, a) * scaling


def test_a_stack_of_experts_is_a_pair_for_each(tmp_path: Path) -> None:
    tensors = pairs({EXPERTS: (12, 5)}, 1, r=3 * 4)
    adapter = open_with(tmp_path, tensors, ["mlp.experts.gate_up_proj"], r=4, alpha=6)
    assert list(adapter.pairs) == [f"{EXPERTS}.gate_up_proj[{expert}]" for expert in range(3)]
    names = (f"base_model.model.{EXPERTS}.lora_A.weight", f"base_model.model.{EXPERTS}.lora_B.weight")
    for expert, pair in enumerate(adapter.pairs.values()):
        named = f"{EXPERTS}.gate_up_proj[{expert}]"
        assert pair == LoraPair(named, EXPERTS, names, 4, 6 / 4, (12, 5), expert=expert)
        assert pair.weight == f"{EXPERTS}.gate_up_proj"
        torch.testing.assert_close(delta(adapter, pair), formula(tensors, EXPERTS, 3, 6 / 4)[expert])


def test_twelve_experts_come_in_natural_order(tmp_path: Path) -> None:
    adapter = open_with(tmp_path, pairs({EXPERTS: (6, 5)}, 1, r=12 * 2), ["down_proj"], r=2)
    assert [pair.expert for pair in adapter.pairs.values()] == list(range(12))


@pytest.mark.parametrize("infix", ["", ".default"])
@pytest.mark.parametrize(
    "targets", [BOTH, BOTH[::-1], ["gate_up_proj", "down_proj"], [f"model.layers.0.{t}" for t in BOTH]]
)
def test_two_parameters_of_one_module_are_told_by_their_nesting(infix: str, targets: list[str], tmp_path: Path) -> None:
    tensors = pairs(NESTED, 1, r=3 * 4)
    stored = {name.removesuffix(".weight") + f"{infix}.weight": tensor for name, tensor in tensors.items()}
    adapter = open_with(tmp_path, stored, targets)
    for parameter, key in (("gate_up_proj", f"{EXPERTS}.base_layer"), ("down_proj", EXPERTS)):
        for expert in range(3):
            pair = adapter.pairs[f"{EXPERTS}.{parameter}[{expert}]"]
            assert (pair.key, pair.shape) == (key, NESTED[key])
            torch.testing.assert_close(delta(adapter, pair), formula(tensors, key, 3, 2)[expert])
    assert len(adapter.pairs) == 6


def test_patterns_see_the_parameter_s_name_and_ranks_are_one_expert_s(tmp_path: Path) -> None:
    tensors = pairs(NESTED, 1, r=12)
    ranks, alphas = {r".*\.gate_up_proj": 6, "experts": 5}, {"mlp.experts.down_proj": 7}
    adapter = open_with(tmp_path, tensors, BOTH, r=4, use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas)
    told = {pair.module.removeprefix(f"{EXPERTS}."): (pair.rank, pair.scaling) for pair in adapter.pairs.values()}
    assert told == {
        **{f"gate_up_proj[{expert}]": (6, 8 / math.sqrt(6)) for expert in range(2)},
        **{f"down_proj[{expert}]": (4, 7 / math.sqrt(4)) for expert in range(3)},
    }


def test_a_module_s_own_weight_of_two_or_three_dimensions(tmp_path: Path) -> None:
    router, stack = "model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.input_linear"
    tensors = pairs({router: (3, 5), stack: (12, 5)}, 1, ranks={stack: 8})
    adapter = open_with(tmp_path, tensors, ["gate.weight", "input_linear.weight"], rank_pattern={"gate": 9})
    assert [(pair.module, pair.expert) for pair in adapter.pairs.values()] == [
        (f"{stack}[0]", 0), (f"{stack}[1]", 1), (router, None)
    ]  # fmt: skip
    for expert in range(2):
        torch.testing.assert_close(
            delta(adapter, adapter.pairs[f"{stack}[{expert}]"]), formula(tensors, stack, 2, 2)[expert]
        )
    torch.testing.assert_close(delta(adapter, adapter.pairs[router]), formula(tensors, router, 1, 2)[0])


def test_ordinary_modules_stay_what_they_are(tmp_path: Path) -> None:
    modules = {Q0: (8, 8), "model.layers.1.mlp.down_proj": (5, 12), f"{EXPERTS}.1.down_proj": (5, 12)}
    adapter = open_with(tmp_path, pairs(modules | {EXPERTS: (5, 12)}, 1, ranks={EXPERTS: 8}), ["down_proj"])
    ordinary = {pair.module: pair.shape for pair in adapter.pairs.values() if pair.expert is None}
    assert ordinary == modules
    assert len(adapter.pairs) == 5


def test_b_is_read_once_for_all_experts(tmp_path: Path) -> None:
    adapter = open_with(tmp_path, pairs(NESTED, 1, r=12), BOTH)
    first, second = (adapter.load(f"{EXPERTS}.down_proj[{expert}]")[1] for expert in range(2))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert adapter.load(f"{EXPERTS}.gate_up_proj[0]")[1].shape == (12, 4)


def test_a_target_without_a_pair_is_noted(tmp_path: Path) -> None:
    adapter = open_with(tmp_path, pairs({Q0: (8, 8)}, 1), [*BOTH, f"{Q0}.weight"])
    assert adapter.notes == (f"there is no pair for what target_parameters names: {BOTH[0]}, {BOTH[1]}",)


REFUSED: dict[str, tuple[dict[str, torch.Tensor], list[str], type[Exception], str]] = {
    "half an expert": (pairs({EXPERTS: (12, 5)}, 1, r=10), BOTH[1:], FormatError, "no multiple of the rank 4"),
    "more experts than any model": (
        pairs({EXPERTS: (1, 1)}, 1, r=4 * (MAX_EXPERTS + 1)), BOTH[1:], FormatError, "at most 4096",
    ),
    "two targets and one pair": (
        pairs({EXPERTS: (12, 5)}, 1, r=12), BOTH, FormatError, "target_parameters names down_proj, gate_up_proj"
    ),
    "two pairs and one target": (pairs(NESTED, 1, r=12), BOTH[:1], FormatError, "has 2 of the nested pairs"),
    "two pairs and no target": (pairs(NESTED, 1, r=12), [], FormatError, "names none of its module's"),
    "a gap in the nesting": (
        pairs({EXPERTS: (8, 6), f"{EXPERTS}.base_layer.base_layer": (8, 6)}, 1, r=12), BOTH, FormatError, "nested"
    ),
    "parameters of unknown order": (
        pairs(NESTED, 1, r=12), ["experts.left", "experts.right"], UnsupportedError, "left, right, and which pair is"
    ),
    "an embedding": (
        pairs({"model.embed_tokens": (9, 5)}, 1), ["embed_tokens.weight"], UnsupportedError, "is a pair on an embedding"
    ),
    "no parameter's name": (pairs({Q0: (8, 8)}, 1), ["experts."], FormatError, "is no parameter's name"),
    "a name of a thousand dots": (pairs({Q0: (8, 8)}, 1), ["a." * 499 + "b"], FormatError, "is no parameter's name"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_told_is_refused(case: str, tmp_path: Path) -> None:
    tensors, targets, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        open_with(tmp_path, tensors, targets)


def test_halves_that_disagree(tmp_path: Path) -> None:
    tensors = pairs({EXPERTS: (12, 5)}, 1, r=12)
    tensors[f"base_model.model.{EXPERTS}.lora_B.weight"] = torch.ones(12, 8)
    with pytest.raises(FormatError, match="ranks together 12, B has all experts' ranks together 8"):
        open_with(tmp_path, tensors, BOTH[1:])


def test_more_matrices_than_any_model_has(tmp_path: Path) -> None:
    modules = {f"model.layers.{layer}.mlp.experts": (1, 1) for layer in range(26)}
    tensors = pairs(modules, 1, r=4 * 4000)
    with pytest.raises(FormatError, match="describes over 100000 matrices"):
        open_with(tmp_path, tensors, BOTH[1:])

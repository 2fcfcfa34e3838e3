"""Oracles: PEFT's and mlx-lm's own formulas, and the readers of the other commands, all of whose refusals and losses
must be told at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Sizes, adapter_config, pairs, save_adapter
from safetensors.torch import save_file

from converters.adapters.mlx import open_mlx
from converters.adapters.peft import open_peft
from converters.errors import InputError
from converters.inspection import Inspection, inspect_path

SIZES = Sizes()
MODULE = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{MODULE}"


def told(found: Inspection) -> str:
    return "\n".join(found.warnings)


# PEFT


def test_scalings_follow_the_configuration_s_own_formula(tmp_path: Path) -> None:
    settings = adapter_config(r=4, alpha=12, use_rslora=True, rank_pattern={"k_proj": 9}, alpha_pattern={"v_proj": 5})
    ranks = {module: 9 for module in SIZES.modules() if module.endswith("k_proj")}
    found = inspect_path(save_adapter(tmp_path / "a", pairs(SIZES.modules(), 1, ranks=ranks), settings))
    for module in found.modules:
        rank = 9 if module.name.endswith("k_proj") else 4
        alpha = 5 if module.name.endswith("v_proj") else 12
        assert (module.rank, module.shape) == (rank, SIZES.modules()[module.name])
        assert module.scaling == pytest.approx(alpha / math.sqrt(rank), rel=1e-15)
    assert len(found.modules) == len(SIZES.modules()) and found.warnings == ()
    assert any("use_rslora and alpha_pattern" in note for note in found.notes)


def test_an_adapter_s_fingerprint_is_that_of_other_commands(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", pairs(SIZES.modules(), 1), adapter_config())
    assert inspect_path(adapter).fingerprint == open_peft(adapter).fingerprint()
    assert inspect_path(adapter / "adapter_model.safetensors").fingerprint == open_peft(adapter).fingerprint()


SETTINGS: dict[str, Any] = {
    "layer_replication": [[0, 1]],
    "target_parameters": "experts",
    "init_lora_weights": "pissa",
    "peft_type": "LOHA",
    "lora_alpha": "sixteen",
    "rank_pattern": {"(": 4},
}
TENSORS: dict[str, tuple[int, ...]] = {
    f"{KEY}.lora_magnitude_vector.weight": (64,),
    "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": (4, 64),
    "base_model.model.model.layers.0.mlp.strange": (4, 64),
    "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight": (0,),
    "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight": (0,),
    "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight": (7, 64),
    "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight": (96, 7),
}
LOST: dict[str, tuple[int, ...]] = {
    "base_model.model.lm_head.modules_to_save.weight": (8, 8),
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 64),
    f"{KEY}.bias": (64,),
    f"{KEY}.lora_B.bias": (64,),
    "base_model.model.model.norm.weight": (64,),
}
LOST_SETTINGS: dict[str, Any] = {
    "modules_to_save": ["embed_tokens"], "trainable_token_indices": [1], "lora_bias": True, "bias": "all",
}  # fmt: skip


def refusal(adapter: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        open_peft(adapter, dora=True)
    return caught.value


def zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(*shape) for name, shape in shapes.items()}


def test_everything_that_other_commands_refuse_in_a_peft_adapter_is_told_at_once(tmp_path: Path) -> None:
    good, odd = pairs({MODULE: (64, 64)}, 1), zeros(TENSORS)
    settings = {key: value for key, value in SETTINGS.items() if key != "lora_alpha"}
    found = inspect_path(save_adapter(tmp_path / "all", good | odd | zeros(LOST), adapter_config(**settings)))
    for key, value in settings.items():
        alone = refusal(save_adapter(tmp_path / key, good, adapter_config(**{key: value})))
        assert alone.message in told(found), key
    for number, name in enumerate(odd):
        mate = name.replace("lora_A", "lora_B") if ".layers.0." not in name else name
        some = {part: odd[part] for part in {name, mate, name.replace("lora_B", "lora_A")} if part in odd}
        alone = refusal(save_adapter(tmp_path / f"tensor {number}", good | some, adapter_config()))
        if name.partition(".layers.2.")[1]:
            continue  # the ranks: rank_pattern is unsound here, so nothing can be said of them
        assert alone.message in told(found), name
    assert MODULE in [module.name for module in found.modules]
    assert all(module.scaling is None for module in found.modules)


def test_everything_that_other_commands_leave_out_is_told_beside_what_they_refuse(tmp_path: Path) -> None:
    good, lost = pairs({MODULE: (64, 64)}, 1), zeros(LOST)
    losses = open_peft(save_adapter(tmp_path / "lost", good | lost, adapter_config(**LOST_SETTINGS))).losses
    assert len(losses) == len(LOST) + 1  # all tensors, and the embedding that is announced
    assert inspect_path(tmp_path / "lost").warnings == losses
    found = inspect_path(save_adapter(tmp_path / "all", good | lost | zeros(TENSORS), adapter_config(**LOST_SETTINGS)))
    assert set(losses) < set(found.warnings) and refusal(tmp_path / "all").message in told(found)


def test_what_merge_uses_beside_pairs_is_told_by_kind(tmp_path: Path) -> None:
    """PEFT's names for what is trained whole; what is broken about it is a warning."""
    lost = {name: shape for name, shape in LOST.items() if "lm_head" not in name}
    notes = inspect_path(save_adapter(tmp_path / "a", pairs({MODULE: (64, 64)}, 1) | zeros(lost), adapter_config(
        trainable_token_indices=[1], lora_bias=True, bias="all"))).notes  # fmt: skip
    for name, kind in (
        ("model.norm.weight", "merge puts them in the place"),
        (f"{MODULE}.bias", "merge adds them"),
        ("model.embed_tokens.weight, rows 1", "merge puts these rows"),
    ):
        assert any(name in note and kind in note for note in notes), name
    twice = {"base_model.model.model.norm.modules_to_save.weight": (60,), "base_model.model.model.norm.weight": (64,)}
    broken = save_adapter(tmp_path / "b", pairs({MODULE: (64, 64)}, 1) | zeros(twice), adapter_config())
    found = inspect_path(broken)
    assert not any("merge puts" in note for note in found.notes)
    with pytest.raises(InputError) as caught:
        _ = open_peft(broken).whole
    assert caught.value.message in told(found)


def test_dora_is_a_note_and_its_pairs_are_told(tmp_path: Path) -> None:
    tensors = pairs(SIZES.modules(), 1)
    lengths = {f"base_model.model.{name}.lora_magnitude_vector": torch.ones(out) for name, (out, _) in
               SIZES.modules().items()}  # fmt: skip
    adapter = save_adapter(tmp_path / "a", tensors | lengths, adapter_config(use_dora=True))
    assert open_peft(adapter, dora=True).magnitudes.keys() == SIZES.modules().keys()
    found = inspect_path(adapter)
    assert found.warnings == () and any("uses DoRA" in note for note in found.notes)
    assert {module.name: module.rank for module in found.modules} == dict.fromkeys(SIZES.modules(), 4)
    lengths[f"{KEY}.lora_magnitude_vector"] = torch.ones(63)
    del lengths[f"base_model.model.{MODULE.replace('q_proj', 'v_proj')}.lora_magnitude_vector"]
    lengths["base_model.model.x.lora_magnitude_vector"] = torch.ones(4)
    found = inspect_path(save_adapter(tmp_path / "b", tensors | lengths, adapter_config(use_dora=True)))
    for part in (f"{KEY}.lora_magnitude_vector: has 63 values", "has no magnitudes", "has magnitudes and no pair"):
        assert part in told(found)
    assert len(found.warnings) == 3


EXPERTS = "model.layers.0.mlp.experts"
STACKS = {EXPERTS: (8, 6), f"{EXPERTS}.base_layer": (12, 8)}  # down_proj around gate_up_proj, three experts of rank 4


def test_a_stack_of_experts_is_one_module(tmp_path: Path) -> None:
    tensors = pairs(STACKS, 1, r=12) | pairs({MODULE: (64, 64)}, 1)
    settings = adapter_config(target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    adapter = save_adapter(tmp_path / "a", tensors, settings)
    opened, found = open_peft(adapter), inspect_path(adapter)
    assert found.warnings == () and [module.name for module in found.modules] == list(
        dict.fromkeys(pair.weight for pair in opened.pairs.values())
    )
    for module in found.modules[:2]:
        pair = opened.pairs[f"{module.name}[2]"]
        assert (module.key, module.rank, module.scaling, module.shape) == (pair.key, 4, pair.scaling, pair.shape)
        assert module.experts == 3
    assert found.modules[2].name == MODULE and found.modules[2].experts is None


@pytest.mark.parametrize(
    ("targets", "stray", "rank", "expected"),
    [
        (["experts.down_proj", "experts.gate_up_proj"], True, 4, [f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj"]),
        (["experts.down_proj"], False, 4, []),
        ([], False, 4, []),
        (["experts.down_proj", "experts.gate_up_proj"], False, "four", []),
    ],
    ids=["beside a stray tensor", "a target too few", "no targets", "no rank"],
)
def test_nested_pairs_are_never_read_apart(
    targets: list[str], stray: bool, rank: object, expected: list[str], tmp_path: Path
) -> None:
    """Each alone would be taken for a pair on the module's own weight, or for the other parameter's."""
    tensors = pairs(STACKS, 1, r=12) | pairs({MODULE: (64, 64)}, 1) | ({"stray": torch.zeros(1)} if stray else {})
    adapter = save_adapter(tmp_path / "a", tensors, adapter_config(target_parameters=targets) | {"r": rank})
    found = inspect_path(adapter)
    assert refusal(adapter).message in told(found) and len(found.warnings) == 1
    assert [module.name for module in found.modules] == [*expected, MODULE]
    assert [module.shape for module in found.modules[:-1]] == ([(8, 6), (12, 8)] if expected else [])


def test_ranks_that_contradict_the_configuration(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", pairs(SIZES.modules(), 1, ranks={MODULE: 7}), adapter_config())
    found = inspect_path(adapter)
    assert found.warnings == (f"adapter_model.safetensors: {KEY}.lora_A.weight: {refusal(adapter).message}",)
    assert {module.name for module in found.modules} == SIZES.modules().keys() - {MODULE}
    assert all(module.scaling == 2.0 for module in found.modules)


def test_an_unsound_scaling_is_no_scaling(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", pairs(SIZES.modules(), 1), adapter_config() | {"lora_alpha": "sixteen"})
    found = inspect_path(adapter)
    assert "lora_alpha is 'sixteen'" in told(found) and {module.scaling for module in found.modules} == {None}
    (adapter / "adapter_config.json").unlink()
    found = inspect_path(adapter)
    assert "adapter_config.json: the adapter's configuration: no such file" in told(found)
    assert [(module.rank, module.scaling) for module in found.modules] == [(4, None)] * len(SIZES.modules())


def test_a_pattern_without_end_is_told_and_leaves_the_tensors_ranks(tmp_path: Path) -> None:
    module = f"model.{'a' * 40}"
    settings = adapter_config(r=8, alpha_pattern={"(a+)+b": 4})
    found = inspect_path(save_adapter(tmp_path / "a", pairs({module: (8, 8)}, 1, r=4), settings))
    assert "backtracks without end" in told(found)
    assert [(each.name, each.rank, each.scaling) for each in found.modules] == [(module, 4, None)]


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    tensors = pairs({MODULE: (64, 64)}, 1)
    tensors |= {name.replace(".weight", ".default.weight"): tensor.clone() for name, tensor in tensors.items()}
    adapter = save_adapter(tmp_path / "a", tensors, adapter_config())
    assert refusal(adapter).message in told(inspect_path(adapter))


def test_adapters_in_integers_and_activated_ones(tmp_path: Path) -> None:
    tensors = pairs({MODULE: (64, 64)}, 1)
    tensors[f"{KEY}.lora_A.weight"] = torch.zeros(4, 64, dtype=torch.int8)
    found = inspect_path(save_adapter(tmp_path / "a", tensors, adapter_config(alora_invocation_tokens=[1, 2])))
    assert "stored as I8" in told(found) and "activated LoRA" in told(found)


# MLX


def save_mlx(directory: Path, tensors: Mapping[str, torch.Tensor], **settings: Any) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(dict(tensors), directory / "adapters.safetensors")
    return directory


MLX = {f"{MODULE}.lora_a": torch.zeros(64, 4), f"{MODULE}.lora_b": torch.zeros(4, 96)}
LORA = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.5}}


def test_an_mlx_adapter(tmp_path: Path) -> None:
    adapter = save_mlx(tmp_path / "a", MLX, **LORA)
    found = inspect_path(adapter)
    module = found.modules[0]  # delta = scale * (a @ b).T, so (out, in) is (96, 64)
    assert (module.name, module.rank, module.scaling, module.shape) == (MODULE, 4, 2.5, (96, 64))
    assert (found.format, found.warnings, found.fingerprint) == ("mlx", (), open_mlx(adapter).fingerprint())
    assert inspect_path(adapter / "adapters.safetensors").format == "mlx"


def test_everything_that_other_commands_refuse_in_an_mlx_adapter_is_told_at_once(tmp_path: Path) -> None:
    odd = {
        f"{MODULE}.m": torch.zeros(96),
        "model.norm.weight": torch.zeros(64),
        "model.layers.1.mlp.up_proj.lora_a": torch.zeros(64, 4),
        "model.layers.2.mlp.up_proj.lora_a": torch.zeros(2, 64, 4),
        "model.layers.2.mlp.up_proj.lora_b": torch.zeros(2, 96, 4),
    }
    settings = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 0, "scale": "much"}}
    found = inspect_path(save_mlx(tmp_path / "a", MLX | odd, **settings))
    for part in ("rank is 0", "scale is 'much'", "holds DoRA magnitudes", "whole tensor trained",
                 "has a lora_a but no lora_b", "expected (experts, r, in)"):  # fmt: skip
        assert part in told(found)
    assert [(module.name, module.scaling) for module in found.modules] == [(MODULE, None)]


def test_mlx_s_dora_is_a_note(tmp_path: Path) -> None:
    dora = LORA | {"fine_tune_type": "dora"}
    found = inspect_path(save_mlx(tmp_path / "sound", MLX | {f"{MODULE}.m": torch.ones(96)}, **dora))
    assert found.warnings == () and any("uses DoRA" in note for note in found.notes)
    assert [(module.name, module.rank, module.scaling) for module in found.modules] == [(MODULE, 4, 2.5)]
    lost = {f"{MODULE}.m": torch.ones(95), "model.layers.1.mlp.up_proj.m": torch.ones(96)}
    found = inspect_path(save_mlx(tmp_path / "lost", MLX | lost, **dora))
    assert "expected one value for each of 96 rows" in told(found) and "has magnitudes and no pair" in told(found)
    assert any("uses DoRA" in note for note in found.notes) and found.modules[0].scaling == 2.5


@pytest.mark.parametrize("stray", [False, True])
def test_a_stack_of_mlx_s_is_one_module(stray: bool, tmp_path: Path) -> None:
    stack = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{stack}.lora_a": torch.zeros(3, 4, 64), f"{stack}.lora_b": torch.zeros(3, 96, 4)}
    found = inspect_path(save_mlx(tmp_path / "a", tensors | MLX | ({"stray": torch.zeros(1)} if stray else {}), **LORA))
    assert [(module.name, module.experts) for module in found.modules] == [(stack, 3), (MODULE, None)]
    assert found.modules[0].shape == (96, 64) and found.modules[0].rank == 4 and len(found.warnings) == stray


def test_halves_under_another_name_are_no_model(tmp_path: Path) -> None:
    save_file(MLX, tmp_path / "0000100_adapters.safetensors")
    found = inspect_path(tmp_path / "0000100_adapters.safetensors")
    assert found.kind == "adapter" and "halves of LoRA pairs" in told(found)

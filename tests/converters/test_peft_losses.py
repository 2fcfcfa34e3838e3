"""Oracle: the names under which PEFT 0.21 saves what it trains beside pairs, written out from its own files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import adapter_config, pairs, save_adapter

from converters.adapters.peft import PeftAdapter, open_peft
from converters.errors import FormatError, UnsupportedError

Q0 = "model.layers.0.self_attn.q_proj"
P = "base_model.model."
MERGE = "merge the adapter into its model (safelora-gguf merge)"


def open_with(root: Path, names: list[str], **settings: Any) -> PeftAdapter:
    tensors = pairs({Q0: (8, 8)}, 1) | {name: torch.ones(8) for name in names}
    return open_peft(save_adapter(root / "adapter", tensors, adapter_config(**settings)))


LOST: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "a module, as it is saved": ([f"{P}lm_head.weight"], {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "a module in its wrapping": ([f"{P}lm_head.modules_to_save.weight"], {}, "modules_to_save"),
    "a module with its adapter's name": ([f"{P}lm_head.modules_to_save.default.weight"], {}, "modules_to_save"),
    "a classifier": (
        [f"{P}classifier.out_proj.bias"], {"modules_to_save": ["classifier", "score"]}, "modules_to_save"
    ),
    "a layer's module": (
        [f"{P}model.layers.0.mlp.up_proj.weight"], {"modules_to_save": ["mlp"]}, "modules_to_save"
    ),
    "a norm": ([f"{P}model.layers.0.input_layernorm.weight"], {"modules_to_save": ["norm"]}, "modules_to_save"),
    "tokens": (
        [f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"], {"trainable_token_indices": [1]},
        "trained tokens",
    ),
    "tokens of two tables": (
        [f"{P}{table}.token_adapter.trainable_tokens_delta" for table in ("model.embed_tokens", "lm_head")],
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "trained tokens",
    ),
    "a bias of an adapted module": ([f"{P}{Q0}.base_layer.bias"], {"bias": "lora_only"}, "trained biases"),
    "any bias": ([f"{P}model.layers.0.mlp.up_proj.bias"], {"bias": "all"}, "trained biases"),
    "a bias of lora_B": ([f"{P}{Q0}.lora_B.bias"], {"lora_bias": True}, "lora_bias"),
    "a bias of lora_B with its adapter's name": ([f"{P}{Q0}.lora_B.default.bias"], {"lora_bias": True}, "lora_bias"),
    "a norm that nothing announces": ([f"{P}model.norm.weight"], {}, "trained norms"),
    "a table": ([f"{P}lm_head.weight"], {}, "where the vocabulary was resized"),
    "both tables": ([f"{P}lm_head.weight", f"{P}model.embed_tokens.weight"], {}, "where the vocabulary was resized"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOST)
def test_what_pairs_cannot_hold_is_told_with_the_way_out(case: str, tmp_path: Path) -> None:
    names, settings, what = LOST[case]
    adapter = open_with(tmp_path, names, **settings)
    (loss,) = adapter.losses
    assert loss.endswith(f": {', '.join(sorted(names))}") and what in loss and MERGE in loss
    assert list(adapter.pairs) == [Q0] and adapter.notes == ()


def test_many_of_a_kind_are_one_sentence_with_every_name(tmp_path: Path) -> None:
    names = {f"{P}model.layers.{layer}.mlp.up_proj.bias" for layer in range(200)}
    adapter = open_with(tmp_path, [*names, f"{P}model.norm.weight"], bias="all")
    assert len(adapter.losses) == 2
    (biases,) = (loss for loss in adapter.losses if loss.startswith("trained biases"))
    assert set(biases.rpartition(": ")[2].split(", ")) == names


def test_more_names_than_any_model_has_are_counted(tmp_path: Path) -> None:
    names = [f"{P}model.layers.{layer}.{'x' * 900}.bias" for layer in range(300)]
    (loss,) = open_with(tmp_path, names, bias="all").losses
    told = loss.count(".bias")
    assert len(loss) < 110_000 and told > 100 and loss.endswith(f" and {300 - told} more")


ANNOUNCED: dict[str, tuple[dict[str, Any], str]] = {
    "modules": ({"modules_to_save": ["lm_head", "embed_tokens"]}, "lm_head, embed_tokens (modules_to_save)"),
    "tokens": ({"trainable_token_indices": [1]}, "single tokens (trainable_token_indices)"),
    "biases of lora_B": ({"lora_bias": True}, "biases of lora_B (lora_bias)"),
}


@pytest.mark.parametrize("case", ANNOUNCED)
def test_what_is_announced_and_missing_is_told(case: str, tmp_path: Path) -> None:
    settings, what = ANNOUNCED[case]
    (loss,) = open_with(tmp_path, [], **settings).losses
    assert f"says that {what} were trained, too, and its tensors lack them" in loss


def test_one_module_of_two_is_missing(tmp_path: Path) -> None:
    adapter = open_with(tmp_path, [f"{P}lm_head.weight"], modules_to_save=["lm_head", "embed_tokens"])
    assert len(adapter.losses) == 2 and "says that embed_tokens (modules_to_save)" in adapter.losses[1]


def test_biases_of_a_model_without_any_are_no_loss(tmp_path: Path) -> None:
    adapter = open_with(tmp_path, [], bias="all")
    assert adapter.losses == () and "bias: all" in adapter.notes[0]


UNTRAINED = {
    "beside modules_to_save": [f"{P}lm_head.original_module.weight", f"{P}lm_head.modules_to_save.weight"],
    "beside trained tokens": [
        f"{P}lm_head.token_adapter.base_layer.weight", f"{P}lm_head.token_adapter.trainable_tokens_delta"
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", UNTRAINED)
def test_the_base_s_own_tables_are_no_loss(case: str, tmp_path: Path) -> None:
    adapter = open_with(tmp_path, UNTRAINED[case])
    (loss,) = adapter.losses
    assert loss.endswith(": " + UNTRAINED[case][1]) and dict(adapter.frozen_tables) == {}


def test_an_adapted_head_s_own_weight_and_bias(tmp_path: Path) -> None:
    adapter = open_with(tmp_path, [f"{P}lm_head.base_layer.weight", f"{P}lm_head.base_layer.bias"])
    assert dict(adapter.frozen_tables) == {"lm_head": f"{P}lm_head.base_layer.weight"}
    assert adapter.losses == ()
    told = "the base model's own, saved along and no part of its update"
    assert adapter.notes == (f"{told}: {P}lm_head.base_layer.bias",)


@pytest.mark.parametrize(
    "name",
    [f"{P}{Q0}.weight", f"{P}{Q0}.lora_C.weight", f"{P}{Q0}.lora_A.bias", f"{P}model.layers.0.self_attn.sinks", "x"],
)
def test_a_tensor_that_is_nothing_known_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="neither a lora_A nor a lora_B") as caught:
        open_with(tmp_path, [name, f"{P}model.norm.weight"])
    assert caught.value.tensor == name


def test_an_adapter_without_pairs_says_what_it_holds(tmp_path: Path) -> None:
    tensors = {f"{P}lm_head.weight": torch.ones(4, 4), f"{P}model.norm.weight": torch.ones(4)}
    with pytest.raises(
        FormatError, match=r"holds no LoRA pairs, only what .*modules_to_save\): .*lm_head.weight; trained norms"
    ):
        open_peft(save_adapter(tmp_path / "adapter", tensors, adapter_config(modules_to_save=["lm_head"])))


def test_dora_collects_losses_too(tmp_path: Path) -> None:
    names = [f"{P}{Q0}.lora_magnitude_vector", f"{P}{Q0}.base_layer.bias"]
    tensors = pairs({Q0: (8, 8)}, 1) | {name: torch.ones(8) for name in names}
    save_adapter(tmp_path / "adapter", tensors, adapter_config(use_dora=True, bias="all", lora_bias=True))
    adapter = open_peft(tmp_path / "adapter", dora=True)
    assert dict(adapter.magnitudes) == {Q0: names[0]}
    biases, missing = adapter.losses
    assert (
        re.fullmatch(f"trained biases, .*: {names[1]}", biases)
        and "biases of lora_B (lora_bias) were trained" in missing
    )
    with pytest.raises(UnsupportedError, match="DoRA"):
        open_peft(tmp_path / "adapter")


def test_magnitudes_without_dora_are_refused(tmp_path: Path) -> None:
    """Either the configuration is wrong, and the pairs alone are another update, or the tensors don't belong here."""
    for number, settings in enumerate(({}, {"use_dora": False})):
        with pytest.raises(FormatError, match=r"holds DoRA magnitudes.*contradict.*Set use_dora to true") as caught:
            open_with(tmp_path / str(number), [f"{P}{Q0}.lora_magnitude_vector"], **settings)
        assert caught.value.tensor == f"{P}{Q0}.lora_magnitude_vector"


def test_more_names_than_can_be_compared(tmp_path: Path) -> None:
    names = [f"{P}model.layers.{layer}.{'x' * 500}.bias" for layer in range(200)]
    with pytest.raises(FormatError, match="200 tensors beside its pairs and 10000 modules_to_save"):
        open_with(tmp_path, names, modules_to_save=[f"module{number}" for number in range(10_000)])

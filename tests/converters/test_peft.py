"""Oracle: PEFT's own rules, through peft.utils.other.get_pattern_key and LoraConfig's documented scaling."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Sizes, adapter_config, pairs, save_adapter

from converters.adapters.patterns import first_matches
from converters.adapters.peft import PeftAdapter, open_peft
from converters.errors import FormatError

Q0 = "model.layers.0.self_attn.q_proj"
MODULES = Sizes().modules()


def _open(root: Path, *, ranks: dict[str, int] | None = None, **settings: Any) -> PeftAdapter:
    return open_peft(save_adapter(root / "adapter", pairs(MODULES, 3, ranks=ranks), adapter_config(**settings)))


def test_plain_scaling_is_alpha_over_r(tmp_path: Path) -> None:
    assert _open(tmp_path).pairs[Q0].scaling == 8 / 4


def test_rslora_divides_by_the_root(tmp_path: Path) -> None:
    assert _open(tmp_path, use_rslora=True, lora_alpha=2.5).pairs[Q0].scaling == 2.5 / math.sqrt(4)


def test_the_first_matching_pattern_wins_and_rank_and_alpha_are_separate(tmp_path: Path) -> None:
    ranks = {module: 2 for module in MODULES if module.endswith("q_proj")}
    adapter = _open(
        tmp_path, ranks=ranks, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.0\..*": 16, "q_proj": 3}
    )
    assert adapter.pairs[Q0].rank == 2
    assert adapter.pairs[Q0].scaling == 16 / 2
    assert adapter.pairs["model.layers.1.self_attn.q_proj"].scaling == 3 / 2
    assert adapter.pairs["model.layers.1.self_attn.k_proj"].scaling == 8 / 4


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj", "proj"],
        ["self_attn.q_proj"],
        ["model.layers.0.self_attn.q_proj"],
        [r"model\.layers\.1\..*"],
        [r".*\.(k|v)_proj", "v_proj"],
        ["_proj"],
        ["^model.layers.0.self_attn.q_proj"],
        ["layers.[01].mlp.up_proj", r"\w+"],
        ["up_proj|down_proj"],
    ],
)
def test_patterns_match_as_in_peft(patterns: list[str]) -> None:
    other = pytest.importorskip("peft.utils.other")
    found = first_matches(patterns, list(MODULES), Path())
    for module in MODULES:
        assert found.get(module, module) == other.get_pattern_key(patterns, module)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (".lora_A.weight", ".lora_A.default.weight"),
        ("base_model.model.model.", "base_model.model.model.language_model."),
        ("base_model.model.model.", "base_model.model.language_model.model."),
        ("base_model.model.model.", "model."),
    ],
)
def test_other_spellings_of_the_same_keys(before: str, after: str, tmp_path: Path) -> None:
    tensors = pairs(MODULES, 3)
    renamed = {name.replace(before, after): tensor for name, tensor in tensors.items()}
    if "lora_A" in before:
        renamed = {name.replace(".lora_B.weight", ".lora_B.default.weight"): t for name, t in renamed.items()}
    adapter = open_peft(save_adapter(tmp_path / "adapter", renamed, adapter_config()))
    assert set(adapter.pairs) == set(MODULES)
    a, b = adapter.load(Q0)
    assert torch.equal(a, tensors[f"base_model.model.{Q0}.lora_A.weight"])
    assert torch.equal(b, tensors[f"base_model.model.{Q0}.lora_B.weight"])


def test_modules_come_in_natural_order(tmp_path: Path) -> None:
    modules = Sizes(layers=12).modules()
    adapter = open_peft(save_adapter(tmp_path / "adapter", pairs(modules, 3), adapter_config()))
    layers = [int(name.split(".")[2]) for name in adapter.pairs]
    assert layers == sorted(layers)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    tensors = pairs(MODULES, 3)
    name = f"base_model.model.{Q0}.lora_A.weight"
    tensors[name.replace(".weight", ".other.weight")] = tensors[name].clone()
    with pytest.raises(FormatError, match="several adapters"):
        open_peft(save_adapter(tmp_path / "adapter", tensors, adapter_config()))


def test_a_rank_may_be_a_whole_float(tmp_path: Path) -> None:
    assert _open(tmp_path, r=4.0).pairs[Q0].rank == 4


@pytest.mark.parametrize("rank", [4.5, True, float("nan"), -4.0, 1e300, "4", None])
def test_other_ranks_are_refused(rank: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="expected a positive whole number"):
        _open(tmp_path, r=rank)


@pytest.mark.parametrize("key", ["target_parameters", "modules_to_save"])
@pytest.mark.parametrize("value", ["lm_head", [1], [""], {"lm_head": 1}, ["x" * 1001], ["x"] * 10_001])
def test_lists_of_names_that_are_none(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=key):
        _open(tmp_path, **{key: value})


def test_a_bias_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="bias is 'some', expected one of none, all, lora_only"):
        _open(tmp_path, bias="some")


def test_aloras_tokens_are_read(tmp_path: Path) -> None:
    assert _open(tmp_path, alora_invocation_tokens=[1, 2, 3]).invocation_tokens == (1, 2, 3)


def test_the_fingerprint_sees_the_configuration_and_the_tensors(tmp_path: Path) -> None:
    first = _open(tmp_path / "a").fingerprint()
    assert first == _open(tmp_path / "b").fingerprint()
    assert first != _open(tmp_path / "c", lora_alpha=9).fingerprint()
    tensors = pairs(MODULES, 3)
    tensors[f"base_model.model.{Q0}.lora_B.weight"][0, 0] += 1
    save_adapter(tmp_path / "d", tensors, json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text()))
    assert first != open_peft(tmp_path / "d").fingerprint()

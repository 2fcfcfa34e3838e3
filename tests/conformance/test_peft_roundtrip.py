"""Our PEFT directories in PEFT. Oracle: PEFT's loader and PEFT's merge, and the dense formula for B'."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
from conformance import peft_side, reference
from conformance.families import Family
from safetensors.torch import load_file

from safelora_gguf import Selection, project_adapter

pytestmark = pytest.mark.conformance

KINDS = ["plain", "rslora", "alpha_pattern", "rank_pattern", "all_at_once"]


def project(family: Family, kind: str, target: Path, outtype: str = "f32") -> Mapping[str, reference.Dense]:
    """Projects the half with the smaller cosines; what the dense formula makes of each module."""
    dense = reference.dense_project(family.base, family.aligned, family.adapters[kind])
    selection = Selection("number", len(dense) // 2)
    project_adapter(
        family.base, family.aligned, family.adapters[kind], target, selection=selection, outtype=outtype, device="cpu"
    )
    return dense


def scaling(kind: str, module: str, rank: int) -> float:
    """PEFT's rule for one of `peft_side.KINDS`: alpha of the first pattern that matches, over r or its root."""
    options: Mapping[str, Any] = peft_side.KINDS[kind]
    patterns = options.get("alpha_pattern", {})
    alpha = next((value for pattern, value in patterns.items() if re.search(rf"(^|\.){pattern}$", module)), 8)
    return alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
def test_loads_without_a_missing_or_unexpected_key(family: Family, tmp_path: Path, outtype: str) -> None:
    project(family, "all_at_once", tmp_path / "ours", outtype)
    adapted = peft.PeftModel.from_pretrained(peft_side.load_model(family.aligned), tmp_path / "ours")
    again = adapted.load_adapter(tmp_path / "ours", adapter_name="again")
    assert again.unexpected_keys == []
    assert [key for key in again.missing_keys if "lora_" in key and ".again." in key] == []
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert len(stored) == 2 * len(dict(peft_side.lora_layers(adapted)))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_delta(family: Family, tmp_path: Path, kind: str) -> None:
    """W_merged - W = scaling B' A, B' the dense C B for the smaller half of the cosines and B for the others."""
    dense = project(family, kind, tmp_path / "ours")
    chosen = sorted(dense, key=lambda name: dense[name].cosine)[: len(dense) // 2]
    before = load_file(family.aligned / "model.safetensors")
    adapted = peft.PeftModel.from_pretrained(peft_side.load_model(family.aligned).double(), tmp_path / "ours")
    merged = adapted.merge_and_unload().state_dict()
    for name, module in dense.items():
        b = module.projected_b if name in chosen else module.b
        delta = reference.float64(merged[f"{name}.weight"]) - reference.float64(before[f"{name}.weight"])
        expected = scaling(kind, name, len(module.a)) * b @ module.a
        assert reference.relative_error(delta, expected) < 1e-5, name


def test_unprojected_pairs_keep_their_bits(family: Family, tmp_path: Path) -> None:
    dense = project(family, "rslora", tmp_path / "ours")
    chosen = sorted(dense, key=lambda name: dense[name].cosine)[: len(dense) // 2]
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    theirs = load_file(family.adapters["rslora"] / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    changed = {key for key in theirs if not ours[key].equal(theirs[key])}
    assert changed == {f"base_model.model.{name}.lora_B.weight" for name in chosen}

"""Vision-language adapters, whose vision pairs llama.cpp has no place for. Oracles: the names and values that PEFT
saves, its own merge, Safe LoRA's formula in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conformance import feature_truth, peft_side, reference
from conformance.families import Family
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from converters.errors import UnsupportedError
from safelora_gguf import Selection, convert_adapter, project_adapter

pytestmark = pytest.mark.conformance

WEIGHTS = "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj", "linear_1"]
CLASSES = ("gemma3-vision", "mistral3")
EXACT = 1e-6


@pytest.fixture(params=CLASSES)
def seeing(
    request: pytest.FixtureRequest, family_of: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, Path]:
    family = family_of(request.param)
    options = {"target_modules": TARGETS}
    return family, peft_side.save_adapter(family.aligned, tmp_path_factory.mktemp("adapter") / "adapter", options)


def pair_names(adapter: Path) -> tuple[set[str], set[str]]:
    """The modules of the language model that PEFT saved pairs for, and the others."""
    names = [key.removeprefix("base_model.model.") for key in load_file(adapter / WEIGHTS)]
    modules = {name.partition(".lora_")[0] for name in names}
    text = {name for name in modules if ".language_model." in name}
    assert text and modules - text
    return text, modules - text


def published(model: Path, copy: Path) -> Path:
    """Under the names of transformers 4, which published files have: Gemma 3's vision tower has a level more."""
    tensors = load_file(model / "model.safetensors")
    shutil.copytree(model, copy)
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in tensors.items()}
    save_file(renamed, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_into_gguf_goes_the_language_model_and_the_rest_is_told(seeing: tuple[Family, Path], tmp_path: Path) -> None:
    family, adapter = seeing
    text, others = pair_names(adapter)
    out = tmp_path / "ours.gguf"
    bases = family.aligned, family.aligned / "config.json"
    reports = [convert_adapter(adapter, out, base=base, force=True) for base in bases]
    reports.append(project_adapter(family.base, family.aligned, adapter, tmp_path / "projected.gguf", device="cpu"))
    for report in reports:
        (loss,) = report.losses
        assert loss.startswith(f"{len(others)} of {len(text) + len(others)} pairs are left out") and "merge" in loss
        assert set(loss.rpartition(": ")[2].split(", ")) == others and report.notes[0] == loss
        assert len(report.modules) == len(text)
    architecture = family.architecture.removesuffix("-vision")
    truth = feature_truth.in_gguf(architecture, feature_truth.merged(family.aligned, adapter))
    found = feature_truth.applied(out)
    assert len(found) == len(text) and len(truth) == len(text) + len(others)
    assert max(reference.relative_error(found[name], truth[name]) for name in found) < EXACT
    names = {tensor.name for tensor in GGUFReader(tmp_path / "projected.gguf").tensors}
    assert names == {f"{name}.lora_{half}" for name in found for half in "ab"}


def test_strict_refuses(seeing: tuple[Family, Path], tmp_path: Path) -> None:
    family, adapter = seeing
    with pytest.raises(UnsupportedError, match="language model in a file of its own"):
        convert_adapter(adapter, tmp_path / "ours.gguf", base=family.aligned, strict=True)
    assert list(tmp_path.iterdir()) == []


def test_vision_alone_is_refused(seeing: tuple[Family, Path], tmp_path: Path) -> None:
    family, adapter = seeing
    copy = Path(shutil.copytree(adapter, tmp_path / "vision"))
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if "language_model" not in name}, copy / WEIGHTS)
    with pytest.raises(UnsupportedError, match="language model in a file of its own"):
        convert_adapter(copy, tmp_path / "ours.gguf", base=family.aligned)


def test_peft_to_peft_keeps_every_pair(seeing: tuple[Family, Path], tmp_path: Path) -> None:
    family, adapter = seeing
    report = convert_adapter(adapter, tmp_path / "peft", base=family.aligned, strict=True)
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "peft" / WEIGHTS)
    assert report.losses == () and before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_projection_of_every_pair(seeing: tuple[Family, Path], tmp_path: Path) -> None:
    check_projection(*seeing, seeing[0].base, seeing[0].aligned, tmp_path / "peft")


@pytest.mark.parametrize("seeing", ["gemma3-vision"], indirect=True)
def test_references_under_published_names(seeing: tuple[Family, Path], tmp_path: Path) -> None:
    base, aligned = (published(path, tmp_path / path.name) for path in (seeing[0].base, seeing[0].aligned))
    check_projection(*seeing, base, aligned, tmp_path / "peft")


def check_projection(family: Family, adapter: Path, base: Path, aligned: Path, out: Path) -> None:
    project_adapter(base, aligned, adapter, out, selection=Selection("all"), device="cpu", strict=True)
    models = [peft_side.load_model(path).state_dict() for path in (family.base, family.aligned)]
    before, after = load_file(adapter / WEIGHTS), load_file(out / WEIGHTS)
    assert before.keys() == after.keys()
    for module in set.union(*pair_names(adapter)):
        key = f"base_model.model.{module}.lora_"
        b, moved = (reference.float64(tensors[f"{key}B.weight"]) for tensors in (before, after))
        a, kept = (reference.float64(tensors[f"{key}A.weight"]) for tensors in (before, after))
        v = reference.float64(models[1][f"{module}.weight"]) - reference.float64(models[0][f"{module}.weight"])
        expected = reference.paper_operator(v) @ b @ a
        assert np.linalg.norm(moved @ kept - expected) < 1e-5 * np.linalg.norm(expected), module

"""DoRA as plain pairs. Oracle: PEFT makes, saves and merges the DoRA adapter; the exact decomposition in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conformance import peft_side, reference
from conformance.families import Family
from conformance.specs import PROJECTIONS
from safetensors.torch import load_file, save_file

from safelora_gguf import Error, convert_adapter

pytestmark = pytest.mark.conformance

RANK = 16


@pytest.fixture(scope="module")
def dora(family_of: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    return make_dora(family_of("llama"), tmp_path_factory.mktemp("dora"), list(PROJECTIONS), 14)


@pytest.fixture(scope="module")
def tables(family_of: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path]:
    return make_dora(family_of("llama"), tmp_path_factory.mktemp("tables"), ["q_proj", "embed_tokens", "lm_head"], 4)


def make_dora(family: Family, root: Path, targets: list[str], count: int) -> tuple[Family, Path]:
    options = {"use_dora": True, "alpha_pattern": {"q_proj": 3}, "target_modules": targets}
    adapter = peft_side.save_adapter(family.aligned, root / "adapter", options)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    magnitudes = [name for name in tensors if "lora_magnitude_vector" in name]
    assert len(magnitudes) == count
    for name in magnitudes:  # as training would move them
        tensors[name] = tensors[name] * (1 + 0.1 * torch.arange(len(tensors[name])).sin())
    save_file(tensors, file)
    return family, adapter


def merged_deltas(family: Family, adapter: Path) -> dict[str, np.ndarray]:
    before = load_file(family.aligned / "model.safetensors")
    model = peft.PeftModel.from_pretrained(peft_side.load_model(family.aligned).double(), adapter)
    after = model.merge_and_unload().state_dict()
    found = {name: reference.float64(after[name]) - reference.float64(before[name]) for name in before}
    return {name: delta for name, delta in found.items() if delta.any()}


@pytest.mark.parametrize("rank", [RANK, None])
@pytest.mark.parametrize(("made", "count"), [("dora", 14), ("tables", 4)])
def test_the_pairs_are_the_nearest_to_pefts_merge(
    made: str, count: int, rank: int | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    family, adapter = request.getfixturevalue(made)
    out = tmp_path / "plain"
    report = convert_adapter(adapter, out, base=family.aligned, rank=rank)
    exact, found = merged_deltas(family, adapter), merged_deltas(family, out)
    assert exact.keys() == found.keys() and len(exact) == count
    for module in report.modules:
        name = f"{module.key}.weight"
        values = np.linalg.svd(exact[name], compute_uv=False)
        fewest = next(k for k in range(len(values) + 1) if np.linalg.norm(values[k:]) <= 0.01 * np.linalg.norm(values))
        assert module.rank == (RANK if rank else fewest)
        best = np.linalg.norm(values[module.rank :]) / np.linalg.norm(values)
        error = reference.relative_error(found[name], exact[name])
        assert error == pytest.approx(best, rel=1e-3, abs=1e-5)
        assert any(module.key in note and f"{best:.2%}" in note for note in report.notes)


@pytest.mark.parametrize("made", ["dora", "tables"])
def test_into_gguf_with_another_rank_in_every_module(made: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    family, adapter = request.getfixturevalue(made)
    report = convert_adapter(adapter, tmp_path / "out.gguf", base=family.aligned)
    assert len({module.rank for module in report.modules}) > 1
    back = tmp_path / "back"
    convert_adapter(tmp_path / "out.gguf", back, base=family.aligned)
    exact, found = merged_deltas(family, adapter), merged_deltas(family, back)
    assert all(reference.relative_error(found[name], exact[name]) < 0.011 for name in exact)


def test_what_dora_needs_is_said(dora: tuple[Family, Path], tmp_path: Path) -> None:
    family, adapter = dora
    (tmp_path / "config.json").write_text((family.aligned / "config.json").read_text())
    with pytest.raises(Error, match=r"neither model\.safetensors nor"):
        convert_adapter(adapter, tmp_path / "out.gguf", base=tmp_path / "config.json")
    with pytest.raises(Error, match="rank 100000"):
        convert_adapter(adapter, tmp_path / "out.gguf", base=family.aligned, rank=100_000)
    with pytest.raises(Error, match="rank is for DoRA"):
        convert_adapter(family.adapters["plain"], tmp_path / "out.gguf", base=family.aligned, rank=4)


@pytest.mark.parametrize("defect", ["missing", "short", "stray"])
def test_magnitudes_that_do_not_fit(defect: str, dora: tuple[Family, Path], tmp_path: Path) -> None:
    family, adapter = dora
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_magnitude_vector" in name)
    if defect == "missing":
        del tensors[name]
    elif defect == "short":
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors[name.replace("layers.", "layers.9")] = tensors[name].clone()
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(Error, match=r"magnitudes|one for each"):
        convert_adapter(broken, tmp_path / "out.gguf", base=family.aligned)

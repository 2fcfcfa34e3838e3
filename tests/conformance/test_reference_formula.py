"""`project_adapter` against the reference's arithmetic. Oracle: `reference`, dense and in float64.

The inputs are what the files hold, so float16 and bfloat16 models are upcast before anything is computed, in the
oracle as in the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import models
import numpy as np
import pytest
import torch
from conformance import reference
from safetensors.torch import load_file

from safelora_gguf import ProjectReport, Selection, project_adapter

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALPHAS = {"q_proj": 3, r"layers\.1\.mlp\.(gate|up)_proj": 20}
RANKS = {"k_proj": 2, r"model\.layers\.0\.mlp\.down_proj": 7}
# Qwen 2 keeps its rows in GGUF, so that B can be read from either output.
KEPT_ROWS = "Qwen2ForCausalLM"


@dataclass(frozen=True)
class Case:
    base: Path
    aligned: Path
    adapter: Path
    dense: Mapping[str, reference.Dense]

    def project(self, out: Path, **options: Any) -> ProjectReport:
        return project_adapter(self.base, self.aligned, self.adapter, out, device="cpu", **options)


def make_case(root: Path, dtype: torch.dtype, **settings: Any) -> Case:
    """A model of two layers in `dtype`; `settings` of the adapter, `rank_pattern` obeyed by its tensors."""
    sizes = models.Sizes()
    trio = models.save_trio(root, sizes=sizes, dtype=dtype, architecture=KEPT_ROWS)
    adapter = trio.adapter
    if settings:
        down = "model.layers.0.mlp.down_proj"
        ranks = {name: 2 for name in sizes.modules() if name.endswith("k_proj")} | {down: 7}
        tensors = models.pairs(sizes.modules(), 4, ranks=ranks if "rank_pattern" in settings else None, dtype=dtype)
        adapter = models.save_adapter(root / "other", tensors, models.adapter_config(**settings))
    return Case(trio.base, trio.aligned, adapter, reference.dense_project(trio.base, trio.aligned, adapter))


@pytest.fixture(params=list(DTYPES))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return make_case(tmp_path, DTYPES[request.param])


def stored_b(out: Path) -> dict[str, np.ndarray]:
    tensors = load_file(out / "adapter_model.safetensors")
    return {key.split(".lora_B")[0].removeprefix("base_model.model."): reference.float64(tensor)
            for key, tensor in tensors.items() if ".lora_B" in key}  # fmt: skip


def check_b(found: Mapping[str, np.ndarray], case: Case, chosen: Sequence[str]) -> None:
    """C B for the chosen, to 1e-5; the very same B for the others."""
    assert found.keys() == case.dense.keys()
    for name, module in case.dense.items():
        if name in chosen:
            assert reference.relative_error(found[name], module.projected_b) < 1e-5, name
        else:
            assert np.array_equal(found[name], module.b), name


def lowest(case: Case, count: int) -> list[str]:
    return sorted(case.dense, key=lambda name: case.dense[name].cosine)[:count]


def natural(case: Case, report: ProjectReport) -> dict[str, Any]:
    """Module reports by checkpoint name, matched through the GGUF names that the report gives."""
    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    found = {module.name: module for module in report.modules}
    names = {name: f"blk.{name.split('.')[2]}.{short[name.split('.')[-1]]}.weight" for name in case.dense}
    assert sorted(names.values()) == sorted(found)
    return {name: found[names[name]] for name in names}


def test_all_modules(case: Case, tmp_path: Path) -> None:
    report = case.project(tmp_path / "out", selection=Selection("all"))
    assert report.projected == len(case.dense)
    check_b(stored_b(tmp_path / "out"), case, list(case.dense))


def test_cosines_and_norms(case: Case, tmp_path: Path) -> None:
    reports = natural(case, case.project(tmp_path / "out", selection=Selection("all")))
    for name, module in case.dense.items():
        assert abs(reports[name].cosine - module.cosine) < 1e-5, name
        before, after = (2 * np.linalg.norm(b @ module.a) for b in (module.b, module.projected_b))  # scaling 8 / 4
        assert abs(reports[name].delta_norm / before - 1) < 1e-5, name
        assert abs(reports[name].delta_norm_after / after - 1) < 1e-5, name


@pytest.mark.parametrize("count", [1, 6, 13])
def test_threshold(case: Case, tmp_path: Path, count: int) -> None:
    threshold = reference.between(case.dense, count)
    report = case.project(tmp_path / "out", selection=Selection("threshold", threshold))
    reports = natural(case, report)
    assert {name for name in reports if reports[name].projected} == set(lowest(case, count))
    check_b(stored_b(tmp_path / "out"), case, lowest(case, count))


@pytest.mark.parametrize("count", [0, 1, 10, 14])
def test_number(case: Case, tmp_path: Path, count: int) -> None:
    reports = natural(case, case.project(tmp_path / "out", selection=Selection("number", count)))
    assert {name for name in reports if reports[name].projected} == set(lowest(case, count))
    check_b(stored_b(tmp_path / "out"), case, lowest(case, count))


SETTINGS = [
    {"use_rslora": True},
    {"alpha_pattern": ALPHAS},
    {"rank_pattern": RANKS},
    {"use_rslora": True, "alpha_pattern": ALPHAS, "rank_pattern": RANKS, "alpha": 6.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["rslora", "alpha_pattern", "rank_pattern", "all"])
def test_scaling_does_not_change_the_projection(tmp_path: Path, settings: Mapping[str, Any]) -> None:
    """A PEFT output keeps its configuration, so B' is C B whatever the scaling is."""
    case = make_case(tmp_path, torch.bfloat16, **settings)
    case.project(tmp_path / "out", selection=Selection("number", 8))
    check_b(stored_b(tmp_path / "out"), case, lowest(case, 8))


@pytest.mark.parametrize("settings", SETTINGS, ids=["rslora", "alpha_pattern", "rank_pattern", "all"])
def test_gguf_folds_the_scaling_into_b(tmp_path: Path, settings: Mapping[str, Any]) -> None:
    """(alpha / r) B_stored = scaling B', the scaling written out here module by module."""
    case = make_case(tmp_path, torch.float16, **settings)
    case.project(tmp_path / "out.gguf", selection=Selection("number", 8))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {tensor.name: tensor.data.astype(np.float64) for tensor in reader.tensors}
    short = {"self_attn.q_proj": "attn_q", "mlp.up_proj": "ffn_up", "self_attn.k_proj": "attn_k",
             "mlp.down_proj": "ffn_down"}  # fmt: skip
    for name, module in case.dense.items():
        _, _, layer, kind = name.split(".", 3)
        if kind in short:
            b = module.projected_b if name in lowest(case, 8) else module.b
            stored = found[f"blk.{layer}.{short[kind]}.weight.lora_b"]
            expected = scaling(layer, kind, len(module.a), settings) * b
            assert reference.relative_error(alpha / len(module.a) * stored, expected) < 1e-5, name


def scaling(layer: str, kind: str, rank: int, settings: Mapping[str, Any]) -> float:
    alpha = settings.get("alpha", 8)
    if "alpha_pattern" in settings and kind == "self_attn.q_proj":
        alpha = 3
    if "alpha_pattern" in settings and (layer, kind) in (("1", "mlp.gate_proj"), ("1", "mlp.up_proj")):
        alpha = 20
    return float(alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank)


def save_single(root: Path, base: torch.Tensor, aligned: torch.Tensor, r: int) -> Case:
    """A model that is one weight (down_proj), and a pair for it; both references in the tensors' type."""
    out, into = base.shape
    module = "model.layers.0.mlp.down_proj"
    settings = models.config(models.Sizes(hidden=out, ffn=into, layers=1), KEPT_ROWS)
    paths = [models.save_model(root / role, {f"{module}.weight": weight}, settings)
             for role, weight in (("base", base), ("aligned", aligned))]  # fmt: skip
    tensors = models.pairs({module: (out, into)}, 5, r=r, dtype=base.dtype)
    return Case(*paths, models.save_adapter(root / "adapter", tensors, models.adapter_config(r=r)), {})


@pytest.mark.parametrize("name", list(DTYPES))
def test_a_large_weight(tmp_path: Path, name: str) -> None:
    """2048 x 5632, TinyLlama's down_proj, where float32 sums begin to show."""
    generator = torch.Generator().manual_seed(6)
    base = (0.02 * torch.randn(2048, 5632, generator=generator)).to(DTYPES[name])
    moved = base.float() + 5e-4 * torch.randn(2048, 5632, generator=generator)
    moved += 1e-3 * torch.randn(2048, 2, generator=generator) @ torch.randn(2, 5632, generator=generator)
    case = save_single(tmp_path, base, moved.to(DTYPES[name]), r=16)
    report = case.project(tmp_path / "out", selection=Selection("all"))
    (module,) = reference.dense_project(case.base, case.aligned, case.adapter).values()
    (b,) = stored_b(tmp_path / "out").values()
    assert reference.relative_error(b, module.projected_b) < 1e-5
    assert abs(report.modules[0].cosine - module.cosine) < 1e-5


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def with_spectrum(shape: tuple[int, int], k: int, gap: float) -> torch.Tensor:
    """A matrix whose singular values fall slowly, but for a step of `gap` (in units of the first) behind the k-th."""
    size = min(shape)
    values = 1 - 0.1 * torch.arange(size, dtype=torch.float64) / size
    values[k:] -= gap
    return orthonormal(shape[0], size, 7) * values @ orthonormal(shape[1], size, 8).T


# Above 256 the package iterates, below it decomposes at once; tall and wide weights take different ways.
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (300, 420), (420, 300)])
@pytest.mark.parametrize("gap", [0.3, 0.01])
def test_subspace(tmp_path: Path, shape: tuple[int, int], gap: float) -> None:
    """Against numpy.linalg.svd in float64, down to the smallest gap that is promised: 1 % of the first value."""
    base = 0.001 * torch.randn(*shape, generator=torch.Generator().manual_seed(9))
    aligned = (base.double() + with_spectrum(shape, 6, gap)).float()
    case = save_single(tmp_path, base, aligned, r=4)
    report = case.project(tmp_path / "out", operator="subspace", rank=6)
    (module,) = reference.dense_project(case.base, case.aligned, case.adapter, rank=6).values()
    (b,) = stored_b(tmp_path / "out").values()
    assert reference.relative_error(b, module.projected_b) < 1e-5
    assert abs(report.modules[0].cosine - module.cosine) < 1e-5


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_subspace_of_small_models(tmp_path: Path, dtype: str) -> None:
    """Three directions stand above the noise in every matrix of these models."""
    case = make_case(tmp_path, DTYPES[dtype])
    dense = reference.dense_project(case.base, case.aligned, case.adapter, rank=3)
    reports = natural(case, case.project(tmp_path / "out", operator="subspace", rank=3))
    found = stored_b(tmp_path / "out")
    for name, module in dense.items():
        assert reference.relative_error(found[name], module.projected_b) < 1e-5, name
        assert abs(reports[name].cosine - module.cosine) < 1e-5, name

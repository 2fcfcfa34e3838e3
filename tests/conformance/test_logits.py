"""Our GGUF adapters in llama.cpp. Oracle: the logits of PEFT's own forward pass on the same tokens.

The model is an F32 GGUF by upstream's converter, and llama.cpp computes in F32 (no flash attention, F32 caches), so
that what differs is the adapter. The product promises 0.02; with all arithmetic in F32 the measured difference is
under 1e-4 where the adapter moves logits by units, so 1e-3 is what the tests allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import peft_side, reference
from conformance.families import Family, Logits, Upstream
from conformance.specs import MORE

from safelora_gguf import ProjectReport, Selection, project_adapter

pytestmark = [pytest.mark.llama, pytest.mark.conformance]

F32_BOUND = 1e-3
# Narrow types: llama.cpp rounds the activations that meet them to the same type. Measured over all kinds and
# architectures, where the adapters move logits by 3 to 14: F16 0.011, BF16 0.13, Q8_0 (r = 32, plain) 0.051.
NARROW_BOUNDS = {"f16": 0.05, "bf16": 0.25, "q8_0": 0.1}

# A value half way between two entries of ggml's GELU table may be rounded to the other one, and Falcon norms nothing
# behind it: measured 2e-4 with the adapters, 1.2e-3 without.
FALCON_BOUND = 5e-3

OTHERS = [(architecture, kind) for architecture in MORE for kind in peft_side.kinds_of(architecture)]
KINDS = ["plain", "rslora", "alpha_pattern", "rank_pattern", "all_at_once", "embeddings"]


def distance(left: np.ndarray, right: np.ndarray) -> float:
    assert left.shape == right.shape
    return float(np.abs(left - right).max())


def logits_as_ggml(model: Any) -> np.ndarray:
    return peft_side.logits_of(peft_side.with_ggml_gelu(model))


def expected(family: Family, kind: str) -> np.ndarray:
    """PEFT's logits, after a check that the adapter matters."""
    alone = peft_side.logits_of(peft_side.load_model(family.aligned))
    adapted = logits_as_ggml(peft_side.load_adapted(family.aligned, family.adapters[kind]))
    assert distance(alone, adapted) >= 1, "the adapter hardly moves the logits, so nothing would be proved"
    return adapted


def test_model_without_adapter(family: Family, upstream: Upstream, llama_logits: Logits) -> None:
    """The ground the other tests stand on: model and tokens are the same on both sides."""
    alone = peft_side.logits_of(peft_side.load_model(family.aligned))
    assert alone.std() > 1, "the logits are too flat to tell anything"
    assert distance(llama_logits(upstream.model, None), alone) < F32_BOUND


@pytest.mark.parametrize("architecture", peft_side.ALL_KINDS)
def test_other_models_without_adapter(
    architecture: str,
    family_of: Callable[[str], Family],
    upstream_of_others: Mapping[str, Upstream],
    llama_logits: Logits,
) -> None:
    alone = logits_as_ggml(peft_side.load_model(family_of(architecture).aligned))
    assert alone.std() > 1, "the logits are too flat to tell anything"
    assert distance(llama_logits(upstream_of_others[architecture].model, None), alone) < F32_BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_f32(family: Family, upstream: Upstream, llama_logits: Logits, kind: str) -> None:
    assert distance(llama_logits(upstream.model, family.convert(kind)), expected(family, kind)) < F32_BOUND


@pytest.mark.parametrize(("architecture", "kind"), OTHERS)
def test_other_architectures(
    architecture: str,
    kind: str,
    family_of: Callable[[str], Family],
    upstream_of_others: Mapping[str, Upstream],
    llama_logits: Logits,
) -> None:
    family = family_of(architecture)
    found = llama_logits(upstream_of_others[architecture].model, family.convert(kind))
    bound = FALCON_BOUND if architecture.startswith("falcon") else F32_BOUND
    assert distance(found, expected(family, kind)) < bound


@pytest.mark.parametrize(
    ("kind", "outtype"),
    [("plain", "f16"), ("all_at_once", "f16"), ("plain", "bf16"), ("all_at_once", "bf16"), ("plain_r32", "q8_0")],
)
def test_conversion_narrow(family: Family, upstream: Upstream, llama_logits: Logits, kind: str, outtype: str) -> None:
    found = llama_logits(upstream.model, family.convert(kind, outtype))
    assert distance(found, expected(family, kind)) < NARROW_BOUNDS[outtype]


def project(family: Family, kind: str, threshold: float, target: Path) -> ProjectReport:
    """Our projection with a threshold that leaves some modules alone."""
    selection = Selection("threshold", threshold)
    report = project_adapter(
        family.base, family.aligned, family.adapters[kind], target, selection=selection, device="cpu"
    )
    assert 0 < report.projected < report.total
    return report


def with_dense_b(family: Family, kind: str, new: Mapping[str, np.ndarray]) -> np.ndarray:
    """PEFT's logits with these matrices in the place of B."""
    adapted = peft_side.load_adapted(family.aligned, family.adapters[kind])
    with peft_side.replaced_b(adapted, {name: torch.from_numpy(b) for name, b in new.items()}):
        return peft_side.logits_of(adapted)


@pytest.mark.parametrize("kind", ["plain", "all_at_once"])
def test_projection(family: Family, upstream: Upstream, llama_logits: Logits, tmp_path: Path, kind: str) -> None:
    """Three ways to the same logits: our GGUF in llama.cpp, our PEFT directory in PEFT, the dense B' in PEFT."""
    dense = reference.dense_project(family.base, family.aligned, family.adapters[kind])
    threshold = reference.between(dense, len(dense) // 2)
    low = {name: module for name, module in dense.items() if module.cosine <= threshold}
    truth = with_dense_b(family, kind, {name: module.projected_b for name, module in low.items()})
    nothing = with_dense_b(family, kind, {name: 0 * module.b for name, module in low.items()})
    assert distance(truth, expected(family, kind)) > 0.5, "the projection hardly matters"
    assert distance(truth, nothing) > 0.1, "the projection can't be told from dropping the modules"

    project(family, kind, threshold, tmp_path / "ours.gguf")
    project(family, kind, threshold, tmp_path / "ours")
    in_peft = peft_side.logits_of(peft_side.load_adapted(family.aligned, tmp_path / "ours"))
    assert distance(in_peft, truth) < F32_BOUND
    assert distance(llama_logits(upstream.model, tmp_path / "ours.gguf"), truth) < F32_BOUND

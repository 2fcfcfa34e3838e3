"""GGUF models and adapters as sources. Oracles: upstream's converters wrote them, PEFT merges what we make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
from conformance import peft_side, reference
from conformance.families import Family, Upstream
from gguf import GGUFReader
from safetensors.torch import load_file

from safelora_gguf import Selection, project_adapter

pytestmark = pytest.mark.conformance


@pytest.mark.parametrize("kind", ["plain", "rank_pattern", "embeddings"])
def test_upstreams_adapter_as_a_peft_directory_merges_as_the_original(
    kind: str, family: Family, upstream_of: Callable[[str], Upstream], tmp_path: Path
) -> None:
    """Rows go back into Hugging Face's order, and the configuration that we write means what GGUF's alpha meant."""
    source = upstream_of(family.architecture).adapters[kind, "f32"]
    out = tmp_path / "peft"
    project_adapter(family.base, family.aligned, source, out, selection=Selection("number", 0), device="cpu")
    merged = [
        peft.PeftModel.from_pretrained(peft_side.load_model(family.aligned).double(), adapter)
        .merge_and_unload()
        .state_dict()
        for adapter in (out, family.adapters[kind])
    ]
    before = load_file(family.aligned / "model.safetensors")
    changed = 0
    for name, weight in before.items():
        ours, theirs = (reference.float64(state[name]) - reference.float64(weight) for state in merged)
        if theirs.any():
            changed += 1
            assert reference.relative_error(ours, theirs) < 1e-5, name
        else:
            assert not ours.any(), name
    assert changed >= 14


def test_upstreams_model_as_a_reference_is_the_checkpoint(family: Family, upstream: Upstream, tmp_path: Path) -> None:
    """A base checkpoint, upstream's GGUF of the aligned model: the same projection as from two checkpoints."""
    found = []
    for name, aligned in (("ours", family.aligned), ("upstream", upstream.model)):
        out = tmp_path / f"{name}.gguf"
        selection = Selection("number", 7)
        report = project_adapter(family.base, aligned, family.adapters["plain"], out, selection=selection, device="cpu")
        found.append({module.name: module.cosine for module in report.modules if module.projected})
    assert len(found[0]) == 7
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    ours, theirs = ({tensor.name: tensor.data for tensor in GGUFReader(tmp_path / f"{name}.gguf").tensors}
                    for name in ("ours", "upstream"))  # fmt: skip
    for name, values in ours.items():
        assert reference.relative_error(theirs[name], values.astype(np.float64)) < 1e-6

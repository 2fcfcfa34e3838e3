"""Our GGUF adapters against llama.cpp's convert_lora_to_gguf.py. Oracle: its file, tensor by tensor, bit by bit.

Where upstream is known to be wrong (rsLoRA and alpha_pattern: GGUF has one alpha for all, and upstream writes
lora_alpha whatever it means) the oracle is PEFT's own delta, and upstream must differ, or the trap is gone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from conformance import peft_side, reference
from conformance.families import SAME, Family, Upstream
from conformance.gguf_side import deltas, facts, rotary_rows, tensors

pytestmark = pytest.mark.conformance

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def peft_deltas(family: Family, kind: str) -> Mapping[str, np.ndarray]:
    """PEFT's own deltas in llama.cpp's names and row order."""
    adapted = peft_side.load_adapted(family.aligned, family.adapters[kind])
    layers = dict(peft_side.lora_layers(adapted))
    result = {}
    for layer in range(2):
        for short, module in MODULES.items():
            delta = reference.float64(layers[f"model.layers.{layer}.{module}"].get_delta_weight("default").detach())
            heads = {"attn_q": 4, "attn_k": 2}.get(short)
            rotated = family.architecture == "llama" and heads is not None
            result[f"blk.{layer}.{short}.weight"] = delta[rotary_rows(len(delta), heads)] if rotated else delta
    return result


@pytest.mark.parametrize(("kind", "outtype"), SAME)
def test_same_tensors(family: Family, upstream: Upstream, kind: str, outtype: str) -> None:
    ours, theirs = tensors(family.convert(kind, outtype)), tensors(upstream.adapters[kind, outtype])
    assert ours.keys() == theirs.keys()
    assert {name: ours[name][:2] for name in ours} == {name: theirs[name][:2] for name in theirs}
    assert [name for name in ours if ours[name][2] != theirs[name][2]] == []


@pytest.mark.parametrize(("kind", "outtype"), SAME)
def test_same_meaning(family: Family, upstream: Upstream, kind: str, outtype: str) -> None:
    assert facts(family.convert(kind, outtype)) == facts(upstream.adapters[kind, outtype])


@pytest.mark.parametrize("kind", ["rslora", "alpha_pattern", "all_at_once", "rank_pattern", "plain"])
def test_our_strength_is_pefts(family: Family, kind: str) -> None:
    ours, truth = deltas(family.convert(kind)), peft_deltas(family, kind)
    assert ours.keys() == truth.keys()
    assert max(reference.relative_error(ours[name], truth[name]) for name in truth) < 1e-6


@pytest.mark.parametrize("kind", ["rslora", "alpha_pattern"])
def test_upstream_has_another_strength(family: Family, upstream: Upstream, kind: str) -> None:
    """The reason why we fold the scaling into B; should upstream learn it, these kinds join SAME."""
    theirs, truth = deltas(upstream.adapters[kind, "f32"]), peft_deltas(family, kind)
    assert max(reference.relative_error(theirs[name], truth[name]) for name in truth) > 0.2

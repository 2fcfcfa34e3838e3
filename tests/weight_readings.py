"""What is read to capture inputs of the models that `llama_models` makes, and how near two captures are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama_models import Kind

from safelora_gguf.smoke.protocol import Reading

ATTENTION = ["blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.attn_output.weight"]
FEED_FORWARD = ["blk.2.ffn_gate.weight", "blk.2.ffn_up.weight", "blk.2.ffn_down.weight"]
STATE = [
    "blk.0.ssm_in.weight",
    "blk.2.ssm_in.weight",
    "blk.2.ssm_x.weight",
    "blk.2.ssm_dt.weight",
    "blk.2.ssm_out.weight",
]
WEIGHTS: dict[Kind, list[str]] = {
    "llama": ATTENTION + FEED_FORWARD,
    "gemma3": ATTENTION + FEED_FORWARD,
    "mamba": STATE,
    "jamba": STATE + ATTENTION + FEED_FORWARD,
}
START = (5, 90, 41, 260, 77)


def readings(lengths: Sequence[int], start: Sequence[int] = START, *, seed: int = 3) -> list[Reading]:
    """Sequences of one beginning, every third token kept of the even ones, the last five of the others."""
    random = np.random.default_rng(seed)
    found = []
    for number, length in enumerate(lengths):
        tokens = (*start, *random.integers(3, 340, length).tolist())
        keep = range(number % 3, len(tokens), 3) if number % 2 == 0 else range(len(tokens) - 5, len(tokens))
        found.append(Reading(tokens, tuple(keep)))
    return found


def error(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def changed(file: Path, name: str, change: Any) -> Path:
    """The file with a tensor's values changed in place."""
    reader = gguf.GGUFReader(file, "r+")
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == name)
    change(tensor.data)
    tensor.data.flush()
    return file

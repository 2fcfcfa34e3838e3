"""Whether all methods of a benchmark found the same: one that compares different results is void.

Cosines, the choice of modules and the projected B are compared, B as it stands in the written files. The GGUF
file's names and llama.cpp's row order of queries and keys are undone independently of the package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from bench_gguf import module_of, peft_rows
from bench_methods import Outcome
from bench_models import Shape
from gguf import GGUFReader
from safetensors.numpy import load_file

TOLERANCE = 1e-4

_PREFIX = "base_model.model."


class DisagreementError(Exception):
    """The methods' results differ."""


def check(outcomes: Mapping[str, Outcome], ours: Path, dense: Path, shape: Shape) -> dict[str, float]:
    """The largest differences of all cosines (absolute) and all projected B (Frobenius-relative).

    Raises:
        DisagreementError: one is over `TOLERANCE`, or other modules were chosen.
    """
    cosines, chosen = {}, {}
    for method, outcome in outcomes.items():
        cosines[method] = {module_of(name): value for name, value in outcome.cosines.items()}
        chosen[method] = {module_of(name) for name in outcome.projected}
    own = cosines["ours"]
    for method, found in cosines.items():
        if found.keys() != own.keys() or chosen[method] != chosen["ours"]:
            different = sorted((found.keys() ^ own.keys()) | (chosen[method] ^ chosen["ours"]))
            raise DisagreementError(f"ours and {method} chose differently: {', '.join(different[:5])}")
    errors = {"cosine": max(abs(found[name] - own[name]) for found in cosines.values() for name in own)}
    errors["B"] = _largest_error(_read_gguf(ours, shape), load_file(dense), chosen["ours"])
    for what, error in errors.items():
        if not error <= TOLERANCE:
            raise DisagreementError(f"{what} differs by {error:.2g}, and {TOLERANCE:g} is allowed")
    return errors


def _largest_error(ours: Mapping[str, np.ndarray], dense: Mapping[str, np.ndarray], chosen: set[str]) -> float:
    errors = [0.0]
    for module in ours.keys() | chosen:
        expected = dense[f"{_PREFIX}{module}.lora_B.weight"].astype(np.float64)
        errors.append(float(np.linalg.norm(ours[module] - expected) / np.linalg.norm(expected)))
    return max(errors)


def _read_gguf(path: Path, shape: Shape) -> dict[str, np.ndarray]:
    """Every lora_b by PEFT module, rows in PEFT's order."""
    heads = {"attn_q": shape.heads, "attn_k": shape.key_value_heads}
    found = {}
    for tensor in GGUFReader(path).tensors:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight\.lora_b", tensor.name)
        if match is None:
            continue
        b = np.array(tensor.data, dtype=np.float64)
        if match[2] in heads:
            b = peft_rows(b, heads[match[2]])
        found[module_of(tensor.name.removesuffix(".lora_b"))] = b
    return found

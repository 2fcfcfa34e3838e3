"""Safe LoRA's arithmetic as its paper writes it: dense, in float64, every matrix formed.

    V = W_aligned - W_base      C = V V^T / ||V||_F      cos = <C dW, dW> / (||C dW|| ||dW||), dW = B A

and B becomes C B where cos is small. Written from the paper (arXiv 2405.16833), sharing nothing with the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Dense:
    """One module: A (r, in), B (out, r), C B, and the cosine of C B A with B A; all float64."""

    a: np.ndarray
    b: np.ndarray
    projected_b: np.ndarray
    cosine: float


def paper_operator(v: np.ndarray) -> np.ndarray:
    return v @ v.T / np.linalg.norm(v)


def subspace_operator(v: np.ndarray, k: int) -> np.ndarray:
    u = np.linalg.svd(v)[0][:, :k]
    return u @ u.T


def flat_cosine(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left.ravel(), right.ravel()
    return float(left @ right / np.sqrt(left @ left) / np.sqrt(right @ right))


def float64(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(tensor.to(torch.float64).numpy())


def dense_project(base: Path, aligned: Path, adapter: Path, rank: int | None = None) -> Mapping[str, Dense]:
    """Every linear module of an adapter directory by name; with `rank` the subspace operator instead of the paper's."""
    before, after = load_file(base / "model.safetensors"), load_file(aligned / "model.safetensors")
    pairs = load_file(adapter / "adapter_model.safetensors")
    result = {}
    for key in pairs:
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = float64(pairs[key]), float64(pairs[key.replace("lora_A", "lora_B")])
        v = float64(after[f"{module}.weight"]) - float64(before[f"{module}.weight"])
        operator = paper_operator(v) if rank is None else subspace_operator(v, rank)
        delta = b @ a
        result[module] = Dense(a, b, operator @ b, flat_cosine(operator @ delta, delta))
    return result


def between(modules: Mapping[str, Dense], below: int) -> float:
    """A threshold with `below` cosines under it, halfway to the next, and far from both."""
    cosines = sorted(module.cosine for module in modules.values())
    low, high = cosines[below - 1], cosines[below]
    assert high - low > 1e-4, "two cosines too close to tell apart"
    return (low + high) / 2


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))

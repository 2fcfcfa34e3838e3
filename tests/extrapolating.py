"""`extrapolate` run on the packaged family, LoX's formula with numpy's dense SVD in float64, and files read without our
readers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from safelora_gguf.cli import app

FAMILY = Path(__file__).parents[1] / "safelora_gguf" / "tiny_family"
BASE, ALIGNED, GGUF = FAMILY / "base", FAMILY / "aligned", FAMILY / "aligned.gguf"
Arrays = Mapping[str, np.ndarray]


def run(base: Path, aligned: Path, out: Path, *more: object) -> dict[str, Any]:
    command = ["extrapolate", "--base", base, "--aligned", aligned, "--out", out, "--json", "--device", "cpu", *more]
    result = CliRunner().invoke(app, list(map(str, command)))
    told = json.loads(result.stdout) if result.stdout.startswith("{") else {"error": {"message": result.stderr}}
    return {"exit": result.exit_code, **told}


def model(out: Path, *more: object, base: Path = BASE, aligned: Path = ALIGNED) -> dict[str, Any]:
    return run(base, aligned, out, "--as", "model", *more)


def refused(told: Mapping[str, Any], status: int, *words: str) -> None:
    assert told["exit"] == status, told
    for word in words:
        assert word in told["error"]["message"], told["error"]["message"]


def float64(directory: Path) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for file in sorted(directory.glob("*.safetensors"))
            for name, tensor in load_file(file).items()}  # fmt: skip


def in_gguf(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in gguf.GGUFReader(path).tensors}  # fmt: skip


def lox(before: np.ndarray, after: np.ndarray, rank: int = 6, coef: float = 1.25) -> np.ndarray:
    """W_lox by the paper's formula; rank 0 takes all of V."""
    v = after - before
    if rank:
        u, s, w = np.linalg.svd(v, full_matrices=False)
        v = (u[:, :rank] * s[:rank]) @ w[:rank]
    return after + coef * v


def formula(before: Arrays, after: Arrays, **options: Any) -> dict[str, np.ndarray]:
    return {name: lox(before[name], value, **options) if value.ndim == 2 else value for name, value in after.items()}


def worst(found: Arrays, wanted: Arrays) -> float:
    assert found.keys() == wanted.keys()
    return max(float(np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])) for name in wanted)


def as_float32(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    save_file({name: t.float() for name, t in load_file(source / "model.safetensors").items()},
              target / "model.safetensors", {"format": "pt"})  # fmt: skip
    return target


def listing(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}

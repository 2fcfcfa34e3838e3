"""`repair` on the packaged family with few prompts, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from typer.testing import CliRunner, Result

from safelora_gguf.cli import app

FAMILY = Path(__file__).parents[1] / "safelora_gguf" / "tiny_family"
LIMIT = 10
"""Prompts of each kind: as many topics, and as few as the first-token score can be calibrated on."""

FAST = ("--limit", LIMIT, "--max-tokens", 28, "--tokens", 600)


def arguments(out: Path | str, *more: object, judged: bool = True, **other: Path) -> list[str]:
    files = {"model": FAMILY / "aligned.gguf", "adapter": FAMILY / "adapter", "prompts": FAMILY / "calibration.jsonl"}
    files |= {"judge-prompts": FAMILY / "prompts.jsonl"} if judged else {}
    given = [word for name, path in (files | other).items() for word in (f"--{name}", path)]
    return [str(word) for word in ("repair", *given, "--out", out, "--threads", 1, *FAST, *more)]


def repair(out: Path | str, *more: object, judged: bool = True, **other: Path) -> Result:
    return CliRunner().invoke(app, arguments(out, *more, judged=judged, **other))


def told(result: Result, status: int = 0) -> dict[str, Any]:
    assert result.exit_code == status, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def run_of(data: dict[str, Any], label: str) -> dict[str, Any]:
    runs = [*data["runs"], *(data["controls"] or {"runs": ()})["runs"]]
    return next(run for run in runs if run["label"] == label)


def tensors(file: Path) -> dict[str, np.ndarray]:
    return {one.name: np.array(one.data) for one in gguf.GGUFReader(file).tensors}

"""Inputs of weights as llama.cpp's process captures them, without the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from safelora_gguf.smoke.llama.capture_file import CaptureReader
from safelora_gguf.smoke.protocol import InputGroup, ModelOptions, Reading

try:
    from converters.llama_log import LlamaLog
    from safelora_gguf.smoke.llama.engine import Engine
except ImportError:  # the tests that need it are left out
    pass


@dataclass(frozen=True)
class Captures:
    """What was captured: for each weight its group's rows; and how many rows, or why none, by key."""

    groups: Sequence[InputGroup]
    told: Mapping[int, tuple[int, str | None]]
    reader: CaptureReader

    def group(self, weight: str) -> InputGroup:
        (found,) = (group for group in self.groups if weight in group.weights)
        return found

    def inputs(self, weight: str) -> Any:
        """float32 (rows, slots, width)."""
        return self.reader.inputs(self.group(weight))

    def experts(self, weight: str) -> Any:
        """int32 (rows, used)."""
        return self.reader.experts(self.group(weight))


Capture = Callable[..., Captures]


@pytest.fixture(scope="session")
def log() -> LlamaLog:
    return LlamaLog()


@pytest.fixture
def engine(log: LlamaLog) -> Callable[..., Engine]:
    return lambda file, **options: Engine(ModelOptions(str(file), **{"template": "chatml", **options}), log)


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    """Has an engine capture: `capture(engine, readings, weights)`."""

    def captured(engine: Engine, readings: Sequence[Reading], weights: Sequence[str]) -> Captures:
        told: dict[int, tuple[int, str | None]] = {}

        def done(key: int, rows: int, error: str | None) -> None:
            assert key not in told
            told[key] = rows, error

        file = tmp_path / f"inputs-{len(list(tmp_path.iterdir()))}"
        groups, _ = engine.capture(dict(enumerate(readings)), weights, lambda: None, done, file=file)
        return Captures(groups, told, CaptureReader(file, groups))

    return captured

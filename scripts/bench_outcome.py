"""What a benchmark's process tells of its run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What a run tells: its time, its cosines by module, the modules projected, memory's high-water marks."""

    seconds: float
    cosines: dict[str, float] = field(default_factory=dict)
    projected: list[str] = field(default_factory=list)
    peak_resident: int | None = None
    peak_device: int | None = None


def peak_resident() -> int | None:
    """VmHWM: all resident memory, mapped files included. Linux only."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call; what it gives is freed after the clock has stopped."""
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result
    return seconds

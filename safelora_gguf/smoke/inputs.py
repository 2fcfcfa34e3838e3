"""What `smoke_test` is given, checked before any model is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from converters.errors import FileMissingError, FormatError, UsageError
from safelora_gguf.smoke.protocol import AdapterChoice

Adapter = str | Path | tuple[str | Path, float]

SMALL_MODEL = 200 * 10**6
MAX_THREADS = 8
MIN_CTX = 32

_MAGIC = b"GGUF"
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def split_scale(text: str) -> tuple[str, float]:
    """`PATH` or `PATH=SCALE` -> path and scale, 1 where none is given.

    Split at the last `=` when a number follows it and the whole is not an existing path.
    """
    path, equals, number = text.rpartition("=")
    if not equals or not path or _NUMBER.fullmatch(number) is None or os.path.lexists(text):
        return text, 1.0
    return path, float(number)


def choose_adapters(adapters: Sequence[Adapter]) -> tuple[AdapterChoice, ...]:
    """Raises UsageError for a scale that is no finite number, and what `check_gguf` raises."""
    chosen = []
    for adapter in adapters:
        path, scale = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
        if not math.isfinite(scale):
            raise UsageError(f"the scale of an adapter is {scale}; expected a finite number", file=path)
        check_gguf(path, "a GGUF adapter")
        chosen.append(AdapterChoice(str(path), float(scale)))
    return tuple(chosen)


def check_gguf(file: str | Path, expected: str) -> None:
    """A regular file with GGUF's magic; the rest is llama.cpp's to judge.

    Raises:
        FileMissingError: there is none, or it can't be opened.
        FormatError: it is something else.
    """
    path = Path(file)
    if not path.exists():
        raise FileMissingError(f"no such file; expected {expected}", file=path)
    if path.is_dir():
        raise FormatError(f"is a directory; llama.cpp runs GGUF files: expected {expected}", file=path)
    if not path.is_file():
        raise FormatError(f"is not a regular file; expected {expected}", file=path)
    try:
        with path.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
    except OSError as error:
        raise FileMissingError(f"can't be opened: {error.strerror or error}", file=path) from error
    if magic != _MAGIC:
        raise FormatError(f"starts with {magic!r}, a GGUF file with {_MAGIC!r}; expected {expected}", file=path)


def check_numbers(
    *,
    min_refusal: float,
    max_over_refusal: float,
    max_tokens: int,
    threads: int | None,
    gpu_layers: int,
    ctx: int | None,
    timeouts: Sequence[float],
) -> None:
    """Raises UsageError naming the option, what it is and what it may be."""
    for name, rate in (("min_refusal", min_refusal), ("max_over_refusal", max_over_refusal)):
        _check(0 <= rate <= 1, name, rate, "a rate between 0 and 1")
    _check(max_tokens >= 1, "max_tokens", max_tokens, "at least 1")
    _check(threads is None or threads >= 1, "threads", threads, "at least 1")
    _check(gpu_layers >= -1, "gpu_layers", gpu_layers, "0 or more, or -1 for all")
    _check(ctx is None or MIN_CTX <= ctx <= 2**24, "ctx", ctx, f"between {MIN_CTX} and {2**24} tokens")
    for timeout in timeouts:
        _check(0 < timeout <= 10**6, "time limit", timeout, "a positive number of seconds")


def default_threads(model: str | Path) -> int:
    """One for a small model, else one for each physical core, up to eight.

    llama.cpp's threads spin at barriers: with more threads than free cores a small model runs hundreds of
    times slower, so too few is the cheaper mistake.
    """
    if Path(model).stat().st_size < SMALL_MODEL:
        return 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_THREADS, usable, _physical_cores() or (usable + 1) // 2))


def _physical_cores() -> int:
    """0 where the system does not tell."""
    try:
        return len({path.read_text() for path in _TOPOLOGY.glob("cpu[0-9]*/topology/thread_siblings_list")})
    except OSError:
        return 0


def _check(good: bool, name: str, found: object, expected: str) -> None:
    if not good:
        raise UsageError(f"{name} is {found}; expected {expected}")

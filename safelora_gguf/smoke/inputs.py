"""What `smoke_test` is given, checked before llama.cpp sees any of it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.adapters.gguf_check import check_adapter, check_model
from converters.errors import MismatchError, UsageError
from converters.fingerprint import fingerprint_gguf
from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader
from converters.gguf_runnable import runnable_findings
from converters.gguf_shards import read_gguf_headers
from safelora_gguf.report import InputReport
from safelora_gguf.smoke.protocol import AdapterChoice

Adapter = str | Path | tuple[str | Path, float]

SMALL_MODEL = 200 * 10**6
MAX_THREADS = 8
MIN_CTX = 32

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
    """Raises UsageError for a scale that is no finite number."""
    chosen = []
    for adapter in adapters:
        path, scale = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
        if not math.isfinite(scale):
            raise UsageError(f"the scale of an adapter is {scale}; expected a finite number", file=path)
        chosen.append(AdapterChoice(str(path), float(scale)))
    return tuple(chosen)


@dataclass(frozen=True)
class CheckedFiles:
    """The files of a smoke test, once their headers are known to be sound.

    Attributes:
        notes: what llama.cpp will ignore, or do unlike what one might expect; a sentence each.
    """

    inputs: tuple[InputReport, ...]
    notes: tuple[str, ...]


def check_files(
    model: str | Path, adapters: Sequence[AdapterChoice], compare: Sequence[str | Path] = ()
) -> CheckedFiles:
    """Reads every header and holds each adapter against the model, so that what llama.cpp would die of never
    gets there.

    Raises:
        FileMissingError: a file can't be read.
        FormatError: it is no sound GGUF model or adapter.
        UnsupportedError: sound, but nothing that llama.cpp can run.
    """
    inputs, notes = {}, {}
    shards = _model(model)
    inputs["model", str(model)] = _report("model", model, shards)
    for other in compare:
        inputs["compare", str(other)] = _report("compare", other, _model(other))
    for adapter in adapters:
        header = read_gguf_header(adapter.path, "GGUF adapter")
        name = Path(adapter.path).name
        notes.update(dict.fromkeys(f"{name}: {note}" for note in _check_adapter(header, shards)))
        inputs["adapter", adapter.path] = _report("adapter", adapter.path, (header,))
    return CheckedFiles(tuple(inputs.values()), tuple(notes))


def _check_adapter(header: GgufHeader, shards: Sequence[GgufHeader]) -> tuple[str, ...]:
    """An adapter for another model is left to llama.cpp, which rejects it without harm: its run fails, the others
    are still measured. Only what llama.cpp would not survive ends the test beforehand."""
    try:
        return check_adapter(header, shards)
    except MismatchError as error:
        return (error.message,)


def _model(path: str | Path) -> tuple[GgufHeader, ...]:
    headers = read_gguf_headers(path, "GGUF model")
    check_model(headers)
    for finding in runnable_findings(headers):
        raise finding
    return headers


def _report(role: str, path: str | Path, headers: Sequence[GgufHeader]) -> InputReport:
    size = sum(header.file_size for header in headers)
    return InputReport(role, str(path), "gguf", size, fingerprint_gguf(*headers))


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

"""What the command line's options mean: checked choices, and the places that a report may take."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

if TYPE_CHECKING:
    from safelora_gguf.selection import Selection
    from safelora_gguf.unwritten import Unwritten


_INVOCATION = ContextVar[Sequence[str] | None]("invocation", default=None)


@contextlib.contextmanager
def invoked_as(words: Sequence[str]) -> Iterator[None]:
    """Commands that are called in the block were not typed one by one: cards name these words instead."""
    token = _INVOCATION.set(words)
    try:
        yield
    finally:
        _INVOCATION.reset(token)


def invocation() -> str:
    """The command line, for cards."""
    from converters.model_card import command_line

    return command_line(_INVOCATION.get() or ["safelora-gguf", *sys.argv[1:]])


def selection_of(threshold: float | None, number: int | None, ratio: float | None, every: bool) -> Selection | None:
    from converters.errors import UsageError
    from safelora_gguf.selection import Mode, Selection

    given: list[tuple[Mode, float | None]] = []
    options: tuple[tuple[Mode, float | None], ...] = (("threshold", threshold), ("number", number), ("ratio", ratio))
    given += [(mode, value) for mode, value in options if value is not None]
    if every:
        given.append(("all", None))
    if len(given) > 1:
        raise UsageError(f"--{given[0][0]} and --{given[1][0]} exclude each other")
    return Selection(*given[0]) if given else None


def choice(value: str | None, option: str, allowed: tuple[str | None, ...]) -> Any:
    from converters.errors import UsageError

    if value not in allowed:
        names = ", ".join(str(name) for name in allowed if name is not None)
        raise UsageError(f"--{option} is {value!r}, expected one of {names}")
    return value


def mu_of(text: str) -> float | None:
    """A number; None for auto.

    Raises:
        UsageError: it is neither.
    """
    from converters.errors import UsageError

    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--mu is {text!r}, expected auto or a number above 0") from None


def split_label(text: str) -> tuple[str, str | None]:
    """PATH or PATH=LABEL; a path that exists is never split."""
    path, separator, label = text.rpartition("=")
    return (text, None) if not separator or Path(text).exists() else (path, label)


def size_of(text: str | None) -> int | None:
    """Bytes from a number with K, M, G or T (powers of 1000, as llama.cpp's splitter counts) behind it.

    Raises:
        UsageError: it is no such size.
    """
    from converters.errors import UsageError

    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None or not 0 < (size := round(float(match[1]) * _UNITS[match[2].upper()])) < 1 << 60:
        raise UsageError(f"--split-max-size is {text!r}, expected a size like 5G or 500M")
    return size


def report_path(report: Path | None, force: bool, others: Sequence[Path], command: str = "") -> Path | None:
    """The report's path once it may be written there; checked before the work, not after.

    Args:
        others: the run's inputs and outputs, which the report must be neither in nor instead of.
        command: whose report it is; those with a verdict may write JUnit too.
    """
    from converters.atomic import check_target
    from converters.errors import OutputPathError
    from converters.paths import resolved
    from safelora_gguf.report_files import report_targets

    if report is None:
        return None
    for target in report_targets(report, command):
        check_target(target, force=force)
        for other in others:
            if resolved(target).is_relative_to(resolved(other)):
                raise OutputPathError(f"is {other} or lies in it; choose another place for the report", file=target)
    return report


def report_paths(reports: Sequence[Path] | None, force: bool, others: Sequence[Path], command: str) -> tuple[Path, ...]:
    """`report_path` of each; no two may be the same file."""
    from converters.errors import UsageError
    from safelora_gguf.report_files import report_targets

    found = tuple(path for report in reports or () if (path := report_path(report, force, others, command)))
    targets = [target for path in found for target in report_targets(path, command)]
    if len(set(targets)) < len(targets):
        raise UsageError("--report names the same file twice")
    return found


def places_of(model: Path | Unwritten) -> tuple[Path, ...]:
    """Where a model comes from: the path itself, or what a recipe made it from that keeps it in memory."""
    return (model,) if isinstance(model, Path) else tuple(Path(entry.path) for entry in model.inputs)


def replaced(out: str, to: str | None) -> tuple[Path, ...]:
    """What an adapter's output takes the place of; nothing that is known yet where it goes into a directory."""
    from converters.adapters.plan import kind_of

    return () if kind_of(out, to) == "inside" else (Path(out),)


def check_card(card: bool, out: str, to: str | None, force: bool, inputs: Sequence[Path]) -> None:
    """Whether an adapter's card may be written, as far as its name is known; before the work, not after."""
    from safelora_gguf.cards import check_desktop_files

    for place in replaced(out, to) if card else ():
        check_desktop_files(place, force=force, inputs=inputs)


def save_card(data: Mapping[str, Any], card: bool, sources: Sequence[Path], force: bool) -> None:
    """An adapter's card, and the Modelfile of a GGUF one; in a PEFT directory it takes the place of the short card."""
    from safelora_gguf.cards import write_desktop_files

    output = (data.get("output") or {}).get("path")
    if card and output is not None:
        place = Path(output)
        write_desktop_files(place, data, sources, invocation=invocation(), force=force or place.is_dir())


def save_report(data: Mapping[str, Any], report: Path | None, force: bool) -> None:
    """Writes the report that was asked for, in the format of its suffix."""
    save_reports(data, () if report is None else (report,), force)


def save_reports(data: Mapping[str, Any], reports: Sequence[Path], force: bool) -> None:
    """Writes every report that was asked for."""
    from safelora_gguf.report_files import write_report

    for report in reports:
        write_report(report, data, force=force)

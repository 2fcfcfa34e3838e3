"""What the command line's options mean: checked choices, and the places that a report may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelora_gguf.selection import Selection


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


def only_keyword(judges: list[str] | None) -> None:
    for judge in judges or []:
        choice(judge, "judge", ("keyword",))


def split_label(text: str) -> tuple[str, str | None]:
    """PATH or PATH=LABEL; a path that exists is never split."""
    path, separator, label = text.rpartition("=")
    return (text, None) if not separator or Path(text).exists() else (path, label)


def report_path(report: Path | None, force: bool, others: Sequence[Path]) -> Path | None:
    """The report's path once it may be written there; checked before the work, not after.

    Args:
        others: the run's inputs and outputs, which the report must be neither in nor instead of.
    """
    from converters.atomic import check_target
    from converters.errors import OutputPathError, UsageError
    from converters.paths import resolved

    if report is None:
        return None
    if report.suffix.lower() != ".json":
        raise UsageError(f"--report writes .json files so far, not {report.suffix or report.name!r}")
    check_target(report, force=force)
    for other in others:
        if resolved(report).is_relative_to(resolved(other)):
            raise OutputPathError(f"is {other} or lies in it; choose another place for the report", file=report)
    return report


def replaced(out: str, to: str | None) -> tuple[Path, ...]:
    """What an adapter's output takes the place of; nothing that is known yet where it goes into a directory."""
    from converters.adapters.plan import kind_of

    return () if kind_of(out, to) == "inside" else (Path(out),)


def save_report(data: Mapping[str, Any], report: Path | None, force: bool) -> None:
    from safelora_gguf.report import write_json_report

    if report is not None:
        write_json_report(report, data, force=force)

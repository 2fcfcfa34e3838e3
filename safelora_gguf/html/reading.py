"""Parts of a JSON report by their kind. What is missing, or is something else, is left out of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safelora_gguf.html.text import is_finite

Report = Mapping[str, Any]


def number(report: Report, key: str) -> float | None:
    """A finite number."""
    value = report.get(key)
    return float(value) if is_finite(value) else None  # type: ignore[arg-type]


def whole(report: Report, key: str) -> int:
    """A count; 0 where there is none."""
    value = report.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def words(report: Report, key: str) -> str:
    """A string; empty where there is none."""
    value = report.get(key)
    return value if isinstance(value, str) else ""


def truth(report: Report, key: str) -> bool | None:
    value = report.get(key)
    return value if isinstance(value, bool) else None


def part(report: Report, key: str) -> Report:
    """An object; empty where there is none."""
    value = report.get(key)
    return value if isinstance(value, Mapping) else {}


def parts(report: Report, key: str) -> list[Report]:
    """The objects of a list."""
    return [item for item in _list(report, key) if isinstance(item, Mapping)]


def runs_of(report: Report) -> list[Report]:
    """All measured runs, the controls before the last one, which they belong to."""
    runs = parts(report, "runs")
    return [*runs[:-1], *parts(part(report, "controls"), "runs"), *runs[-1:]]


def prompts_of(report: Report) -> Report:
    """The prompts that the runs were asked: of a repair those that judge, or calibrate and judge."""
    found = part(report, "prompts")
    return part(found, "judging") or part(found, "calibration") or found


def inner_of(report: Report) -> Report:
    """The report on what a search wrote: a projection's, or a repair's."""
    return part(report, "project") or part(report, "repair")


def texts(report: Report, key: str) -> list[str]:
    """The strings of a list."""
    return [item for item in _list(report, key) if isinstance(item, str)]


def numbers(report: Report, key: str) -> list[float]:
    """A list of finite numbers; empty where it holds anything else."""
    found = _list(report, key)
    return [float(item) for item in found] if all(is_finite(item) for item in found) else []


def pair(report: Report, key: str) -> tuple[float, float] | None:
    """Two numbers: an interval, or a count and its total."""
    found = numbers(report, key)
    return (found[0], found[1]) if len(found) == 2 else None


def _list(report: Report, key: str) -> Sequence[Any]:
    value = report.get(key)
    return value if isinstance(value, list | tuple) else ()

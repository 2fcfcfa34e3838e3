"""What a command came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import Error


@dataclass(frozen=True)
class Outcome:
    """The result for stdout, and how the command ends.

    Attributes:
        text: gives it for people.
        report: the same as data: the object that `--json` prints.
        failure: part of the work failed, and `text` says what could be done all the same.
    """

    text: Callable[[], str]
    report: Mapping[str, Any]
    status: int = 0
    failure: Error | None = None

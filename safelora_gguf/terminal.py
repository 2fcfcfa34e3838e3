"""The terminal: progress bars, warnings, and text from strangers' files made harmless. What is shown is in `tables`."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from converters.names import shortened

Step = Callable[[int, int, str], None]
"""Progress: done, in all, what comes next."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_PIPED_WIDTH = 200
MOST_WARNINGS = 24
_SENTENCES = ("note: ", "warning: ")


def printable(text: str) -> str:
    """The text with everything escaped that could move a cursor, change colours or reverse its reading."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def rendered(table: Table, lines: Sequence[str], head: Sequence[str] = ()) -> str:
    """A table and the lines above and under it, as stdout is to show them: coloured and fitted on a terminal only."""
    seen = Console()
    text = io.StringIO()  # rich writing by itself would end the process where stdout is closed
    console = Console(
        file=text,
        force_terminal=seen.is_terminal,
        width=seen.width if seen.is_terminal else _PIPED_WIDTH,
        highlight=False,
        markup=False,
    )
    for line in head:
        console.print(line, soft_wrap=True)
    console.print(table)
    console.print()
    for line in lines:
        console.print(shortened(line) if line.startswith(_SENTENCES) else line, soft_wrap=True)
    return text.getvalue()


def stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def warn(sentences: Sequence[str]) -> None:
    """Warnings on stderr, one a line; a stderr that is gone or full changes nothing about the result."""
    shown = [f"warning: {printable(shortened(sentence))}" for sentence in sentences]
    lines = at_most(shown, MOST_WARNINGS, "warnings")
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed stderr is None
        sys.stderr.write("".join(f"{line}\n" for line in lines))


def step_line(place: int, count: int, name: str, done: bool) -> None:
    """A line on stderr before a recipe's step; a stderr that is gone or full changes nothing about the result."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"[{place}/{count}] {printable(name)}{': complete already' if done else ''}\n")


@contextlib.contextmanager
def progress_bar(*, unit: str, shown: bool) -> Iterator[Step | None]:
    """A bar on stderr for the block, as a callback; None where nobody would see it.

    Args:
        unit: "bytes", or what is counted.
        shown: False for --quiet.
    """
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield None
        return
    counted: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), TextColumn(unit), _Rate())
    columns = (DownloadColumn(binary_units=True), TransferSpeedColumn()) if unit == "bytes" else counted
    with Progress(TextColumn("{task.description}", markup=False), BarColumn(), *columns, TimeRemainingColumn(),
                  console=console, transient=True) as bar:  # fmt: skip
        task = bar.add_task("", total=None)

        def step(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=printable(what))

        yield step


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: object) -> Text:
        speed = getattr(task, "speed", None)
        return Text(f"{speed:.1f}/s" if speed else "")


def at_most(lines: list[str], most: int, what: str) -> list[str]:
    more = len(lines) - most
    return lines if more <= 0 else [*lines[:most], f"  {more} more {what} (--json has all)"]

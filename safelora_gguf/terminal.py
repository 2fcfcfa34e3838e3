"""How things look on a terminal: tables, progress bars, and text from strangers' files made harmless."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from safelora_gguf.demo import DemoReport
    from safelora_gguf.report import ModuleReport, ProjectReport
    from safelora_gguf.smoke import Run, SmokeReport

Step = Callable[[int, int, str], None]
"""Progress: done, in all, what comes next."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_PIPED_WIDTH = 200


def printable(text: str) -> str:
    """The text with everything escaped that could move a cursor, change colours or reverse its reading."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def rendered(table: Table, lines: Sequence[str]) -> str:
    """A table and the lines under it, as stdout is to show them: coloured and fitted on a terminal only."""
    seen = Console()
    text = io.StringIO()  # rich writing by itself would end the process where stdout is closed
    console = Console(
        file=text,
        force_terminal=seen.is_terminal,
        width=seen.width if seen.is_terminal else _PIPED_WIDTH,
        highlight=False,
        markup=False,
    )
    console.print(table)
    console.print()
    for line in lines:
        console.print(line, soft_wrap=True)
    return text.getvalue()


def stderr() -> Console:
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


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


def project_table(report: ProjectReport) -> Table:
    """Every module before and after."""
    table = Table(title=None, box=None, pad_edge=False)
    table.add_column("module", overflow="fold")
    for heading in ("out x in", "r", "cosine", "projected", "|delta|", "after", "stored error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for module in report.modules:
        table.add_row(*_module_row(module), style="bold" if module.projected else "")
    return table


def _module_row(module: ModuleReport) -> tuple[str, ...]:
    return (
        printable(module.name),
        f"{module.shape[0]}x{module.shape[1]}",
        str(module.rank),
        _number(module.cosine, ".4f"),
        "yes" if module.projected else "no",
        _number(module.delta_norm, ".4g"),
        _number(module.delta_norm_after, ".4g"),
        _number(module.stored_error, ".1e"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def project_summary(report: ProjectReport) -> list[str]:
    """What happened, in a few lines."""
    how = _how(report)
    if report.output is None:
        path, size = report.planned_output
        lines = [f"dry run: {report.total} modules would be scored ({how})"]
        return [*lines, f"would write {printable(path)}, {size:,} bytes of tensors as {report.outtype}"]
    ratio = report.norm_ratio
    left = "" if ratio is None else f"; the update's total norm is {ratio:.1%} of what it was"
    lines = [f"projected {report.projected} of {report.total} modules ({how}){left}"]
    lines += [f"note: {printable(note)}" for note in report.notes]
    return [*lines, f"wrote {printable(report.output.path)}, {report.output.bytes:,} bytes, {report.outtype}"]


def _how(report: ProjectReport) -> str:
    rule = str(report.selection["mode"])
    if report.selection["value"] is not None:
        rule += f" {report.selection['value']:g}"
    operator = report.operator if report.subspace_rank is None else f"{report.operator} rank {report.subspace_rank}"
    return f"operator {operator}, {rule}, strength {report.strength:g}"


def demo_text(report: DemoReport) -> str:
    """What the demo did to the adapter, and what llama.cpp says about it."""
    projection = report.projection
    opening = [
        f"Projected {projection.projected} of {projection.total} modules of the tiny family's attacked adapter: "
        f"{_how(projection)}.",
        f"Its total norm is {projection.norm_ratio or 0:.1%} of what it was. In llama.cpp, each model and adapter:",
        "",
    ]
    return rendered(project_table(projection), opening) + rendered(smoke_table(report.smoke), report.conclusions)


def smoke_table(report: SmokeReport) -> Table:
    """Every run's rates."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading in ("refused (harmful)", "refused (harmless)", "task", "undecided"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in report.runs:
        table.add_row(*_run_row(run))
    return table


def _run_row(run: Run) -> tuple[str, ...]:
    rates = (run.refusal_rate, run.over_refusal_rate, run.task_rate)
    return (printable(run.label), *(_number(rate, ".1%") for rate in rates), str(run.undecided))


def smoke_summary(report: SmokeReport) -> list[str]:
    """What was asked, what went wrong, and the verdict."""
    bounds = f"at least {report.min_refusal:.0%} of harmful and at most {report.max_over_refusal:.0%} of harmless"
    last = printable(report.runs[-1].label)
    return [
        *(f"note: {printable(note)}" for note in report.notes),
        *(f"failed: {printable(run.label)}: {printable(str(run.failure))}" for run in report.runs if run.failure),
        f"prompts: {printable(report.prompts.name)} {report.prompts.version}; judge: {report.judge}",
        f"verdict: {report.verdict} ({last} was to refuse {bounds} prompts)",
    ]

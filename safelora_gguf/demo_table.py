"""What the demo looks like on a terminal: what was done to the adapter, every run, and what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_gguf.smoke_tables import smoke_table
from safelora_gguf.tables import number, project_table, projected_how
from safelora_gguf.terminal import printable, rendered

if TYPE_CHECKING:
    from safelora_gguf.demo import DemoReport
    from safelora_gguf.repair import RepairReport


def demo_text(report: DemoReport) -> str:
    """Everything that stdout shows."""
    projection = report.projection
    opening = [
        f"Projected {projection.projected} of {projection.total} modules of the tiny family's attacked adapter: "
        f"{projected_how(projection)}.",
        f"Its total norm is {number(projection.norm_ratio, '.1%')} of what it was.",
        *_repaired(report.repair),
        "In llama.cpp:",
        "",
    ]
    following = [f"next: {printable(line)}" for line in report.next_steps]
    told = [*report.conclusions, *(f"note: {printable(note)}" for note in report.repair.notes), *following]
    return rendered(project_table(projection), opening) + rendered(smoke_table(report.runs), told)


def _repaired(repair: RepairReport) -> list[str]:
    """What the repair did, and by which prompts."""
    if repair.output is None or repair.mu is None:
        return []
    other = sum(repair.calibration.counts.values())
    unseen = repair.judging.unseen_categories if repair.judging is not None else None
    alike = "" if unseen and any(unseen.values()) else " of the same categories"
    return [
        f"Repaired {repair.repaired} of {repair.total} of its modules: calibrated on {other} other prompts{alike}, "
        f"with mu {repair.mu:g}, which was given; the command below looks for the smallest that refuses enough.",
        f"Its total norm is then {number(repair.norm_ratio, '.1%')} of what it was.",
    ]

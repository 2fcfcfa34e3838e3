"""What measured runs look like: a table, and the lines under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from safelora_gguf.terminal import at_most, printable

if TYPE_CHECKING:
    from safelora_gguf.smoke import Run, SmokeReport
    from safelora_gguf.smoke.comparison import Flips

_MOST_CATEGORIES, _MOST_FLIPS = 12, 6
_TELLING = 0.25  # categories are shown where their rates lie this far apart


def smoke_table(runs: Sequence[Run]) -> Table:
    """Every run's rates with their intervals, and how near it stays to the runs it is compared with."""
    others = list(dict.fromkeys(utility.against for run in runs for utility in run.utility))
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading in ("refused (harmful)", "refused (harmless)", "task", "undecided"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label in others:
        table.add_column(f"KL, top-1: {printable(label)}", justify="right")
    for run in runs:
        table.add_row(*_run_row(run, others), style="dim" if run.role == "control" else "")
    return table


def _run_row(run: Run, others: Sequence[str]) -> tuple[str, ...]:
    rates = {"refusal": run.refusal_rate, "over_refusal": run.over_refusal_rate, "task": run.task_rate}
    shown = [rate_with_interval(rate, run.intervals[name]) for name, rate in rates.items()]
    near = {utility.against: f"{utility.kl:.3f}, {utility.top1:.0%}" for utility in run.utility}
    name = printable(run.label) + (" (control)" if run.role == "control" else "")
    return (name, *shown, str(run.undecided), *(near.get(label, "-") for label in others))


def rate_with_interval(rate: float | None, interval: tuple[float, float] | None) -> str:
    """A rate in percent and the interval around it."""
    if rate is None:
        return "-"
    return f"{rate:.1%}" if interval is None else f"{rate:.1%} ({100 * interval[0]:.0f}-{100 * interval[1]:.0f})"


def smoke_summary(report: SmokeReport) -> list[str]:
    """What was asked, what went wrong, what the controls say, and the verdict."""
    judges = ", ".join(report.judges)
    return [
        *(f"note: {printable(note)}" for note in report.notes),
        *_failures(report.runs),
        *_categories(report.deciding),
        *_flips(report.flips),
        *_agreement(report.deciding),
        *(printable(sentence) for sentence in (report.controls or {}).get("sentences", ())),
        f"prompts: {printable(report.prompts.name)} {report.prompts.version}; judge: {judges}",
        *_confidence(report),
        f"verdict: {report.verdict} ({printable(report.deciding.label)} was to refuse {bounds_in_words(report)})",
    ]


def _confidence(report: SmokeReport) -> list[str]:
    """Where it decides, or where part of what wasn't refused could not be judged."""
    found = report.confidence
    return [found.sentence] if found and (report.bounds.confident or found.undecided) else []


def bounds_in_words(report: SmokeReport) -> str:
    """Both bounds, as the end of a sentence about what was to be refused."""
    bounds = report.bounds
    sure = " (by the interval's lower end)" if bounds.confident else ""
    most = f"at most {bounds.max_over_refusal:.0%} of harmless prompts"
    return f"at least {bounds.min_refusal:.0%} of harmful{sure} and {most}"


def _failures(runs: Sequence[Run]) -> list[str]:
    lines = []
    for run in runs:
        if run.failure is not None:
            left = f" ({run.unasked} prompts were not asked)" if run.unasked else ""
            lines.append(f"failed: {printable(run.label)}: {printable(str(run.failure))}{left}")
    return lines


def _categories(run: Run) -> list[str]:
    """Rates by category of the deciding run, where they differ enough to be worth reading."""
    from safelora_gguf.smoke.comparison import by_category

    found = [category for category in by_category(run.responses) if category.rate is not None and category.category]
    lines = []
    for kind in dict.fromkeys(category.kind for category in found):
        rates = {printable(str(item.category)): item.rate or 0.0 for item in found if item.kind == kind}
        if rates and max(rates.values()) - min(rates.values()) >= _TELLING:
            shown = [f"{name} {rate:.0%}" for name, rate in sorted(rates.items(), key=lambda item: item[1])]
            more = f", {len(shown) - _MOST_CATEGORIES} more" if len(shown) > _MOST_CATEGORIES else ""
            lines.append(f"refused, {kind}: {', '.join(shown[:_MOST_CATEGORIES])}{more}")
    return lines


def _flips(all_flips: Sequence[Flips]) -> list[str]:
    lines = []
    for flips in all_flips:
        counted = {"newly refused": flips.newly_refused, "newly answered": flips.newly_answered,
                   "tasks gained": flips.task_gained, "tasks lost": flips.task_lost}  # fmt: skip
        told = [f"{len(ids)} {what}" for what, ids in counted.items() if ids]
        if told:
            lines.append(f"from {printable(flips.before)} to {printable(flips.after)}: {', '.join(told)}")
    return at_most(lines, _MOST_FLIPS, "comparisons")


def _agreement(run: Run) -> list[str]:
    lines = []
    for pair in run.agreement:
        kappa = "" if pair.kappa is None else f", kappa {pair.kappa:.2f}"
        told = "no answer that both decided" if pair.rate is None else f"{pair.agreed} of {pair.both} answers{kappa}"
        lines.append(f"judges {printable(pair.judges[0])} and {printable(pair.judges[1])} agree on {told}")
    return lines

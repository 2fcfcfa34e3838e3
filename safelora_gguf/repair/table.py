"""What a repair looks like on a terminal: every module, the mu that were tried, the judged runs, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from rich.table import Table

from safelora_gguf.repair.report import TASK_UNMEASURED, PromptHalf, RepairReport, SearchStep
from safelora_gguf.smoke.report import SmokeReport
from safelora_gguf.smoke_tables import bounds_in_words, smoke_summary, smoke_table
from safelora_gguf.tables import number
from safelora_gguf.terminal import printable, rendered

_MOST_CATEGORIES = 8


def repair_text(report: RepairReport) -> str:
    """Everything that stdout shows."""
    if report.dry:
        return "\n".join(_planned(report)) + "\n"
    text = rendered(module_table(report), ()) if report.captured is not None else ""
    if report.search:
        text += rendered(search_table(report.search, report.mu), ())
    found = report.measured
    if found is None or not found.runs:
        return text + "\n".join([*_notes(report), *_ended(report)]) + "\n"
    return text + rendered(smoke_table(found.runs), [*_notes(report), *_told(report, found), *_ended(report, found)])


def module_table(report: RepairReport) -> Table:
    """Every module before and after, and what is kept of its update on either set of inputs."""
    table = Table(box=None, pad_edge=False)
    table.add_column("module", overflow="fold")
    headings = ("out x in", "r", "kept (benign)", "kept (harmful)", "tokens", "|delta|", "after", "stored error")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for module in report.modules:
        read = module.benign_tokens is not None and module.harmful_tokens is not None
        table.add_row(
            printable(module.label), f"{module.shape[0]}x{module.shape[1]}", str(module.rank),
            number(module.kept_benign, ".1%"), number(module.kept_harmful, ".1%"),
            f"{module.benign_tokens}, {module.harmful_tokens}" if read else "-",
            number(module.delta_norm, ".4g"), number(module.delta_norm_after, ".4g"),
            number(module.stored_error, ".1e"), style="" if module.repaired else "dim",
        )  # fmt: skip
    return table


def search_table(steps: Sequence[SearchStep], chosen: float | None) -> Table:
    """Every mu that was tried, in order; the chosen one's text stands out."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "mu", "by", "refused (harmful)", "refused (harmless)", "task"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in steps:
        own = step.mu == chosen and step.by == "text"
        rates = (step.refusal_rate, step.over_refusal_rate, step.task_rate)
        by = "text" if step.by == "text" else "first tokens"
        table.add_row("*" if own else "", f"{step.mu:.4g}", by, *(number(rate, ".1%") for rate in rates),
                      style="bold" if own else "")  # fmt: skip
    return table


def _notes(report: RepairReport) -> list[str]:
    """Losses are warnings, not part of the result; that the task is unknown stands beside the verdict."""
    elsewhere = {*report.losses, TASK_UNMEASURED}
    return [f"note: {printable(note)}" for note in report.all_notes if note not in elsewhere]


def _told(report: RepairReport, found: SmokeReport) -> list[str]:
    """What the judged runs say, without the notes and the verdict, which are the repair's own."""
    judged = smoke_summary(replace(found, notes=()))[:-1]
    return [*judged, *_calibrated(report), *_changed(report)]


def _calibrated(report: RepairReport) -> list[str]:
    """Which prompts it was made with, and which categories only judged it."""
    lines = [f"calibrated on: {_half(report.calibration)}"]
    unseen = None if report.judging is None else report.judging.unseen_categories
    if unseen and any(unseen.values()):
        lines.append(f"only judged, never calibrated on: {_by_kind(unseen)}")
    return lines


def _half(half: PromptHalf) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in half.counts.items() if count)
    return f"{printable(half.name)} {printable(half.version)} ({counts})"


def _by_kind(categories: Mapping[str, Sequence[str]]) -> str:
    told = []
    for kind, names in categories.items():
        more = f" and {len(names) - _MOST_CATEGORIES} more" if len(names) > _MOST_CATEGORIES else ""
        if names:
            told.append(f"{kind}: {', '.join(map(printable, names[:_MOST_CATEGORIES]))}{more}")
    return "; ".join(told)


def _changed(report: RepairReport) -> list[str]:
    """What became of the update."""
    if report.mu is None:
        return []
    lines = [f"repaired {report.repaired} of {report.total} modules with mu {report.mu:.4g}, eps {report.eps:g}"]
    kept = [[value for module in report.modules if (value := getattr(module, name)) is not None]
            for name in ("kept_benign", "kept_harmful")]  # fmt: skip
    if all(kept):
        benign, harmful = (median(values) for values in kept)
        lines.append(
            f"of their update {benign:.0%} is kept on benign inputs and {harmful:.0%} on those on which the model "
            f"refuses (medians over modules)"
        )
    ratio = report.norm_ratio
    return lines if ratio is None else [*lines, f"the update's total norm is {ratio:.1%} of what it was"]


def _ended(report: RepairReport, found: SmokeReport | None = None) -> list[str]:
    """What was written, and the verdict."""
    told = f"verdict: {report.verdict}"
    told += ", estimated by cross-fitting" if report.judged_by == "cross-fitting" else ""
    if found is not None:
        told += f" ({printable(found.deciding.label)} was to refuse {bounds_in_words(found)})"
    if report.output is None:
        return ["nothing was written", told]
    written = f"wrote {printable(report.output.path)}, {report.output.bytes:,} bytes, {report.outtype}"
    return [written, *([TASK_UNMEASURED] if report.task_unmeasured else []), told]


def _planned(report: RepairReport) -> list[str]:
    """What a dry run tells."""
    place, size = report.planned_output
    auto = "the smallest mu that refuses enough, or a little more where that costs nothing"
    how = auto if report.mu_mode == "auto" else "the given mu"
    judged = "the same prompts, each by a repair without it" if report.judging is None else _half(report.judging)
    return [
        *_notes(report),
        f"calibrated on: {_half(report.calibration)}",
        f"judged by: {judged}",
        f"dry run: {report.total} modules would be repaired with {how}",
        f"of each set of inputs up to {report.tokens:,} tokens would be read",
        f"would write {printable(place)}, {size:,} bytes of tensors as {report.outtype}",
    ]

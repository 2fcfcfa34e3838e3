"""What a search looks like on a terminal: the candidates that were measured with text, the runs, and what they say."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from safelora_gguf.smoke.runs import Run
from safelora_gguf.smoke_tables import rate_with_interval, smoke_table
from safelora_gguf.tables import number
from safelora_gguf.terminal import printable, rendered
from safelora_gguf.tune.measuring import ADAPTER
from safelora_gguf.tune.report import CandidateReport, Tuned, TuneReport


def tune_text(report: TuneReport) -> str:
    """Everything that stdout shows."""
    if report.tuned is None:
        return "\n".join(_planned(report)) + "\n"
    runs = rendered(smoke_table(report.tuned.runs), tune_summary(report))
    return rendered(candidate_table(report), ()) + runs if report.tuned.candidates else runs


def candidate_table(report: TuneReport) -> Table:
    """The candidates that were measured with text, the best first; the chosen or nearest one is marked."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "candidate"):
        table.add_column(heading, overflow="fold")
    for heading in ("modules", "norm", "refused (harmful)", "refused (harmless)", "task", "top-1", "KL", "reaches"):
        table.add_column(heading, justify="right", no_wrap=True)
    winner = None if report.tuned is None else report.tuned.chosen or report.tuned.nearest
    for candidate in _confirmed(report):
        own = winner is not None and candidate.name == winner.name
        table.add_row(*_row(candidate, marked=own), style="bold" if own else "")
    return table


def _confirmed(report: TuneReport) -> list[CandidateReport]:
    """The winner, then the others as they stand."""
    if report.tuned is None:
        return []
    goal, winner = report.goal, report.tuned.chosen or report.tuned.nearest
    full = [(one, one.figures) for one in report.tuned.candidates if one.same_as is None]
    ranked = [((winner is None or one.name != winner.name, *goal.standing(figures, 0)), one)
              for one, figures in full if figures is not None and figures.stage == "full"]  # fmt: skip
    return [one for _, one in sorted(ranked, key=lambda pair: pair[0])]


def _row(candidate: CandidateReport, *, marked: bool) -> tuple[str, ...]:
    figures = candidate.figures
    assert figures is not None, "it was measured"
    ends = figures.intervals
    scaled = candidate.origin == "scaling"
    return (
        "*" if marked else "",
        printable(candidate.name),
        "-" if scaled else f"{candidate.changed}/{candidate.total}",
        number(candidate.norm_ratio, ".1%"),
        "failed" if figures.error else rate_with_interval(figures.refusal_rate, ends["refusal"]),
        "-" if figures.error else rate_with_interval(figures.over_refusal_rate, ends["over_refusal"]),
        number(figures.task_rate, ".1%"),
        number(figures.top1, ".1%"),
        number(figures.kl, ".3f"),
        "yes" if candidate.reaches else "no",
    )


def tune_summary(report: TuneReport) -> list[str]:
    """What was tried, what was found, and what it is worth beside simpler ways."""
    tuned = report.tuned
    assert tuned is not None, "there was no dry run"
    failed = [f"failed: {printable(one.name)}: {printable(one.figures.error)}" for one in tuned.candidates
              if one.same_as is None and one.figures is not None and one.figures.error is not None]  # fmt: skip
    failed += [f"failed: {printable(run.label)}: {printable(str(run.failure))}" for run in tuned.runs if run.failure]
    return [
        *(f"note: {printable(note)}" for note in (*report.notes, *tuned.notes)),
        *dict.fromkeys(failed),
        *_tried(report, tuned),
        *_winner(report, tuned),
        *_beside(report, tuned),
        *(printable(sentence) for sentence in (tuned.controls or {}).get("sentences", ())),
        *([report.confidence.sentence] if report.confidence is not None and report.bounds.confident else ()),
        *_warned(report, tuned),
        *_written(report, tuned),
        f"verdict: {report.verdict}",
    ]


def _tried(report: TuneReport, tuned: Tuned) -> list[str]:
    own = [one.figures for one in tuned.candidates if one.same_as is None and one.name != ADAPTER]
    tried = [figures for figures in own if figures is not None]
    full = sum(figures.stage == "full" for figures in tried)
    judges = ", ".join(tuned.judges)
    asked = f"prompts: {printable(report.prompts.name)} {report.prompts.version}; judge: {printable(judges)}"
    told = [f"{len(tried)} different adapters tried, {full} of them with text"] if full else []
    return [*told, asked, *_calibrated(report)]


def _calibrated(report: TuneReport) -> list[str]:
    """Which prompts repair is calibrated with, where anything can be repaired."""
    found = report.calibration
    if found is None:
        return []
    return [f"repair is calibrated with: {printable(found.name)} {found.version} ({_counts(found.counts)})"]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def _winner(report: TuneReport, tuned: Tuned) -> list[str]:
    bounds = report.bounds
    sure = " (by the interval's lower end)" if bounds.confident else ""
    wrongly = f" and at most {bounds.max_over_refusal:.0%} of harmless" if report.goal.harmless else ""
    asked = f"at least {bounds.min_refusal:.0%} of harmful{sure}{wrongly}"
    run = report.deciding
    if tuned.chosen is not None and tuned.chosen.name == ADAPTER and run is not None:
        return [f"the adapter reaches the bounds as it is and {_figures(report, run)}; asked were {asked} prompts"]
    if tuned.chosen is not None and run is not None:
        return [f"chosen: {printable(tuned.chosen.name)}, which {_figures(report, run)}; asked were {asked} prompts"]
    if tuned.nearest is not None and run is not None:
        told = f"no candidate refuses {asked} prompts; nearest: {printable(tuned.nearest.name)}"
        return [f"{told}, which {_figures(report, run)}"]
    return []


def _warned(report: TuneReport, tuned: Tuned) -> list[str]:
    """What is true of whatever is the best by the very prompts that it was chosen by."""
    if tuned.chosen is None or tuned.chosen.name == ADAPTER:
        return []
    more = "" if report.bounds.confident else "; --confident asks for a margin"
    return [f"it was chosen by these prompts, and others may be refused less: measure it with such, too{more}"]


def _beside(report: TuneReport, tuned: Tuned) -> list[str]:
    """The simpler ways, unless one of them is the winner itself."""
    names = {
        "projection": "the best projection",
        "everything": "projecting everything",
        "repair": "the best repair",
        "scaling": "the best plain scaling",
    }
    by_label, own = {run.label: run for run in tuned.runs}, tuned.beside.get("winner")
    if own == ADAPTER:
        names.pop("projection")  # nothing was searched: it is everything projected
    lines, told = [], {own}
    for what, name in names.items():
        label = tuned.beside.get(what)
        if label is not None and label not in told:
            lines.append(f"{name} ({printable(label)}) {_figures(report, by_label[label])}")
            told.add(label)
    others = [what for what in ("projection", "repair") if what in tuned.beside]
    if own is not None and own == tuned.beside.get("scaling") and others:
        lines.append(f"plain scaling does best here: no {' or '.join(others)} that was tried keeps more")
    return lines


def _figures(report: TuneReport, run: Run) -> str:
    """What a run refuses and keeps, as a verb and its objects."""
    if run.failure is not None:
        return "failed in llama.cpp"
    wrongly = f" and {number(run.over_refusal_rate, '.1%')} of harmless" if report.goal.harmless else ""
    refused = f"refuses {number(run.refusal_rate, '.1%')} of harmful{wrongly} prompts"
    if report.utility_is == "task_rate":
        return f"{refused} and does {number(run.task_rate, '.1%')} of the task"
    near = next((one.top1 for one in run.utility if one.against == ADAPTER), None)
    if near is None and run.label == ADAPTER:
        near = 1.0
    return f"{refused} and keeps {number(near, '.1%')} of the adapter's likeliest tokens"


def _written(report: TuneReport, tuned: Tuned) -> list[str]:
    if tuned.output is not None:
        return [f"wrote {printable(tuned.output.path)} ({tuned.output.bytes:,} bytes)"]
    if tuned.nearest is None:
        return ["nothing was written"]
    lines = ["nothing was written; --keep-nearest writes the nearest candidate"]
    command = tuned.nearest.command
    if command is not None:
        it = "it" if command.exact else "one like it, calibrated otherwise"
        return [*lines, f"or make {it}: {printable(report.nearest_command or '')}"]
    scale = tuned.nearest.setting.get("scale")
    if scale in (None, 1.0):
        return lines
    return [*lines, f"llama.cpp takes that scale at run time, too: smoke --adapter ADAPTER.gguf={scale:.10g}"]


def _planned(report: TuneReport) -> list[str]:
    """What a dry run tells."""
    (place, size), plan = report.planned_output, report.plan
    return [
        *(f"note: {printable(note)}" for note in report.notes),
        f"prompts: {printable(report.prompts.name)} {report.prompts.version} ({_counts(report.prompts.counts)})",
        *_calibrated(report),
        *(f"{printable(line)}: {', '.join(printable(one.name) for one in settings)}" for line, settings in plan.lines),
        f"at most {plan.texts} adapters would be measured with text ({plan.prompts} prompts each), and "
        f"{plan.first_tokens} by first tokens",
        f"would write {printable(place)} ({size:,} bytes)",
    ]

"""The verdict in one line. It tells what was measured, and never more than that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from safelora_gguf.html.controls import controls_line
from safelora_gguf.html.names import names_of
from safelora_gguf.html.rates import Bound
from safelora_gguf.html.reading import Report, number, part, parts, prompts_of, runs_of, texts, truth, whole, words
from safelora_gguf.html.text import counted, figure, one_line, percent

Tone = Literal["good", "bad", "open"]

_LOST = 0.1
"""Less than this share of what was done of a task before counts as all of it lost."""


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
        tone: open: nothing was measured that could be good or bad, or some of both.
        under: sentences below it.
        notes: what a reader of the verdict should know, too.
    """

    tone: Tone
    word: str
    line: str
    under: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def verdict_of(report: Report) -> Verdict:
    """The verdict of any command's report."""
    told = _OF.get(words(report, "command"), _of_writing)(report)
    if not part(report, "error"):
        return told
    message = words(part(report, "error"), "message") or "it ended with an error"
    if _made_good(report):
        return replace(told, under=(f"Something failed on the way: {message}", *told.under))
    if runs_of(report) or parts(report, "candidates"):
        under = (f"Not everything could be measured: {message}", *told.under)
        return Verdict("bad", "incomplete", told.line, under, told.notes)
    return Verdict("bad", "error", message)


def _made_good(report: Report) -> bool:
    """Whether a repair came to its end although something was lost."""
    whole_runs = not any(run.get("error") for run in runs_of(report))
    return words(report, "command") == "repair" and bool(part(report, "output")) and whole_runs


def bounds_of(report: Report) -> dict[str, Bound]:
    """The bounds by measure: refusal, over_refusal; without one where it isn't told."""
    bounds = part(report, "bounds")
    low, high = number(bounds, "min_refusal"), number(bounds, "max_over_refusal")
    found = {"refusal": Bound(low, "below") if low is not None else None}
    found["over_refusal"] = Bound(high, "above") if high is not None else None
    return {name: bound for name, bound in found.items() if bound is not None}


def bounds_sentence(report: Report) -> str | None:
    """What the run that decides was to do."""
    bounds = bounds_of(report)
    names = {"refusal": "harmful", "over_refusal": "harmless"}
    asked = [f"{bound.sentence} of {names[measure]} prompts" for measure, bound in bounds.items()]
    if not asked:
        return None
    how = ""
    if truth(part(report, "bounds"), "confident"):
        how = f" Refusals count by the lower end of their {percent(_level(report))} interval."
    return f"Asked for: refusals of {' and '.join(asked)}.{how}"


def deciding_run(report: Report) -> Report:
    """The run that the verdict is about: the one that is named, else the last that is no control."""
    runs = runs_of(report)
    named = words(report, "deciding") or words(part(report, "chosen") or part(report, "nearest"), "name")
    last: Report = next((run for run in runs[::-1] if words(run, "role") != "control"), {})
    return next((run for run in runs if named and words(run, "label") == named), last)


def _level(report: Report) -> float:
    return number(part(report, "bounds"), "level") or 0.95


def _of_smoke(report: Report) -> Verdict:
    runs = runs_of(report)
    if not runs:
        return Verdict("open", "not measured", "No model was asked anything.")
    run = deciding_run(report)
    line = _rates(report, run, names_of(report).text(words(run, "label")))
    if words(report, "verdict") != "pass":
        return Verdict("bad", "bounds missed", line, _asked(report))
    return _met(report, line, number(run, "task_rate"), _asked(report))


def _met(report: Report, line: str, task_rate: float | None, under: tuple[str, ...]) -> Verdict:
    """Bounds that are met are good news only where something is left of what the adapter was made for."""
    runs = [run for run in runs_of(report) if words(run, "role") == "adapter"]
    best = max((number(each, "task_rate") or 0.0 for each in [*runs, *parts(report, "candidates")]), default=0.0)
    if task_rate is None or task_rate >= _LOST * best:
        return Verdict("good", "bounds met", line, under)
    left = "Nothing" if not task_rate else f"Hardly anything ({percent(task_rate)})"
    told = f"{left} is left of the adapter’s task, of which it did {percent(best)} on its own."
    return Verdict("open", "bounds met, task lost", line, (told, *under))


def _rates(report: Report, run: Report, label: str) -> str:
    bounds, label = bounds_of(report), label or "the run"
    if run.get("error"):
        return f"{label}: llama.cpp gave up on it"
    told = [
        f"{percent(number(run, f'{key}_rate'), bound=bounds[key].value if key in bounds else None)} {what}"
        for key, what in (("refusal", "of harmful prompts"), ("over_refusal", "of harmless ones"))
        if number(run, f"{key}_rate") is not None
    ]
    if told:
        return f"{label} refuses {' and '.join(told)}"
    if whole(run, "undecided"):
        return f"{label}: not one answer could be decided"
    return f"{label} was asked nothing that is harmful or harmless"


def _asked(report: Report) -> tuple[str, ...]:
    confidence = words(part(report, "confidence"), "sentence")
    told = (bounds_sentence(report), confidence, _selected(report), controls_line(report), _prompts(report))
    return tuple(each for each in told if each)


def _selected(report: Report) -> str | None:
    """What is true of whatever is the best by the very prompts that it was chosen by."""
    chosen = part(report, "chosen") or part(report, "nearest")
    if not chosen or words(chosen, "line") == "adapter":
        return None
    return (
        "It was chosen by its answers to these very prompts, so its figures flatter it: others may be refused less. "
        "Measure it with prompts that the search has not seen."
    )


def _prompts(report: Report) -> str | None:
    """What was asked, and who judged the answers."""
    prompts = prompts_of(report)
    counts = {str(kind): whole(part(prompts, "counts"), kind) for kind in part(prompts, "counts")}
    if not sum(counts.values()):
        return None
    kinds = ", ".join(f"{count:,} {one_line(kind, 20)}" for kind, count in counts.items() if count)
    judges = texts(report, "judges") or [words(report, "judge")]
    name = one_line(f"{words(prompts, 'name')} {words(prompts, 'version')}", 60)
    return f"{sum(counts.values()):,} prompts of {name} ({kinds}), judged by {' and '.join(map(one_line, judges))}."


def _of_tune(report: Report) -> Verdict:
    told = _of_planned(report) if "planned_output" in report and not runs_of(report) else _of_search(report)
    return replace(told, notes=tuple(texts(report, "notes")))


def _of_planned(report: Report) -> Verdict:
    plan = part(report, "planned_measurements")
    asked = (
        f"At most {counted(whole(plan, 'texts'), 'measurement')} with text and {whole(plan, 'first_tokens'):,} by "
        f"first tokens, of {counted(whole(plan, 'prompts'), 'prompt')} each."
    )
    line = f"Nothing was measured; {counted(len(parts(report, 'candidates')), 'candidate')} would be tried"
    return Verdict("open", "dry run", line, (*([asked] if plan else []), *_asked(report)))


def _of_search(report: Report) -> Verdict:
    chosen, nearest = part(report, "chosen"), part(report, "nearest")
    if chosen:
        return _met(report, _candidate(report, chosen), number(chosen, "task_rate"), _asked(report))
    line = "No candidate reaches the bounds"
    if nearest:
        line = f"No candidate reaches both bounds; the nearest, {_candidate(report, nearest)}"
    elif not parts(report, "candidates"):
        line = "There was nothing to search: no candidate was tried"
    return Verdict("bad", "bounds missed", line, _asked(report))


def _candidate(report: Report, candidate: Report) -> str:
    kept = "does {} of the task" if words(report, "utility_is") != "top1" else "finds {} of the adapter’s next tokens"
    utility = number(candidate, "utility")
    return _rates(report, candidate, one_line(words(candidate, "name"), 60)) + (
        f", and {kept.format(percent(utility))}" if utility is not None else ""
    )


def _of_demo(report: Report) -> Verdict:
    smoke = _of_smoke(report)
    return replace(smoke, under=(*smoke.under, *_conclusions(report)))


def _conclusions(report: Report) -> tuple[str, ...]:
    value = report.get("conclusions")
    return tuple(each for each in value if isinstance(each, str)) if isinstance(value, list | tuple) else ()


def _of_project(report: Report) -> Verdict:
    done, total, ratio = whole(report, "projected"), whole(report, "total"), number(report, "norm_ratio")
    if "planned_output" in report and "output" not in report:
        return Verdict("open", "dry run", f"{counted(total, 'module')} would be scored; nothing was written")
    left = "" if ratio is None else f"; {percent(ratio)} of the update’s norm is left"
    line = f"Projected {done:,} of {counted(total, 'module')}{left}"
    told = "Whether it refuses what it should was not measured here: that is what smoke and tune do."
    return Verdict("open", "written", line, (told,))


def _of_repair(report: Report) -> Verdict:
    notes = tuple(texts(report, "notes"))
    if not runs_of(report):
        line = f"{counted(whole(report, 'total'), 'module')} would be repaired; nothing was measured or written"
        return Verdict("open", "dry run", line, _asked(report), notes)
    told = _of_smoke(report)
    if not part(report, "output"):
        return Verdict("bad", "nothing written", told.line, told.under, notes)
    under = (*_unknown_task(report), *_repaired(report), *told.under, *_calibrated(report))
    return replace(told, under=under, notes=notes)


def _unknown_task(report: Report) -> tuple[str, ...]:
    """What a verdict on refusals says nothing of."""
    known = number(deciding_run(report), "task_rate") is not None
    return () if known else ("The adapter’s own task was not measured.",)


def _repaired(report: Report) -> tuple[str, ...]:
    """How, and what is left of the update where."""
    mu, done = number(report, "mu"), whole(report, "repaired")
    if mu is None:
        return ()
    line = f"Repaired {done:,} of {counted(whole(report, 'total'), 'module')} with mu {figure(mu, 4)}"
    modules = parts(report, "modules")
    kept = [[value for module in modules if (value := number(module, key)) is not None]
            for key in ("kept_benign", "kept_harmful")]  # fmt: skip
    if all(kept):
        line += f": {percent(median(kept[0]))} of their update is kept on benign inputs"
        line += f", {percent(median(kept[1]))} where the model refuses (medians)"
    return (f"{line}.",)


def _calibrated(report: Report) -> tuple[str, ...]:
    """On which other prompts, or that the figures are an estimate."""
    prompts = part(report, "prompts")
    if words(report, "judged_by") == "cross-fitting":
        told = "These figures are an estimate by cross-fitting: each prompt was answered by an adapter that was"
        return (f"{told} repaired without it, and not by the one that was written.",)
    if not part(prompts, "judging"):
        return ()
    counts = part(part(prompts, "calibration"), "counts")
    asked = sum(whole(counts, str(kind)) for kind in counts)
    unseen = part(part(prompts, "judging"), "unseen_categories")
    names = sum(len(texts(unseen, str(kind))) for kind in unseen)
    more = f"; {counted(names, 'category', 'categories')} of those that judge had no part in it" if names else ""
    return (f"It was calibrated on {counted(asked, 'other prompt')}{more}.",)


def _of_run(report: Report) -> Verdict:
    steps = parts(report, "steps")
    bad = [step for step in steps if whole(step, "status")]
    if not bad:
        return Verdict("good", "complete", f"{counted(len(steps), 'step')}, each of them complete")
    name = one_line(words(bad[0], "name"))
    return Verdict("bad", "stopped", f"Step {name} ended with status {whole(bad[0], 'status')}")


def _of_writing(report: Report) -> Verdict:
    """Of the commands that make a file and measure no answers."""
    output, planned = part(report, "output"), part(report, "planned_output")
    done = {"extrapolate": "Extrapolated", "merge": "Merged", "convert adapter": "Converted",
            "convert model": "Converted"}.get(words(report, "command"), "Done")  # fmt: skip
    what = next((counted(len(parts(report, key)), key[:-1]) for key in ("modules", "tensors") if key in report), "")
    if planned and not output:
        return Verdict("open", "dry run", f"{what or 'Everything'} would be written; nothing was")
    return Verdict("open", "written" if output else "report", f"{done}{' ' * bool(what)}{what}")


_OF: Mapping[str, Callable[[Report], Verdict]] = {
    "smoke": _of_smoke,
    "tune": _of_tune,
    "demo": _of_demo,
    "project": _of_project,
    "repair": _of_repair,
    "run": _of_run,
}

"""What a report has to tell in a model card: how the output was made, what changed, what was measured.

Reports are taken as the JSON that the command line contract describes, so that a card can be written from a file, too.
Sentences say what was measured and by what, never what that is to mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.errors import FormatError
from converters.identity import plain_name
from converters.model_card import Fact, Section

_WARNING = "Measure what it refuses before relying on it."
_FLOATS = frozenset({"f32", "f16", "bf16", "keep", "auto"})
_KINDS = ("harmful", "borderline", "benign", "task")
_MOST_NAMES = 12
_OF_REPAIR = ("tokens", "tail", "task share")

METHODS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "project": ("A LoRA adapter, projected onto its model's alignment with Safe LoRA (arXiv 2405.16833).",
                ("lora", "safe-lora")),
    "repair": ("A LoRA adapter, repaired: its update was reduced on the inputs on which its model refuses, and kept on "
               "benign ones.", ("lora",)),
    "extrapolate": ("LoX (arXiv 2506.15606): a part of what alignment changed, added to the aligned model's matrices "
                    "once more, so that later fine-tuning undoes less of it.", ("lox",)),
    "merge": ("A model with the updates of LoRA adapters added to its weights.", ("merge",)),
    "convert adapter": ("A LoRA adapter in another format.", ("lora",)),
    "convert model": ("A model in another format or type.", ()),
}  # fmt: skip
"""By command: what was done, and the tags of it."""


def entries_of(report: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A report's list of objects, `inputs`, `modules`, `tensors`, `runs`; empty where it has none."""
    found = report.get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def is_adapter(report: Mapping[str, Any]) -> bool:
    """Whether the report is about an adapter."""
    command = report.get("command")
    return command in ("project", "repair", "convert adapter") or (
        command == "extrapolate" and report.get("as") == "adapter"
    )


def relation(report: Mapping[str, Any]) -> str | None:
    """What hubs call the output's relation to its base model; they have no word for another format alone."""
    if is_adapter(report):
        return "adapter"
    if report.get("command") == "convert model":
        return None if str(report.get("outtype") or "keep").lower() in _FLOATS else "quantized"
    return "merge" if report.get("command") == "merge" else "finetune"


def check_report(report: Mapping[str, Any]) -> None:
    """Raises FormatError: no report of a command that writes something, or one of a dry run."""
    command = report.get("command")
    if not isinstance(command, str) or command not in METHODS:
        raise FormatError(f"this is the report of {command!r}; cards are made of those of {', '.join(METHODS)}")
    if not isinstance(report.get("output"), dict):
        raise FormatError("the report has no output: a dry run has nothing to write a card for")


def description(report: Mapping[str, Any], *, measured: bool) -> str:
    """A sentence or two."""
    method = METHODS[str(report["command"])][0]
    if report["command"] == "repair" and report.get("mu") is None:
        method = "A LoRA adapter as it was: it refused enough of the prompts it was asked, and repair changed nothing."
    return method if measured else f"{method} {_WARNING}"


def own_measurement(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The report itself where its command measures what it writes."""
    return report if report.get("command") == "repair" and entries_of(report, "runs") else None


def settings(report: Mapping[str, Any]) -> dict[str, Fact]:
    """The method's parameters, in order."""
    selection = report.get("selection")
    chosen = selection if isinstance(selection, dict) else {}
    value = chosen.get("value")
    mode = None if not chosen else f"{chosen.get('mode')}" + ("" if value is None else f" {value:g}")
    found = {
        "made by": f"safelora-gguf {report.get('version')}",
        "operator": report.get("operator"),
        "selection": mode,
        "strength": report.get("strength"),
        "rank": report.get("rank"),
        "coef": report.get("coef"),
        "tolerance": report.get("tolerance"),
        "mu": report.get("mu"),
        "eps": report.get("eps"),
        **({key: report.get(key.replace(" ", "_")) for key in _OF_REPAIR} if report.get("command") == "repair" else {}),
        "type": report.get("outtype"),
    }
    return {key: value for key, value in found.items() if isinstance(value, str | int | float)}


def changes(report: Mapping[str, Any]) -> Section | None:
    """What was changed, in figures."""
    tensors = entries_of(report, "modules") or entries_of(report, "tensors")
    items = [*_of_command(report, tensors), *_types(tensors), *_rounding(tensors)]
    return Section("What was changed", items=items) if items else None


def _of_command(report: Mapping[str, Any], tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    command = report.get("command")
    if command == "project":
        yield f"projected: {report.get('projected')} of {report.get('total')} matrices"
        yield from _span("cosines between the projected update and the update", _numbers(tensors, "cosine"), ".3f")
        yield from _norm_ratio(report)
    elif command == "repair":
        yield f"repaired: {report.get('repaired')} of {report.get('total')} matrices"
        yield from _span("share of the update kept on benign inputs", _numbers(tensors, "kept_benign"), ".1%")
        yield from _span("share kept where the model refuses", _numbers(tensors, "kept_harmful"), ".1%")
        yield from _norm_ratio(report)
    elif command == "extrapolate":
        used = [entry for entry in tensors if entry.get("singular_values") or entry.get("r_align")]
        yield f"extrapolated: {len(used) or len(tensors)} of {len(tensors)} matrices"
        yield from _span("share of the alignment's norm in the directions used", _numbers(tensors, "r_align"), ".3f")
    elif command == "merge":
        changed = [entry for entry in tensors if entry.get("adapters")]
        yield f"changed by adapters: {len(changed) or len(tensors)} tensors"
        yield from _span("size of the change, relative to the weight", _numbers(tensors, "delta_norm"), ".2%")
    else:
        yield f"converted: {len(tensors)} {'pairs' if command == 'convert adapter' else 'tensors'}"


def _norm_ratio(report: Mapping[str, Any]) -> Iterator[str]:
    ratio = report.get("norm_ratio")
    if isinstance(ratio, float):
        yield f"norm of the whole update, after to before: {ratio:.3f}"


def _types(tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    types = Counter(str(entry["type"]) for entry in tensors if entry.get("type"))
    if types:
        yield f"types: {', '.join(f'{count} {name}' for name, count in types.most_common(_MOST_NAMES))}"


def _rounding(tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    errors = _numbers(tensors, "stored_error")
    if errors:
        yield f"largest relative rounding error of what was written: {max(errors):.2g}"


def _span(what: str, values: Sequence[float], form: str) -> Iterator[str]:
    if values:
        yield f"{what}: {min(values):{form}} to {max(values):{form}}"


def measured(smoke: Mapping[str, Any] | None, *, of_output: bool = True) -> Section:
    """The refusals that were measured, by run; or that nothing was.

    Args:
        smoke: a smoke test's report, or that of a command which measures what it writes.
        of_output: whether the files measured are the card's own, and not others made of them.

    Raises:
        FormatError: no report of a smoke test.
    """
    if smoke is None:
        return Section("Refusals", paragraphs=("Not measured.",))
    prompts, runs = _asked(smoke), entries_of(smoke, "runs")
    if smoke.get("command") not in ("smoke", "repair") or not runs or not isinstance(prompts, dict):
        raise FormatError("this is no report of a smoke test; make one with: safelora-gguf smoke --report FILE.json")
    counted = prompts.get("counts")
    counts = [f"{counted[kind]} {kind}" for kind in _KINDS if counted.get(kind)] if isinstance(counted, dict) else []
    files = [f"{entry.get('role')} {plain_name(Path(str(entry.get('path'))))} ({entry.get('fingerprint')})"
             for entry in entries_of(smoke, "inputs")]  # fmt: skip
    told = (
        f"Measured in llama.cpp with greedy answers to the prompts {prompts.get('name')}, version "
        f"{prompts.get('version')} ({', '.join(counts)}), by the judge {smoke.get('judge')}. The last run decides; by "
        f"{_bounds(smoke.get('bounds'))}, the verdict is: {smoke.get('verdict')}.",
        *_calibrated(smoke),
        *_task_unmeasured(smoke),
        *((f"Measured on files made of this output: {', '.join(files)}.",) if not of_output else ()),
        *_controlled(smoke.get("controls")),
        "These are rates over these prompts by this judge, 95 % intervals in brackets; other prompts may be answered "
        "otherwise.",
    )
    controls = smoke.get("controls")
    measured = [*runs[:-1], *(entries_of(controls, "runs") if isinstance(controls, dict) else ()), *runs[-1:]]
    return Section("Refusals", paragraphs=told, columns=_HEADS, rows=[_run(run) for run in measured])


def _asked(smoke: Mapping[str, Any]) -> object:
    """The prompts that the runs were asked: of a repair those that judge, or calibrate and judge."""
    prompts = smoke.get("prompts")
    if smoke.get("command") != "repair" or not isinstance(prompts, dict):
        return prompts
    return prompts.get("judging") or prompts.get("calibration")


def _calibrated(smoke: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a repair, by which prompts it was made."""
    prompts = smoke.get("prompts")
    if smoke.get("command") != "repair" or not isinstance(prompts, dict):
        return ()
    if not prompts.get("judging"):
        return _SAME.get(str(smoke.get("judged_by")), ()) if smoke.get("mu") is not None else ()
    made = prompts.get("calibration")
    found = made if isinstance(made, dict) else {}
    return (f"The repair was calibrated on others: {found.get('name')}, version {found.get('version')}.",)


_SAME: Mapping[str, tuple[str, ...]] = {
    "cross-fitting": (
        "The run repaired is an estimate by cross-fitting: the same prompts calibrated the adapter, so each was "
        "answered with one that was repaired without it and its fold, not with this one. This one was asked in the run "
        "repaired, on prompts that calibrated it, which flatters it.",
    ),
    "calibration prompts": ("The same prompts calibrated the repair, which flatters its figures.",),
}
"""By what judged a repair."""


def _task_unmeasured(smoke: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a repair, where nothing is known of what its adapter was made for."""
    runs = entries_of(smoke, "runs")
    known = smoke.get("command") != "repair" or runs[-1].get("task_rate") is not None
    return () if known else ("The adapter's own task was not measured.",)


def _bounds(found: object) -> str:
    if not isinstance(found, dict):
        return "the bounds that were set"
    least, most = _rate(found.get("min_refusal")), _rate(found.get("max_over_refusal"))
    how = ", refusals held against the lower end of their interval" if found.get("confident") else ""
    return f"the bounds that were set (at least {least} of harmful and at most {most} of harmless prompts refused{how})"


def _controlled(found: object) -> tuple[str, ...]:
    """What the controls say, in the report's own sentences."""
    sentences = found.get("sentences") if isinstance(found, dict) else None
    return tuple(map(str, sentences)) if isinstance(sentences, list) else ()


_HEADS = ("run", "harmful prompts refused", "harmless prompts refused", "tasks solved", "undecided answers")


def _run(run: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("refusal", "over_refusal", "task")
    intervals = run.get("intervals")
    ends = intervals if isinstance(intervals, dict) else {}
    label = str(run.get("label")) + (" (control)" if run.get("role") == "control" else "")
    rates = (_rate(run.get(f"{key}_rate"), ends.get(key)) for key in keys)
    return f"{label} (failed)" if run.get("error") else label, *rates, str(run.get("undecided"))


def _rate(value: object, interval: object = None) -> str:
    """A share in percent, with its interval where there is one."""
    if not isinstance(value, int | float):
        return "-"
    if isinstance(interval, list) and len(interval) == 2 and all(isinstance(end, int | float) for end in interval):
        return f"{value:.1%} ({100 * interval[0]:.0f}-{100 * interval[1]:.0f})"
    return f"{value:.1%}"


def _numbers(tensors: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(value) for entry in tensors if isinstance(value := entry.get(key), int | float)]

"""What a search's winner is held against: simpler ways, the best of its kind, and controls.

The controls are those of a winner that is repaired, else of the best projection: whatever wins, the report says whether
that method beat the same loss of size without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from safelora_gguf.smoke.controls import RANDOM, SCALED, controls_entry
from safelora_gguf.smoke.plan import RunPlan
from safelora_gguf.smoke.protocol import AdapterChoice
from safelora_gguf.smoke.runs import Run
from safelora_gguf.tune.figures import Goal
from safelora_gguf.tune.found import Candidate, Found
from safelora_gguf.tune.grid import SCALING
from safelora_gguf.tune.making import Making
from safelora_gguf.tune.measuring import ADAPTER, Measuring, figures_of

EXTRA = 3
"""Measurements with text that comparing takes at most: everything projected, and two controls."""

EXTRA_OF_REPAIR = 1
"""The same where nothing is projected: one control."""


@dataclass(frozen=True)
class Compared:
    """What stands beside the winner.

    Attributes:
        beside: labels of runs by what they stand for: `winner`, `projection`, `everything`, `repair`, `scaling`.
        runs: theirs, the winner's first.
        controls: what plain scaling, and for a projection a random subspace, did instead; None where nothing was
            projected, and no winner repaired.
        control_runs: theirs.
    """

    beside: Mapping[str, str]
    runs: tuple[Run, ...]
    controls: Mapping[str, Any] | None
    control_runs: tuple[Run, ...]


def compare(found: Found, making: Making, measuring: Measuring, goal: Goal) -> tuple[Found, Compared]:
    """Measures what is missing; what turns out to be better than the winner on the way takes its place."""
    found, everything = _with_everything(found, making, measuring, goal)
    projection = found.best([one for one in found.candidates if making.projects(one)], goal) or everything
    repair = found.best([one for one in found.candidates if making.repairs(one)], goal)
    subject = repair if repair is not None and repair == found.winner else projection
    controls, control_runs = (None, ()) if subject is None else _controls(subject, making, measuring)
    if controls is not None:
        found = _with_scaled(found, making.scaled(controls["norm_ratio"]), control_runs[0], measuring, goal)
    scalings = [one for one in found.candidates if one.line == SCALING]
    beside = {
        "winner": found.winner,
        "projection": projection,
        "everything": everything,
        "repair": repair,
        "scaling": found.best(scalings, goal),
    }
    runs = {name: measuring.runs[one.key] for name, one in beside.items() if one is not None}
    own = {run.label: run for run in runs.values()}
    labels = {name: run.label for name, run in runs.items()}
    return found, Compared(labels, tuple(own.values()), controls, control_runs)


def _with_everything(found: Found, making: Making, measuring: Measuring, goal: Goal) -> tuple[Found, Candidate | None]:
    """Everything projected, measured with text: a candidate like any other where the grid has it."""
    everything = making.everything
    if everything is None:
        return found, None
    key = everything.key
    candidate = next((one for one in found.candidates if one.key == key), everything)
    figures = measuring.full(candidate)
    return found.joined(candidate, figures, goal) if candidate in found.candidates else found, candidate


def _controls(
    subject: Candidate, making: Making, measuring: Measuring
) -> tuple[dict[str, Any] | None, tuple[Run, ...]]:
    """The adapter scaled to the candidate's norm, and a random subspace in the place of a projection's."""
    way = making.way(subject)
    if way.norm_ratio is None or not way.modules:
        return None, ()
    scaled = _at_scale(making.scaled(way.norm_ratio), subject, making, measuring)
    random = None if way.control is None else measuring.as_control(RANDOM, way.control, of=subject.name)
    own = measuring.runs[subject.key]
    entry = controls_entry(own, scaled, random, way.norm_ratio, ADAPTER, whose="the adapter's")
    return entry, (scaled,) if random is None else (scaled, random)


def _at_scale(same: Candidate, subject: Candidate, making: Making, measuring: Measuring) -> Run:
    """The adapter at a scale as a control, unless it was measured as a candidate."""
    known = measuring.runs.get(same.key)
    if known is not None:
        return replace(known, label=SCALED, role="control")
    scale = making.way(same).scale
    assert scale is not None, "it only scales"
    plan = RunPlan(SCALED, (AdapterChoice(str(measuring.untouched), scale),), "control")
    return measuring.run(plan, of=subject.name)


def _with_scaled(found: Found, same: Candidate, run: Run, measuring: Measuring, goal: Goal) -> Found:
    """The scaled control as a candidate, where it is better than whatever was found."""
    if same.key in found.full:
        return found
    own = replace(run, label=same.name, role="adapter")
    joined = found.joined(same, figures_of(own), goal)
    if joined.winner is not same:
        return found
    measuring.runs[same.key] = own
    return joined

"""What a search measured and chose, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from converters.errors import Error
from safelora_gguf._version import __version__
from safelora_gguf.repair.report import PromptHalf
from safelora_gguf.report import InputReport, OutputReport, output_entry
from safelora_gguf.smoke.comparison import Flips, all_flips
from safelora_gguf.smoke.confidence import Confidence, confidence_of
from safelora_gguf.smoke.report import Bounds, PromptSummary, Verdict
from safelora_gguf.smoke.runs import Run
from safelora_gguf.tune.figures import Figures, Goal, UtilityName
from safelora_gguf.tune.found import Candidate, Found
from safelora_gguf.tune.ways import Command, Described, Origin, Way, Written


@dataclass(frozen=True)
class CandidateReport:
    """One candidate with its figures.

    Attributes:
        same_as: the name of one before it that is the same adapter, which was measured for both.
        changed: how many modules are projected or repaired, each by itself.
        total: how many modules the adapter has.
        figures: the dearest that were measured; None where nothing was.
        coarse: what the coarse pass said, where the full one measured it, too.
        command: makes it, too; None where only a scale at run time does.
    """

    name: str
    line: str
    origin: Origin
    setting: Mapping[str, Any]
    same_as: str | None
    changed: int
    total: int
    norm_ratio: float | None
    figures: Figures | None
    coarse: Figures | None
    utility: float | None
    reaches: bool
    command: Command | None

    def to_json(self) -> dict[str, Any]:
        shown = self.figures or Figures("coarse")
        intervals = {name: None if ends is None else list(ends) for name, ends in shown.intervals.items()}
        fields: dict[str, Any] = {
            "name": self.name,
            "line": self.line,
            "setting": dict(self.setting),
            "same_as": self.same_as,
            "projected": self.changed if self.origin == "projection" else 0,
            "repaired": self.changed if self.origin == "repair" else 0,
            "total": self.total,
            "norm_ratio": self.norm_ratio,
            "stage": None if self.figures is None else shown.stage,
            "refusal_rate": shown.refusal_rate,
            "over_refusal_rate": shown.over_refusal_rate,
            "task_rate": shown.task_rate,
            "utility": self.utility,
            "kl": shown.kl,
            "top1": shown.top1,
            "intervals": intervals,
            "coarse": None if self.coarse is None else _coarse(self.coarse),
            "reaches": self.reaches,
        }
        return fields if shown.error is None else {**fields, "error": shown.error}


def _coarse(figures: Figures) -> dict[str, Any]:
    rates = {"refusal_rate": figures.refusal_rate, "over_refusal_rate": figures.over_refusal_rate}
    return {**rates, "top1": figures.top1}


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        runs: the aligned model, the adapter, the chosen or nearest candidate, and what it is compared with.
        chosen: the best that reaches the bounds, which was written.
        nearest: where none does, the best of those that come nearest.
        written: the report on writing the chosen or nearest one.
        looked_for: the refusal rate that the search went by, where the aligned model itself misses the bound.
        controls: of what won before it was held against them, if that is repaired; else of the best projection, whether
            or not it won. A scaled control that does better is the winner then.
        beside: what was measured fully, by what it stands for (see `comparing`): label of its run.
    """

    judges: tuple[str, ...]
    runs: tuple[Run, ...]
    candidates: tuple[CandidateReport, ...]
    chosen: CandidateReport | None
    nearest: CandidateReport | None
    written: Written | None
    output: OutputReport | None
    failure: Error | None
    controls: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    beside: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    looked_for: float | None = None


@dataclass(frozen=True)
class Planned:
    """What a search asks at most.

    Attributes:
        texts: measurements with text, of all prompts each.
        first_tokens: measurements by first tokens, of the prompts that aren't tasks.
        prompts: how many there are.
        lines: names and settings of the grid.
    """

    texts: int
    first_tokens: int
    prompts: int
    lines: tuple[tuple[str, tuple[Described, ...]], ...]

    def to_json(self) -> dict[str, Any]:
        candidates = [{"name": setting.name, "line": line, "setting": setting.to_json()}
                      for line, settings in self.lines for setting in settings]  # fmt: skip
        measurements = {"texts": self.texts, "first_tokens": self.first_tokens, "prompts": self.prompts}
        return {"planned_measurements": measurements, "candidates": candidates}


@dataclass(frozen=True)
class TuneReport:
    """The result of `tune`.

    Attributes:
        goal: bounds, and which figure is the utility.
        settings: how the model was run, as options of the command line, and the grid.
        planned_output: where the chosen adapter goes, and its size in bytes.
        plan: what is measured at most.
        tuned: None after a dry run.
        calibration, judging: what repair is calibrated with and what judges; None where nothing is repaired.
    """

    goal: Goal
    prompts: PromptSummary
    settings: Mapping[str, Any]
    inputs: tuple[InputReport, ...]
    planned_output: tuple[str, int]
    plan: Planned
    tuned: Tuned | None = None
    notes: tuple[str, ...] = ()
    calibration: PromptHalf | None = None
    judging: PromptHalf | None = None

    @property
    def bounds(self) -> Bounds:
        return self.goal.bounds

    @property
    def utility_is(self) -> UtilityName:
        return self.goal.utility_is

    @property
    def verdict(self) -> Verdict:
        """Whether a candidate reaches the bounds. It never says that a model is safe."""
        return "pass" if self.tuned is not None and self.tuned.chosen is not None else "fail"

    @property
    def failure(self) -> Error | None:
        """The first thing that llama.cpp failed on."""
        return None if self.tuned is None else self.tuned.failure

    @property
    def deciding(self) -> Run | None:
        """The run of the chosen or nearest candidate."""
        if self.tuned is None:
            return None
        winner = self.tuned.chosen or self.tuned.nearest
        label = None if winner is None else self.tuned.beside.get("winner")
        return next((run for run in self.tuned.runs if run.label == label), None)

    @property
    def nearest_command(self) -> str | None:
        """What makes the nearest candidate; None where one was chosen, or no command but this one's own makes it."""
        nearest = None if self.tuned is None else self.tuned.nearest
        if nearest is None or nearest.command is None:
            return None
        return nearest.command.line({item.role: item.path for item in self.inputs}, self.planned_output[0])

    @property
    def flips(self) -> tuple[Flips, ...]:
        return () if self.tuned is None or self.deciding is None else all_flips(self.tuned.runs, self.deciding)

    @property
    def confidence(self) -> Confidence | None:
        return None if self.deciding is None else confidence_of(self.deciding, self.bounds)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that the command line contract describes."""
        told: dict[str, Any] = {
            "command": "tune",
            "version": __version__,
            "inputs": [item.to_json() for item in self.inputs],
            "bounds": self.bounds.to_json(),
            "settings": dict(self.settings),
            "prompts": asdict(self.prompts),
            "repair_prompts": self._repair_prompts(),
            "utility_is": self.utility_is,
            "notes": [*self.notes, *(self.tuned.notes if self.tuned is not None else ())],
        }
        if self.tuned is None:
            return told | self.plan.to_json() | output_entry(None, self.planned_output)
        told |= _tuned_json(self.tuned) | self._deciding_json()
        told |= {} if self.tuned.output is None else {"output": self.tuned.output.to_json()}
        return told if self.failure is None else {**told, "error": self.failure.to_json()}

    def _repair_prompts(self) -> dict[str, Any] | None:
        """Those that repair is calibrated with, and those that judge, as `repair` tells them."""
        if self.calibration is None or self.judging is None:
            return None
        return {"calibration": self.calibration.to_json(), "judging": self.judging.to_json()}

    def _deciding_json(self) -> dict[str, Any]:
        return {
            "deciding": None if self.deciding is None else self.deciding.label,
            "flips": [flips.to_json() for flips in self.flips],
            "confidence": None if self.confidence is None else self.confidence.to_json(),
            "nearest_command": self.nearest_command,
            "verdict": self.verdict,
        }


def _tuned_json(tuned: Tuned) -> dict[str, Any]:
    winner = tuned.chosen or tuned.nearest
    written = None if tuned.written is None else tuned.written.to_json()
    if written is not None and tuned.output is None:
        written.pop("output", None)  # it was made, measured and taken away
    repaired = winner is not None and winner.origin == "repair"
    return {
        "judge": tuned.judges[0],
        "judges": list(tuned.judges),
        "runs": [run.to_json() for run in tuned.runs],
        "controls": None if tuned.controls is None else dict(tuned.controls),
        "calibration": None if tuned.calibration is None else dict(tuned.calibration),
        "candidates": [candidate.to_json() for candidate in tuned.candidates],
        "chosen": None if tuned.chosen is None else tuned.chosen.to_json(),
        "nearest": None if tuned.nearest is None else tuned.nearest.to_json(),
        "beside": dict(tuned.beside),
        "project": None if repaired else written,
        "repair": written if repaired else None,
    }


def report_candidate(candidate: Candidate, found: Found, way: Way, total: int, goal: Goal) -> CandidateReport:
    """A candidate with what was found of it.

    Args:
        total: modules of the adapter.
    """
    figures, same = found.figures(candidate), found.same_as(candidate)
    full = candidate.key in found.full
    return CandidateReport(
        name=candidate.name,
        line=candidate.line,
        origin=way.origin,
        setting=way.setting,
        same_as=None if same is None else same.name,
        changed=way.modules,
        total=total,
        norm_ratio=way.norm_ratio,
        figures=figures,
        coarse=found.coarse.get(candidate.key) if full else None,
        utility=None if figures is None else figures.utility(goal.utility_is),
        reaches=full and figures is not None and goal.passes(figures),
        command=way.command,
    )

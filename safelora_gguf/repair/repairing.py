"""A repair that was checked: what it would do, and its doing, in one llama.cpp process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from converters.adapters.output import AdapterOutput
from safelora_gguf.losses import losses_of
from safelora_gguf.repair.capturing import CapturedSets
from safelora_gguf.repair.choosing import Tried
from safelora_gguf.repair.inputs import RepairInputs
from safelora_gguf.repair.making import Method, Repairs, deal_folds, write_measured
from safelora_gguf.repair.measuring import Measuring
from safelora_gguf.repair.modules import module_notes, module_reports
from safelora_gguf.repair.progress import Meter, Progress
from safelora_gguf.repair.prompt_halves import categories_of, unseen_categories
from safelora_gguf.repair.repaired import Repaired, Wishes
from safelora_gguf.repair.report import CapturedPart, CapturedReport, PromptHalf, RepairReport, SearchStep
from safelora_gguf.repair.running import Course
from safelora_gguf.repair.writing import original_pairs
from safelora_gguf.report import OutputReport
from safelora_gguf.scratch import scratch_beside
from safelora_gguf.smoke.asking import Asking
from safelora_gguf.smoke.instrument import Instrument
from safelora_gguf.smoke.judging import KEYWORD, Panel
from safelora_gguf.smoke.parent.process import CHILD_COMMAND
from safelora_gguf.smoke.parent.session import Limits, Session
from safelora_gguf.smoke.prompts import PromptSet
from safelora_gguf.smoke.protocol import ModelOptions
from safelora_gguf.smoke.report import PromptSummary, SmokeReport

_SEARCHED = 6
"""Measurements by first tokens that a search takes at most; and two by text, as a rule."""

FOUND_IN_SAMPLE = (
    "too few prompts or categories calibrate to try mu on some that were left out: it may be larger for others"
)
NO_TASKS = (
    "no task prompts calibrate: of the adapter's own task only as much is protected as harmless prompts show of it; "
    "give some with --prompts"
)
CROSS_FITTED = (
    "the same prompts calibrate and judge: each is judged by an adapter that was repaired without its fold, one of "
    "{count}; --judge-prompts gives others"
)
IN_SAMPLE = (
    "too few prompts or categories to judge each by a repair without it: the same prompts calibrate and judge, which "
    "flatters the figures; give others with --judge-prompts"
)


@dataclass(frozen=True)
class Purposes:
    """Prompts by what they are for.

    Attributes:
        judging: None: those that calibrate judge, too, by cross-fitting.
    """

    calibration: PromptSet
    judging: PromptSet | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Repairing:
    """A repair whose inputs have passed every check that headers and prompt files allow.

    Attributes:
        notes: what a careful reader should know of the model.
        output: where the result goes.
    """

    inputs: RepairInputs
    notes: tuple[str, ...]
    purposes: Purposes
    asking: Asking
    options: ModelOptions
    wishes: Wishes
    method: Method
    output: AdapterOutput
    command: Sequence[str] = CHILD_COMMAND

    def planned(self) -> RepairReport:
        """What would be done."""
        return self._report(None, None, 0)

    def run(self, progress: Progress | None = None) -> RepairReport:
        """The repair.

        Args:
            progress: called with (prompts done, prompts in all as far as is known, what is being done).

        Raises:
            MissingLlamaError: llama-cpp-python does not load.
            UnsupportedError: the weights' inputs can't be found in this model, or values don't fit the type.
            WriteError, OutputPathError: see `converters.atomic`.
        """
        limits = Limits(self.asking.load_limit, self.asking.time_limit)
        calibration = self.purposes.calibration
        folds = self._folds()
        meter = Meter(progress, self._expected())
        with (
            scratch_beside(self.output.target, "repair") as scratch,
            Session(self.options, limits, self.command) as session,
        ):
            untouched = scratch / "adapter.gguf"
            write_measured(self.inputs, untouched, original_pairs(self.inputs), self.method.outtype)
            repairs = Repairs(
                session, self.inputs, untouched, calibration, self.method, scratch, folds=folds, tell=meter.tell
            )
            instrument = Instrument(calibration, Panel((KEYWORD,)))
            calibrating = Measuring(session, instrument, untouched, scratch, meter, folds)
            found = Course(self.wishes, repairs, calibrating, self.purposes.judging, self.output).run()
            meter.finish()
            return self._report(found, repairs.captured, len(set(folds)) or 1)

    def _folds(self) -> tuple[int, ...]:
        """Of the prompts that calibrate; none where they can't be dealt out."""
        folds = deal_folds(self.purposes.calibration.prompts)
        return folds if max(folds, default=0) else ()

    def _expected(self) -> int:
        """Prompts to be asked, as a rule."""
        calibration, judging = self.purposes.calibration, self.purposes.judging
        own, judged = len(calibration.prompts), len((judging or calibration).prompts)
        first_tokens = own - calibration.counts["task"]
        runs = own if judging is not None else 0  # the aligned model is asked both sets
        search = own + _SEARCHED * first_tokens + 2 * own if self.wishes.mu is None else 0
        return runs + search + 4 * judged

    def _report(self, found: Repaired | None, captured: CapturedSets | None, folds: int) -> RepairReport:
        figures = {} if found is None else found.figures
        roundings = None if found is None else found.roundings
        output = self.output
        notes = module_notes(self.inputs, output, figures, roundings, outtype=self.method.outtype)
        return RepairReport(
            mu=None if found is None else found.mu,
            mu_mode="auto" if self.wishes.mu is None else "given",
            eps=self.method.eps,
            tokens=self.method.tokens,
            tail=self.method.tail,
            task_share=self.method.task_share,
            outtype=self.method.outtype,
            modules=module_reports(self.inputs, output, figures, roundings),
            inputs=self.inputs.reports,
            calibration=_half(self.purposes.calibration),
            judging=None if self.purposes.judging is None else _half(self.purposes.judging, self.purposes.calibration),
            planned_output=(str(output.target), output.planned_bytes()),
            output=None if roundings is None else OutputReport.of(output.target, output.tensor_file),
            captured=None if captured is None else _captured(captured),
            search=tuple(_step(one, folds) for one in (found.chosen.tried if found and found.chosen else ())),
            measured=self._measured(found or Repaired(self.wishes.judges, ())),
            notes=(*self._own_notes(), *(found.notes if found is not None else ()), *notes),
            losses=losses_of(self.inputs.adapter, output),
            own_failure=None if found is None else found.failure,
        )

    def _measured(self, found: Repaired) -> SmokeReport:
        """The judged runs, or as many as there are."""
        prompts = self.purposes.judging or self.purposes.calibration
        return SmokeReport(
            judges=found.judges,
            prompts=PromptSummary(prompts.name, prompts.version, prompts.counts),
            runs=found.runs,
            bounds=self.wishes.bounds,
            settings=self._settings(),
            controls=found.controls,
            calibration=found.calibration,
        )

    def _settings(self) -> dict[str, Any]:
        return self.asking.settings(self.options)

    def _own_notes(self) -> tuple[str, ...]:
        purposes = self.purposes
        notes = [*self.notes, *purposes.notes, *purposes.calibration.notes]
        notes += [] if purposes.judging is None else purposes.judging.notes
        notes += [] if purposes.calibration.counts["task"] else [NO_TASKS]
        folds = len(set(self._folds()))
        if purposes.judging is None:
            notes.append(CROSS_FITTED.format(count=folds) if folds else IN_SAMPLE)
        elif not folds and self.wishes.mu is None:
            notes.append(FOUND_IN_SAMPLE)
        return tuple(notes)


def _half(prompts: PromptSet, calibration: PromptSet | None = None) -> PromptHalf:
    """
    Args:
        calibration: what the prompts were not calibrated on.
    """
    unseen = None if calibration is None else unseen_categories(calibration, prompts)
    return PromptHalf(prompts.name, prompts.version, prompts.counts, categories_of(prompts), unseen)


def _captured(sets: CapturedSets) -> CapturedReport:
    harmful, benign = (CapturedPart(one.prompts, one.tokens) for one in (sets.harmful, sets.benign))
    return CapturedReport(harmful, benign, len(sets.groups), sets.bytes, sets.passes)


def _step(tried: Tried, folds: int) -> SearchStep:
    found = tried.figures
    rates = [None if count is None or not count[1] else count[0] / count[1]
             for count in (found.refusals, found.over_refusals, found.tasks)]  # fmt: skip
    return SearchStep(tried.mu, tried.by, folds, *rates)

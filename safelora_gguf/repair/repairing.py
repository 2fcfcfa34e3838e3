"""A repair that was checked: what it would do, and its doing, in one llama.cpp process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from converters.adapters.output import AdapterOutput
from safelora_gguf.losses import losses_of
from safelora_gguf.repair.choosing import Tried
from safelora_gguf.repair.inputs import RepairInputs
from safelora_gguf.repair.making import Method, Repairs, deal_folds, write_measured
from safelora_gguf.repair.measuring import Measuring
from safelora_gguf.repair.modules import module_notes, module_reports
from safelora_gguf.repair.progress import Meter, Progress
from safelora_gguf.repair.reading.capturing import CapturedSets
from safelora_gguf.repair.repaired import Repaired, Wishes
from safelora_gguf.repair.report import CapturedReport, PromptHalf, RepairReport, SearchStep
from safelora_gguf.repair.running import Course
from safelora_gguf.repair.writing import original_pairs
from safelora_gguf.report import OutputReport
from safelora_gguf.scratch import roomy_scratch, scratch_beside
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
    "estimated by cross-fitting, as the same prompts calibrate and judge: each is judged by an adapter that was "
    "repaired without its fold, one of {count}, and not by the one that is written{chosen}; --judge-prompts gives "
    "others"
)
CHOSE_MU = "; mu was chosen on them, too, which flatters the figures a little"
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
            roomy_scratch(scratch) as roomy,
            Session(self.options, limits, self.command) as session,
        ):
            untouched = scratch / "adapter.gguf"
            write_measured(self.inputs, untouched, original_pairs(self.inputs), self.method.outtype)
            repairs = Repairs(
                session, self.inputs, untouched, calibration, self.method, scratch, folds=folds, tell=meter.tell,
                roomy=roomy,
            )  # fmt: skip
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
        return runs + search + (5 if judging is None and self._folds() else 4) * judged

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
            calibration=PromptHalf.of(self.purposes.calibration),
            judging=self._judging(),
            planned_output=(str(output.target), output.planned_bytes()),
            output=None if roundings is None else OutputReport.of(output.target, output.tensor_file),
            captured=None if captured is None else CapturedReport.of(captured),
            search=tuple(_step(one, folds) for one in (found.chosen.tried if found and found.chosen else ())),
            measured=self._measured(found or Repaired(self.wishes.judges, ())),
            notes=(*self._own_notes(found), *(found.notes if found is not None else ()), *notes),
            losses=losses_of(self.inputs.adapter, output),
            own_failure=None if found is None else found.failure,
            judged_by=None if found is None else found.judged_by,
        )

    def _judging(self) -> PromptHalf | None:
        calibration, judging = self.purposes.calibration, self.purposes.judging
        return None if judging is None else PromptHalf.of(judging, calibration)

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

    def _own_notes(self, found: Repaired | None) -> tuple[str, ...]:
        purposes = self.purposes
        unchanged = found is not None and found.roundings is not None and found.mu is None
        notes = [*self.notes, *purposes.notes, *purposes.calibration.notes]
        notes += [] if purposes.judging is None else purposes.judging.notes
        notes += [] if purposes.calibration.counts["task"] else [NO_TASKS]
        folds = len(set(self._folds()))
        if purposes.judging is None and not unchanged:
            chosen = CHOSE_MU if self.wishes.mu is None else ""
            notes.append(CROSS_FITTED.format(count=folds, chosen=chosen) if folds else IN_SAMPLE)
        elif not folds and self.wishes.mu is None:
            notes.append(FOUND_IN_SAMPLE)
        return tuple(notes)


def _step(tried: Tried, folds: int) -> SearchStep:
    found = tried.figures
    rates = [None if count is None or not count[1] else count[0] / count[1]
             for count in (found.refusals, found.over_refusals, found.tasks)]  # fmt: skip
    return SearchStep(tried.mu, tried.by, folds, *rates)

"""A repair from the first question to the written adapter: calibrate, read, choose mu, judge, write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.adapters.output import AdapterOutput
from converters.errors import Error, LlamaError
from safelora_gguf.repair.choosing import (
    OCTAVES,
    Chosen,
    Figures,
    choose,
    how_chosen,
    standard_error_above,
    with_margin,
)
from safelora_gguf.repair.making import Repairs
from safelora_gguf.repair.measuring import (
    ADAPTER,
    ALIGNED,
    IN_SAMPLE_RUN,
    REPAIRED,
    Adapters,
    Measuring,
    always,
    figures_of,
)
from safelora_gguf.repair.modules import module_reports, norm_ratio
from safelora_gguf.repair.repaired import BY_TEXT_ALONE, ENOUGH_AS_IT_IS, NOTHING_REFUSED, JudgedBy, Repaired, Wishes
from safelora_gguf.repair.telling import RESTARTED, WITHOUT_FOLD, named, settled, shown
from safelora_gguf.repair.writing import RepairFacts, original_pairs, write_repaired
from safelora_gguf.smoke.controls import SCALED, controls_entry
from safelora_gguf.smoke.instrument import Instrument, calibrated, calibration_entry
from safelora_gguf.smoke.notes import notes_on, unasked_notes, utility_note
from safelora_gguf.smoke.plan import RunPlan
from safelora_gguf.smoke.prompts import PromptSet
from safelora_gguf.smoke.protocol import AdapterChoice
from safelora_gguf.smoke.report import Bounds, meets
from safelora_gguf.smoke.runs import Run

if TYPE_CHECKING:
    from safelora_gguf.repair.solving.solver import ModuleFigures


@dataclass
class Course:
    """One repair on its way.

    Attributes:
        repairs: of the prompts that calibrate.
        calibrating: measures on them.
        judging: prompts that judge; None: those that calibrate do, each by an adapter that was repaired without it.
        output: where the result goes.
    """

    wishes: Wishes
    repairs: Repairs
    calibrating: Measuring
    judging: PromptSet | None
    output: AdapterOutput
    notes: list[str] = field(default_factory=list)
    _chosen: Chosen | None = None
    _looked_for: float | None = None
    _entry: Mapping[str, Any] | None = None
    _end: Error | None = None  # what it could not go on after

    def run(self) -> Repaired:
        """Everything, until the output is written.

        Raises:
            MissingLlamaError: llama-cpp-python does not load.
            UnsupportedError: the weights' inputs can't be found in this model, or values don't fit the type.
            WriteError, OutputPathError: see `converters.atomic`.
        """
        aligned = self._calibrated()
        if not aligned.measured or self._nothing_to_restore(aligned):
            return self._ended()
        try:
            return self._repaired()
        except LlamaError as error:
            self._end = error
            return self._ended()

    def _calibrated(self) -> Run:
        """The aligned model's run, which sets up the judges and the score, and tells what it refuses."""
        measuring, plan = self.calibrating, RunPlan(ALIGNED, (), "model")
        prompts, session = measuring.instrument.prompts, measuring.session
        with measuring.meter.step(ALIGNED, len(prompts.prompts)) as tell:
            panel, calibration, run = calibrated(
                session, plan, prompts, self.wishes.judges, score=self.wishes.mu is None, tell=tell
            )
        measuring.instrument = Instrument(prompts, panel, calibration)
        self._entry = None if calibration is None else calibration_entry(calibration, session.pieces())
        refused = {one.id for one in run.responses if one.kind == "harmful" and one.refused is True}
        self.repairs.refused = tuple(prompt for prompt in prompts.prompts if prompt.id in refused)
        return measuring.keep(run)

    def _nothing_to_restore(self, aligned: Run) -> bool:
        refused, asked = aligned.refusals
        if not refused:
            told = [NOTHING_REFUSED.format(asked=asked)] if aligned.undecided_harmful < asked else []
            self.notes += told  # of answers that can't be judged there is a note of its own
        elif not self.wishes.bounds.refuses(aligned.refusals):
            self.notes.append(
                f"the aligned model itself refuses {refused} of {asked} harmful prompts that calibrate, which doesn't "
                f"reach the bound"
            )
            if self.wishes.mu is None:
                bound = self.wishes.bounds.min_refusal
                self.notes.append(f"mu was looked for that brings back {bound:.0%} of what the aligned model refuses")
                self._looked_for = bound * refused / asked
        return not refused

    def _repaired(self) -> Repaired:
        if self.wishes.mu is not None:
            return self._judged(self.wishes.mu)
        adapter = figures_of(self.calibrating.run(ADAPTER, self._as_it_is))
        if adapter.refusals is None:
            return self._ended()
        if self.wishes.bounds.refuses(adapter.refusals):
            self.notes.append(ENOUGH_AS_IT_IS)
            return self._judged(None)
        if len(self.repairs.read().plan) > 1:  # inputs are read anew for every solution: as many at once as can be
            self.repairs.solve(OCTAVES, self.calibrating.fold_numbers)
        bound = self.wishes.bounds.min_refusal if self._looked_for is None else self._looked_for
        self._chosen = choose(
            self._score if self.calibrating.instrument.by_score else None,
            self._text,
            Bounds(bound).refuses,
            standard_error_above(bound),
        )
        enough, self._chosen = self._chosen.mu, with_margin(self._chosen, self._text)
        self.notes += [] if self.calibrating.instrument.by_score else [BY_TEXT_ALONE]
        self.notes += how_chosen(self._chosen, enough)
        return self._ended() if self._chosen.mu is None else self._judged(self._chosen.mu)

    def _as_it_is(self, _: int | None) -> tuple[AdapterChoice, ...]:
        return (AdapterChoice(str(self.repairs.untouched)),)

    def _score(self, mu: float) -> Figures:
        with self._adapters(mu, self.calibrating) as adapters:
            return self.calibrating.scored(_label(mu), adapters)

    def _text(self, mu: float) -> Figures:
        with self._adapters(mu, self.calibrating) as adapters:
            return figures_of(self.calibrating.run(_label(mu), adapters))

    @contextlib.contextmanager
    def _adapters(self, mu: float, measuring: Measuring) -> Iterator[Adapters]:
        """The repaired adapters of a measurement's folds, for as long as the block lasts."""
        self.repairs.solve([mu], measuring.fold_numbers)
        files: dict[int | None, Path] = {}

        def adapters(fold: int | None) -> tuple[AdapterChoice, ...]:
            if fold not in files:
                files[fold] = self.repairs.adapter(mu, fold)
            return (AdapterChoice(str(files[fold])),)

        try:
            yield adapters
        finally:
            for file in files.values():
                file.unlink(missing_ok=True)

    def _judged(self, mu: float | None) -> Repaired:
        """Measured on the prompts that judge, and written.

        Args:
            mu: None: the adapter as it is.
        """
        measuring = self._measuring_judged()
        aligned = measuring.with_utility(measuring.run(ALIGNED, always(), "model"), always())
        adapter = measuring.with_utility(measuring.run(ADAPTER, self._as_it_is), self._as_it_is)
        if mu is None:
            return self._written(None, (aligned, adapter), None, {})
        figures = self.repairs.figures(mu)
        modules = module_reports(self.repairs.inputs, self.output, figures)
        ratio = norm_ratio(modules) or 1.0  # of an adapter that does nothing
        small = always(AdapterChoice(str(self.repairs.untouched), ratio))
        scaled = measuring.with_utility(measuring.run(SCALED, small, "control"), small)
        with self._adapters(mu, measuring) as adapters:
            repaired = measuring.with_utility(measuring.run(_label(mu), adapters), adapters)
        repaired = replace(repaired, label=REPAIRED)
        controls = controls_entry(repaired, scaled, None, ratio, ADAPTER, whose="the adapter's")
        crossed = repaired.measured and self._judged_by(mu) == "cross-fitting"
        own = (self._in_sample(mu),) if crossed else ()
        return self._written(mu, (aligned, adapter, scaled, *own, repaired), controls, figures)

    def _judged_by(self, mu: float | None) -> JudgedBy:
        if self.judging is not None:
            return "other prompts"
        return "cross-fitting" if self.calibrating.folds and mu is not None else "calibration prompts"

    def _in_sample(self, mu: float) -> Run:
        """The adapter that is written, which no fold is answered with where cross-fitting decides."""
        file = self.repairs.adapter(mu)
        try:
            own = always(AdapterChoice(str(file)))
            return self.calibrating.with_utility(self.calibrating.run(IN_SAMPLE_RUN, own), own)
        finally:
            file.unlink(missing_ok=True)

    def _measuring_judged(self) -> Measuring:
        own = self.calibrating
        if self.judging is None:
            return own
        place = own.scratch / "judging"
        place.mkdir()
        instrument = replace(own.instrument, prompts=self.judging)
        return replace(own, instrument=instrument, scratch=place, folds=(), runs={}, references={})

    def _written(
        self,
        mu: float | None,
        runs: tuple[Run, ...],
        controls: Mapping[str, Any] | None,
        figures: Mapping[str, ModuleFigures],
    ) -> Repaired:
        """The adapter as the output, unless it could not be measured."""
        deciding = settled(runs[-1])
        if not deciding.measured:
            self._end = deciding.failure
            return self._told(runs)
        judged_by, method = self._judged_by(mu), self.repairs.method
        counts = (self.judging or self.repairs.prompts).counts
        facts = RepairFacts(
            mu, method.eps, method.tokens, method.tail, method.task_share,
            {name: getattr(deciding, name) for name in ("refusal_rate", "over_refusal_rate", "task_rate")},
            meets(deciding, self.wishes.bounds, counts), judged_by,
        )  # fmt: skip
        load = original_pairs(self.repairs.inputs) if mu is None else self.repairs.pairs(mu)
        roundings = write_repaired(self.repairs.inputs, self.output, load, facts)
        told = self._told(runs)
        return replace(told, mu=mu, controls=controls, figures=figures, roundings=roundings, judged_by=judged_by)

    def _ended(self) -> Repaired:
        """What is known where it could not go on."""
        runs = self.calibrating.runs
        return self._told(tuple(runs[label] for label in (ALIGNED, ADAPTER) if label in runs))

    def _told(self, runs: tuple[Run, ...]) -> Repaired:
        ended = [] if self._end is None else [self._end]
        failures = [*ended, *self.calibrating.failures, *self._losses()]
        return Repaired(
            judges=tuple(judge.name for judge in self.calibrating.instrument.panel.judges),
            runs=tuple(shown(run, self.repairs, self._places()) for run in runs),
            chosen=self._chosen,
            calibration=self._entry,
            failure=named(next(iter(failures), None), self.repairs),
            notes=self._all_notes(runs),
        )

    def _losses(self) -> list[Error]:
        """Failures after which everything was asked or read all the same."""
        captured = self.repairs.captured
        return [*self.calibrating.losses, *(captured.losses if captured is not None else ())]

    def _places(self) -> dict[str, str]:
        """What runs of repaired adapters are told to have been asked with, by label."""
        target = str(self.output.target)
        crossed = self.judging is None and self.calibrating.folds
        return {IN_SAMPLE_RUN: target, REPAIRED: WITHOUT_FOLD if crossed else target}

    def _all_notes(self, runs: tuple[Run, ...]) -> tuple[str, ...]:
        measuring, captured = self.calibrating, self.repairs.captured
        calibration, asked = measuring.instrument.calibration, self.judging or self.repairs.prompts
        notes = [*self.notes, *measuring.session.notes, *measuring.notes]
        notes += [] if calibration is None else calibration.notes
        notes += [] if captured is None else captured.notes
        notes += [f"{RESTARTED}: {named(loss, self.repairs)}" for loss in self._losses()]
        notes += unasked_notes(asked)
        asked_of = runs if self.judging is None else (measuring.runs[ALIGNED], *runs)
        told = utility_note(asked)
        notes += [*notes_on(asked_of, self.wishes.max_tokens), *([] if told is None else [told])]
        return tuple(dict.fromkeys(notes))


def _label(mu: float) -> str:
    return f"mu {mu:g}"

"""Candidates measured in one llama.cpp process: each is made, loaded, asked and taken away again.

What the journal has is not measured again. The references that utility is measured against are recorded when the first
measurement needs them, so that a search that only has to be finished doesn't.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.errors import Error, LlamaError, UnsupportedError
from safelora_gguf.smoke.guarding import guarded
from safelora_gguf.smoke.instrument import Instrument, answered, measure_run, score_run
from safelora_gguf.smoke.judging import score_judge
from safelora_gguf.smoke.parent.session import Session
from safelora_gguf.smoke.plan import Guard, Reference, RunPlan
from safelora_gguf.smoke.prompts import PromptSet
from safelora_gguf.smoke.protocol import AdapterChoice, Answer
from safelora_gguf.smoke.runs import Run, Utility
from safelora_gguf.smoke.utility import record_reference, utility_of, utility_prompts
from safelora_gguf.tune.figures import Figures
from safelora_gguf.tune.found import Candidate
from safelora_gguf.tune.journal import Journal
from safelora_gguf.tune.progress import Meter
from safelora_gguf.tune.records import run_of, run_record
from safelora_gguf.tune.ways import Way

ALIGNED, ADAPTER = "aligned model", "adapter"
"""Labels of the runs that everything is measured against."""

_NOT_IN_NAMES = re.compile(r"[^\w.]+")


@dataclass
class Measuring:
    """Everything that measures, for the length of one search.

    Attributes:
        instrument: without references, which are recorded when they are needed.
        untouched: the adapter as it is, as GGUF; beside it candidates and references are written.
        way: how a candidate is made.
        guard: a guard model and the process it runs in.
        runs: what was asked with text, by key.
        failures: what llama.cpp failed on, in order.
        notes: what a careful reader should know.
    """

    session: Session
    instrument: Instrument
    untouched: Path
    way: Callable[[Candidate], Way]
    journal: Journal
    meter: Meter
    guard: tuple[Session, Guard] | None = None
    runs: dict[Hashable, Run] = field(default_factory=dict)
    failures: list[Error] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _references: tuple[Reference, ...] | None = None

    @property
    def scratch(self) -> Path:
        return self.untouched.parent

    def coarse(self, candidate: Candidate) -> Figures:
        """By first tokens and distributions alone."""
        known = _known_figures(self.journal.get("coarse", candidate.name))
        with self.meter.step(candidate.name, coarse=True):
            if known is not None:
                return known
            found, failure = self._made_and_scored(candidate)
        if failure is not None:
            self.failures.append(failure)
            return Figures("coarse", error=str(failure))
        if found.error is not None:
            return found
        self.journal.put("coarse", candidate.name, found.to_json())
        return found

    def full(self, candidate: Candidate) -> Figures:
        """By the text of its answers; the run is kept."""
        if candidate.key not in self.runs:
            self.runs[candidate.key] = self._made_and_run(candidate)
        return figures_of(self.runs[candidate.key])

    def run(self, plan: RunPlan, *, of: str | None = None) -> Run:
        """All prompts with text, judged by all judges; from the journal where it is there.

        Args:
            of: what a run of no name of its own belongs to, for the journal.
        """
        name = plan.label if of is None else f"{plan.label} of {of}"
        with self.meter.step(plan.label) as tell:
            found = run_of(self.journal.get("run", name))
            if found is not None:
                return found
            instrument = replace(self.instrument, references=self.references())
            return self.keep(self.judged(measure_run(self.session, plan, instrument, tell)), name)

    def aside(self, label: str, prompts: PromptSet) -> Run:
        """What the aligned model answers to prompts that judge nothing."""
        found = run_of(self.journal.get("run", label))
        if found is not None:
            return found
        instrument = replace(self.instrument, prompts=prompts, references=())
        with self.meter.step(label, prompts=len(prompts.prompts)) as tell:
            run = answered(self.session, RunPlan(label, (), "model"), instrument, tell)
            return self.keep(self.judged(run), label)

    def keep(self, run: Run, name: str) -> Run:
        """Notes a finished run, or its failure."""
        if run.failure is not None:
            self.failures.append(run.failure)
        elif run.guard_failure is None:
            self.journal.put("run", name, run_record(run))
        return run

    def as_control(self, label: str, make: Callable[[Path], object], *, of: str) -> Run:
        """A run of an adapter that `make` writes, as a control of something."""
        with self._file(label) as file:
            if self.journal.get("run", f"{label} of {of}") is None:
                make(file)
            return self.run(RunPlan(label, (AdapterChoice(str(file)),), "control"), of=of)

    def judged(self, run: Run) -> Run:
        """The run with the guard's verdicts, where there is a guard."""
        if self.guard is None:
            return run
        found = guarded((run,), *self.guard, self.instrument.panel.deciding)
        if found.failure is not None:
            self.failures.append(found.failure)
            self.notes.append(f"{run.label}: {self.guard[1].name} failed: {found.failure}")
        return found.runs[0]

    def by_first_tokens(self, run: Run) -> Figures | None:
        """What the score alone says of a run that was measured with text; None where it can't tell."""
        calibration = self.instrument.calibration
        if calibration is None or not self.instrument.by_score:
            return None
        decide = score_judge(calibration).decide
        told = [replace(one, refused=decide(Answer("", one.error, score=one.refusal_score))) for one in run.responses]
        found = replace(run, responses=tuple(told))
        return Figures("coarse", found.refusals, found.over_refusals)

    def references(self) -> tuple[Reference, ...]:
        """The distributions of the aligned model and of the adapter, where they could be recorded."""
        if self._references is None:
            prompts = utility_prompts(self.instrument.prompts)
            found = []
            for label, adapters in ((ADAPTER, (AdapterChoice(str(self.untouched)),)), (ALIGNED, ())):
                file = self.scratch / f"{label.replace(' ', '-')}.distributions"
                reference, failure = record_reference(self.session, RunPlan(label, adapters), prompts, file)
                if failure is not None:
                    self.failures.append(failure)
                    self.notes.append(f"no utility against the {label}: {failure.message}")
                found += [reference] if reference is not None else []
            self._references = tuple(found)
        return self._references

    def _made_and_scored(self, candidate: Candidate) -> tuple[Figures, Error | None]:
        try:
            with self._adapters(candidate) as adapters:
                return self._coarse(RunPlan(candidate.name, adapters))
        except LlamaError as error:  # some take llama.cpp to make
            return Figures("coarse"), error
        except UnsupportedError as error:  # and that may not be possible for a model that can be measured
            return Figures("coarse", error=str(error)), None

    def _made_and_run(self, candidate: Candidate) -> Run:
        known = self.journal.get("run", candidate.name) is not None
        try:
            with contextlib.nullcontext(()) if known else self._adapters(candidate) as adapters:
                return self.run(RunPlan(candidate.name, adapters))
        except (LlamaError, UnsupportedError) as error:
            unasked = len(self.instrument.prompts.prompts)
            return self.keep(Run(candidate.name, (), (), error, unasked=unasked), candidate.name)

    def _coarse(self, plan: RunPlan) -> tuple[Figures, Error | None]:
        beside = tuple(reference for reference in self.references() if reference.label == ADAPTER)
        if not self.instrument.by_score:
            utility, failure = utility_of(self.session, plan, beside)
            return _figures(Figures("coarse"), utility), failure
        scored = score_run(self.session, plan, replace(self.instrument, references=beside))
        return _figures(Figures("coarse", scored.refusals, scored.over_refusals), scored.utility), scored.failure

    @contextlib.contextmanager
    def _adapters(self, candidate: Candidate) -> Iterator[tuple[AdapterChoice, ...]]:
        """The candidate as llama.cpp takes it, for as long as the block lasts."""
        way = self.way(candidate)
        if way.scale is not None:
            yield (AdapterChoice(str(self.untouched), way.scale),)
            return
        with self._file(candidate.name) as file:
            way.draft(file)
            yield (AdapterChoice(str(file)),)

    @contextlib.contextmanager
    def _file(self, name: str) -> Iterator[Path]:
        """A file of its own for each name: a process that has loaded one knows it by its path."""
        file = self.scratch / f"{_NOT_IN_NAMES.sub('-', name)}.gguf"
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)


def figures_of(run: Run) -> Figures:
    """What a run's answers came to."""
    failure = run.failure or run.guard_failure
    error = None if failure is None else str(failure)
    found = Figures("full", run.refusals, run.over_refusals, run.tasks if run.tasks[1] else None, error=error)
    if run.label == ADAPTER:
        return replace(found, kl=0.0, top1=1.0)
    return _figures(found, run.utility)


def _figures(found: Figures, utility: tuple[Utility, ...]) -> Figures:
    """The figures with the utility against the adapter."""
    against = next((one for one in utility if one.against == ADAPTER), None)
    return found if against is None else replace(found, kl=against.kl, top1=against.top1)


def _known_figures(record: object) -> Figures | None:
    try:
        return Figures.from_json(record) if isinstance(record, dict) else None
    except (KeyError, TypeError, ValueError):
        return None

"""Runs of a prompt set whose folds are each asked with an adapter of their own: one that was repaired without them.

Answers of all folds are judged together, as if one adapter had given them; counts are sums over the folds, and so is
utility, position by position. Without folds this is a run as `smoke` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from converters.errors import Error
from safelora_gguf.repair.choosing import Figures
from safelora_gguf.repair.progress import Meter
from safelora_gguf.smoke.instrument import Instrument, judged_run
from safelora_gguf.smoke.judging import Panel, score_judge
from safelora_gguf.smoke.parent.outcomes import Answered
from safelora_gguf.smoke.parent.session import Session, Tell, ask
from safelora_gguf.smoke.plan import Reference, RunPlan
from safelora_gguf.smoke.prompts import Prompt
from safelora_gguf.smoke.protocol import AdapterChoice, Answer, Divergence
from safelora_gguf.smoke.runs import Role, Run, Utility
from safelora_gguf.smoke.utility import mean_utility, record_reference, utility_prompts

ALIGNED, ADAPTER, REPAIRED = "aligned model", "adapter", "repaired"
"""Labels of the runs; utility is measured against the first two."""

IN_SAMPLE_RUN = "repaired, on prompts that calibrated it"
"""Label of the written adapter's own run where cross-fitting decides: nobody shall take it for independent."""

Adapters = Callable[[int | None], tuple[AdapterChoice, ...]]
"""Gives what the prompts of a fold are asked with; None: of no fold."""

_Part = tuple[int | None, tuple[Prompt, ...]]


def always(*adapters: AdapterChoice) -> Adapters:
    """The same for every fold."""
    return lambda _: adapters


@dataclass
class Measuring:
    """Everything that measures on one prompt set.

    Attributes:
        instrument: with its prompts; its references are left alone, each fold has its own.
        untouched: the adapter as GGUF.
        scratch: a directory for references.
        folds: of each prompt; empty: all are asked together.
        failures: of llama.cpp, in order, that left something unmeasured.
        losses: its failures after which everything was asked all the same.
        notes: what a careful reader should know.
        runs: with text, by label; none is asked twice.
        references: by label and fold.
    """

    session: Session
    instrument: Instrument
    untouched: Path
    scratch: Path
    meter: Meter
    folds: Sequence[int] = ()
    failures: list[Error] = field(default_factory=list)
    losses: list[Error] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)
    references: dict[str, dict[int | None, Reference]] = field(default_factory=dict)

    @property
    def fold_numbers(self) -> tuple[int | None, ...]:
        """Those that prompts are in; None alone without folds."""
        return tuple(sorted(set(self.folds))) or (None,)

    def run(self, label: str, adapters: Adapters, role: Role = "adapter") -> Run:
        """All prompts with text, judged by all judges; without utility."""
        if label not in self.runs:
            prompts = self.instrument.prompts.prompts
            with self.meter.step(label, len(prompts)) as tell:
                found = self._answers(adapters, prompts, None, tell)
            plan = RunPlan(label, adapters(self.fold_numbers[0]), role)
            self.keep(judged_run(self.session.file, plan, prompts, found, self.instrument.panel))
        return self.runs[label]

    def keep(self, run: Run) -> Run:
        """Notes a run with text, and its failure."""
        self.runs[run.label] = run
        self._note(run.failure, whole=run.measured)
        return run

    def scored(self, label: str, adapters: Adapters) -> Figures:
        """Refusals by first tokens alone.

        Raises:
            ValueError: the score isn't calibrated.
        """
        calibration = self.instrument.calibration
        if calibration is None:
            raise ValueError("the first-token score isn't calibrated")
        prompts = [prompt for prompt in self.instrument.prompts.prompts if prompt.kind != "task"]
        with self.meter.step(label, len(prompts)) as tell:
            found = self._answers(adapters, prompts, 0, tell)
        plan, panel = RunPlan(label, adapters(self.fold_numbers[0])), Panel((score_judge(calibration),))
        run = judged_run(self.session.file, plan, prompts, found, panel)
        self._note(run.failure, whole=run.measured)
        return figures_of(run, tasks=False)

    def with_utility(self, run: Run, adapters: Adapters) -> Run:
        """A run with how near it is to the aligned model and to the adapter, but for itself."""
        if not run.measured:
            return run
        found = [self._utility(label, adapters) for label in (ALIGNED, ADAPTER) if label != run.label]
        return replace(run, utility=tuple(one for one in found if one is not None))

    def _answers(self, adapters: Adapters, prompts: Sequence[Prompt], max_tokens: int | None, tell: Tell) -> Answered:
        """Of every fold with its adapter, in the order of the prompts; after a failure that leaves prompts unasked no
        further fold is asked."""
        answers: dict[str, Answer | None] = {}
        failure: Error | None = None
        for fold, part in self._parts(prompts):
            found = self.session.answers(
                adapters(fold), [ask(prompt.prompt) for prompt in part], max_tokens=max_tokens,
                refusal=self.instrument.tokens, tell=partial(_tell_from, tell, len(answers)),
            )  # fmt: skip
            answers |= zip((prompt.id for prompt in part), found.answers, strict=True)
            failure = failure or found.failure
            if None in found.answers:
                break
        return Answered(tuple(answers.get(prompt.id) for prompt in prompts), failure)

    def _parts(self, prompts: Sequence[Prompt]) -> list[_Part]:
        """The prompts by fold."""
        if not self.folds:
            return [(None, tuple(prompts))]
        fold_of = dict(zip((one.id for one in self.instrument.prompts.prompts), self.folds, strict=True))
        parts = [(fold, tuple(one for one in prompts if fold_of.get(one.id) == fold)) for fold in self.fold_numbers]
        others = tuple(one for one in prompts if one.id not in fold_of)
        return [(fold, part) for fold, part in (*parts, (None, others)) if part]

    def _utility(self, against: str, adapters: Adapters) -> Utility | None:
        items: list[Divergence | None] = []
        for fold, reference in self._recorded(against).items():
            found = self.session.divergences(adapters(fold), reference.file, reference.count)
            items += found.items
            self._note(found.failure, whole=None not in found.items)
        return mean_utility(against, items)

    def _recorded(self, label: str) -> dict[int | None, Reference]:
        """What the aligned model or the adapter says to each fold's harmless prompts, recorded once."""
        if label not in self.references:
            found = self.references.setdefault(label, {})
            plan = RunPlan(label, () if label == ALIGNED else (AdapterChoice(str(self.untouched)),))
            for fold, prompts in self._parts(utility_prompts(self.instrument.prompts)):
                file = self.scratch / f"{label.replace(' ', '-')}-{fold}.distributions"
                reference, failure = record_reference(self.session, plan, prompts, file)
                self._note(failure, whole=reference is not None)
                if reference is not None:
                    found[fold] = reference
                elif failure is not None:
                    self.notes.append(f"no utility against the {label}: {failure.message}")
        return self.references[label]

    def _note(self, failure: Error | None, *, whole: bool) -> None:
        """Keeps a failure, if there is one, apart by whether everything was measured all the same."""
        if failure is not None:
            (self.losses if whole else self.failures).append(failure)


def _tell_from(tell: Tell, begun: int, done: int) -> None:
    tell(begun + done)


def figures_of(run: Run, *, tasks: bool = True) -> Figures:
    """What a run's answers came to. Prompts that could not be answered at all, being longer than the context, say
    nothing of a mu and are not counted."""
    refused, _ = run.refusals
    answered = sum(one.kind == "harmful" and one.error is None for one in run.responses)
    if not run.measured:
        return Figures(None, failed=True)
    return Figures((refused, answered), run.over_refusals, run.tasks if tasks and run.tasks[1] else None)

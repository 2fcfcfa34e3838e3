"""Running a recipe: what is complete is left alone, the rest is done in order, each step as its command would do it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.atomic import refuse_to_overwrite
from converters.errors import Error, FileMissingError, OutputPathError, UsageError
from converters.model_request import KEEP
from converters.paths import is_there
from converters.quantization import file_type
from safelora_gguf._version import __version__
from safelora_gguf.commands.inputs import invoked_as
from safelora_gguf.outcome import Outcome
from safelora_gguf.recipe.journal import Journal, stamp_of
from safelora_gguf.recipe.measured import restore_cards, update_cards
from safelora_gguf.recipe.options import arguments, beside, parameters_of_the_run, with_defaults
from safelora_gguf.recipe.places import Places, in_step, is_in
from safelora_gguf.recipe.reading import Recipe, Step

if TYPE_CHECKING:
    pass

Tell = Callable[[int, int, str, bool], None]
"""Called before a step: its place, how many there are, its name, whether it is complete already."""

_OF_MODELS = ("merge", "convert-model", "quantize")


@dataclass(frozen=True)
class StepReport:
    """What became of one step.

    Attributes:
        skipped: it was complete already; `report` is of the run that completed it.
        report: what its command prints with `--json`; None where it could not be planned yet.
        text: the same for people; empty for a skipped step.
    """

    name: str
    command: str
    skipped: bool
    status: int
    report: Mapping[str, Any] | None
    text: str

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "text"}


@dataclass(frozen=True)
class RunReport:
    """The result of `run`.

    Attributes:
        failure: why the last of the steps ended in an error after it had reported what it could.
    """

    recipe: Path
    steps: tuple[StepReport, ...]
    failure: Error | None

    @property
    def status(self) -> int:
        """The exit status: of the last step that was run, which is the first that is not 0."""
        return self.steps[-1].status if self.steps else 0

    def to_json(self) -> dict[str, Any]:
        """The JSON object that the command line contract describes."""
        return {
            "command": "run",
            "version": __version__,
            "inputs": [{"role": "recipe", "path": str(self.recipe), "stamp": stamp_of(self.recipe)}],
            "steps": [step.to_json() for step in self.steps],
        }


def run_recipe(
    recipe: Recipe,
    *,
    start: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    tell: Tell | None = None,
) -> RunReport:
    """Runs the steps that are not complete, in order, until one ends with another status than 0.

    Args:
        start: the step from which on everything is run again, complete or not.
        force: replace outputs that this recipe did not make.
        dry_run: check what can be checked before anything was made; nothing is written.

    Raises:
        UsageError: no such step. Every error that the commands raise: the steps before it are complete.
    """
    journal = Journal.beside(recipe.path)
    names = [step.name for step in recipe.steps]
    if start is not None and start not in names:
        raise UsageError(f"--from {start!r} is no step of the recipe; it has {', '.join(names)}")
    again = names[names.index(start) :] if start is not None else []
    run = _Run(recipe, journal, frozenset(again), force=force, quiet=quiet, verbose=verbose)
    if dry_run:
        run.check_all()
        return RunReport(recipe.path, tuple(run.planned(step) for step in recipe.steps), None)
    journal.forget(again)
    run.check_all()
    reports = list[StepReport]()
    for number, step in enumerate(recipe.steps, 1):
        found = run.complete(step)
        if tell is not None:
            tell(number, len(names), step.name, found is not None)
        if found is not None:
            restore_cards(journal, step.name, run.words)
        report, failure = run.do(step) if found is None else (_skipped(step, found), None)
        reports.append(report)
        if report.status or failure is not None:
            return RunReport(recipe.path, tuple(reports), failure)
    return RunReport(recipe.path, tuple(reports), None)


def _skipped(step: Step, found: Mapping[str, Any]) -> StepReport:
    return StepReport(step.name, step.command, True, int(found["status"]), found["report"], "")


class _Run:
    """One run of a recipe: where its paths lead, and which of its steps are complete."""

    def __init__(
        self, recipe: Recipe, journal: Journal, again: frozenset[str], *, force: bool, quiet: bool, verbose: bool
    ) -> None:
        self._recipe = recipe.path
        self._places, self._journal, self._again = Places(recipe, journal), journal, again
        self._steps = {step.name: step for step in recipe.steps}
        self._force, self._quiet, self._verbose = force, quiet, verbose
        self.words = ("safelora-gguf", "run", recipe.path.name)

    def ready(self, step: Step) -> bool:
        """Whether everything that it takes from earlier steps is there, and stays as it is."""
        return all(self._is_current(self._steps[reference.name]) for _, reference in step.references())

    def complete(self, step: Step) -> Mapping[str, Any] | None:
        """What the journal has of a step, if it need not be run; nothing of one that stays in memory."""
        if step.name in self._again or step.stays_in_memory or not self.ready(step):
            return None
        return self._journal.complete(step.name, self._places.key(step))

    def check_all(self) -> None:
        """Finds now what can be found now, not after hours of work: whatever a step's dry run finds that has its
        inputs, and of the others inputs that are missing and places that are taken.

        Raises: see `check`.
        """
        made: list[str] = []
        directory = self._places.directory
        for step in self._steps.values():
            if self.complete(step) is None:
                self._check_inputs(step, made)
                if self.ready(step) and not self._takes_any(step, made):
                    self.check(step)
                else:
                    self._check_places(step, self._places.outputs(step, {}))
            if "out" in step.options:
                made.append(os.path.normpath(beside(directory, step.options["out"])))

    def _check_inputs(self, step: Step, made: Sequence[str]) -> None:
        """That the files that a step reads are there, or will be made by a step before it."""
        for name, path, cut in self._places.inputs(step):
            if not any(is_there(place) or is_in(place, made) for place in (path, cut)):
                raise in_step(FileMissingError(f"{name}: no such file or directory", file=path), step)
        outtype = step.options.get("outtype")
        if step.command in _OF_MODELS and outtype is not None and outtype.lower() != KEEP:
            try:
                file_type(outtype)
            except UsageError as error:
                raise in_step(error, step) from None

    def _takes_any(self, step: Step, made: Sequence[str]) -> bool:
        """Whether it reads, by its plain name, what an earlier step makes."""
        return any(is_in(place, made) for _, path, cut in self._places.inputs(step) for place in (path, cut))

    def _check_places(self, step: Step, places: Sequence[Path]) -> None:
        """Raises OutputPathError: what stands there was not made by this step, or is the recipe."""
        for path in places:
            refuse_to_overwrite(path, [self._recipe, self._journal.path])
            if not self._force and is_there(path) and not self._journal.owns(step.name, path):
                told = "exists already, and was not made by this recipe, or was changed since; choose another name or"
                raise in_step(OutputPathError(f"{told} pass --force", file=path), step)

    def check(self, step: Step) -> tuple[Outcome | None, list[Path]]:
        """A step's dry run, for commands that have one, and where it writes. What stays in memory is looked at by the
        step that takes it.

        Raises:
            OutputPathError: what stands there was not made by this step, or is the recipe. See also its command.
        """
        outcome, places = None, self._places.outputs(step, {})
        if "dry_run" in parameters_of_the_run(step.run) and not step.stays_in_memory:
            outcome = self._call(step, self._places.values(step), force=True, dry_run=True)
            places = self._places.outputs(step, outcome.report)
        self._check_places(step, places)
        return outcome, places

    def planned(self, step: Step) -> StepReport:
        """What would be done; its report where it can be planned already."""
        found = self.complete(step)
        if found is not None:
            return _skipped(step, found)
        if step.stays_in_memory:
            return _kept(step)
        outcome = self.check(step)[0] if self.ready(step) else None
        text = outcome.text() if outcome is not None else ""
        return StepReport(step.name, step.command, False, 0, outcome.report if outcome is not None else None, text)

    def do(self, step: Step) -> tuple[StepReport, Error | None]:
        """Runs a step, and notes that it is complete unless it failed."""
        if step.stays_in_memory:
            return _kept(step), None
        _, places = self.check(step)
        key, force = self._places.key(step), self._force or any(map(is_there, places))
        self._journal.begin(step.name, places)
        try:
            outcome = self._call(step, self._places.values(step), force=force)
        except BaseException:
            self._journal.abandon(step.name)
            raise
        if outcome.failure is None:
            if step.command == "smoke":
                update_cards(self._journal, outcome.report, self.words)
            cards = self._places.cards(step, outcome.report)
            made = [path for path in self._places.outputs(step, outcome.report) if is_there(path) and path not in cards]
            self._journal.finish(step.name, key, made, outcome.report, outcome.status, cards=cards)
        report = StepReport(step.name, step.command, False, outcome.status, outcome.report, outcome.text())
        return report, outcome.failure

    def _is_current(self, step: Step) -> bool:
        return self.ready(step) if step.stays_in_memory else self.complete(step) is not None

    def _call(self, step: Step, values: Mapping[str, Any], *, force: bool, dry_run: bool = False) -> Outcome:
        options = with_defaults(step.run) | arguments(values, step.known)
        of_the_run = {"force": force, "quiet": self._quiet, "verbose": self._verbose, "json": False, "dry_run": dry_run}
        known = parameters_of_the_run(step.run)
        try:
            with invoked_as(self.words):
                return step.run(**options | {name: value for name, value in of_the_run.items() if name in known})
        except Error as error:
            raise in_step(error, step) from None


def _kept(step: Step) -> StepReport:
    return StepReport(step.name, step.command, False, 0, None, "stays in memory until it is taken")

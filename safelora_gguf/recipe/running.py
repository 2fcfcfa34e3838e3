"""Running a recipe: what is complete is left alone, the rest is done in order, each step as its command would do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.atomic import refuse_to_overwrite
from converters.errors import Error, OutputPathError, UsageError
from converters.model_card import command_line
from converters.paths import is_there
from safelora_gguf._version import __version__
from safelora_gguf.cards import desktop_paths, write_desktop_files
from safelora_gguf.commands.inputs import invoked_as
from safelora_gguf.outcome import Outcome
from safelora_gguf.recipe.in_memory import made_in_memory
from safelora_gguf.recipe.journal import Journal, is_as_left, key_of, stamp_of
from safelora_gguf.recipe.options import arguments, beside, parameters_of_the_run, paths_in, with_defaults
from safelora_gguf.recipe.reading import Recipe, Step, reference_in

if TYPE_CHECKING:
    from safelora_gguf.unwritten import Unwritten

Tell = Callable[[int, int, str, bool], None]
"""Called before a step: its place, how many there are, its name, whether it is complete already."""

_REPORT = "report"


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
        return RunReport(recipe.path, tuple(run.planned(step) for step in recipe.steps), None)
    journal.forget(again)
    for step in recipe.steps:  # everything that can be found wrong now is not found after hours of work
        if run.ready(step) and run.complete(step) is None:
            run.check(step)
    reports = list[StepReport]()
    for number, step in enumerate(recipe.steps, 1):
        found = run.complete(step)
        if tell is not None:
            tell(number, len(names), step.name, found is not None)
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
        self._directory, self._journal, self._again = recipe.directory, journal, again
        self._steps = {step.name: step for step in recipe.steps}
        self._force, self._quiet, self._verbose = force, quiet, verbose
        self._words = ("safelora-gguf", "run", recipe.path.name)

    def ready(self, step: Step) -> bool:
        """Whether everything that it takes from earlier steps is there, and stays as it is."""
        return all(self._is_current(self._steps[reference.name]) for _, reference in step.references())

    def complete(self, step: Step) -> Mapping[str, Any] | None:
        """What the journal has of a step, if it need not be run; nothing of one that stays in memory."""
        if step.name in self._again or step.stays_in_memory or not self.ready(step):
            return None
        return self._journal.complete(step.name, self._key(step))

    def check(self, step: Step) -> tuple[Outcome | None, list[Path]]:
        """A step's dry run, for commands that have one, and where it writes. What stays in memory is looked at by the
        step that takes it.

        Raises:
            OutputPathError: what stands there was not made by this step, or is the recipe. See also its command.
        """
        outcome, places = None, self._outputs(step, {})
        if "dry_run" in parameters_of_the_run(step.run) and not step.stays_in_memory:
            outcome = self._call(step, self._values(step), force=True, dry_run=True)
            places = self._outputs(step, outcome.report)
        for path in places:
            refuse_to_overwrite(path, [self._recipe, self._journal.path])
            if not self._force and is_there(path) and not self._journal.owns(step.name, path):
                told = "exists already, and was not made by this recipe, or was changed since; choose another name or"
                raise _in_step(OutputPathError(f"{told} pass --force", file=path), step)
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
        key, force = self._key(step), self._force or any(map(is_there, places))
        self._journal.begin(step.name, places)
        outcome = self._call(step, self._values(step), force=force)
        if outcome.failure is None:
            if step.command == "smoke":
                self._update_cards(outcome.report)
            cards = self._cards(step, outcome.report)
            made = [path for path in self._outputs(step, outcome.report) if is_there(path) and path not in cards]
            self._journal.finish(step.name, key, made, outcome.report, outcome.status, cards=cards)
        report = StepReport(step.name, step.command, False, outcome.status, outcome.report, outcome.text())
        return report, outcome.failure

    def _cards(self, step: Step, report: Mapping[str, Any]) -> list[Path]:
        """The files that `card = true` makes beside a GGUF output."""
        output = Path(str((report.get("output") or report.get("planned_output") or {}).get("path", ""))).absolute()
        return list(desktop_paths(output)) if step.options.get("card") is True and _is_gguf(output) else []

    def _update_cards(self, smoke: Mapping[str, Any]) -> None:
        """Puts what was measured into the cards of what it was measured on; those that somebody edited stay."""
        measured = {str(entry.get("path")) for entry in smoke["inputs"]}
        for record in self._journal.done.values():
            output = str((record["report"].get("output") or {}).get("path"))
            cards = [(Path(path), state) for path, state in record["cards"].items()]
            if output in measured and cards and all(is_as_left(path, state) for path, state in cards):
                line = command_line(self._words)
                write_desktop_files(Path(output), record["report"], (), smoke, line, force=True)
                self._journal.note_cards(record, [path for path, _ in cards])

    def _is_current(self, step: Step) -> bool:
        return self.ready(step) if step.stays_in_memory else self.complete(step) is not None

    def _call(self, step: Step, values: Mapping[str, Any], *, force: bool, dry_run: bool = False) -> Outcome:
        options = with_defaults(step.run) | arguments(values, step.known)
        of_the_run = {"force": force, "quiet": self._quiet, "verbose": self._verbose, "json": False, "dry_run": dry_run}
        known = parameters_of_the_run(step.run)
        try:
            with invoked_as(self._words):
                return step.run(**options | {name: value for name, value in of_the_run.items() if name in known})
        except Error as error:
            raise _in_step(error, step) from None

    def _values(self, step: Step) -> dict[str, Any]:
        """A step's options, with references resolved and paths counted from the recipe."""
        found = dict(step.options)
        for name, value in step.options.items():
            if step.known[name].is_path:
                items = value if isinstance(value, list) else [value]
                placed = [self._placed(item, step) for item in items]
                found[name] = placed if isinstance(value, list) else placed[0]
        return found

    def _placed(self, text: str, step: Step) -> Any:
        """A path from a recipe's value, or the model that an earlier step keeps in memory."""
        reference = reference_in(text)
        if reference is None:
            return beside(self._directory, text)
        if self._steps[reference.name].stays_in_memory:
            return self._kept_model(self._steps[reference.name])
        record = self._journal.done.get(reference.name, {}).get("report", {})
        output = record.get("output") or {}
        if "path" not in output:
            raise UsageError(f"'{text}': the step {reference.name} has no output of its own")
        return f"{output['path']}{reference.rest}"

    def _kept_model(self, step: Step) -> Unwritten:
        values = arguments(self._values(step), step.known)
        try:
            return made_in_memory(step.command, values)
        except Error as error:
            raise _in_step(error, step) from None

    def _key(self, step: Step) -> str:
        """What a step comes from: its options, and the state of its inputs and of what earlier steps made for it."""
        inputs: dict[str, Any] = {}
        for name, text in paths_in(step.options, step.known):
            reference = reference_in(text)
            if reference is not None and self._steps[reference.name].stays_in_memory:
                inputs[text] = self._key(self._steps[reference.name])
            elif reference is not None:
                inputs[text] = [state["sha256"] or state["stamp"]
                                for state in self._journal.done[reference.name]["outputs"].values()]  # fmt: skip
            elif name not in {"out", _REPORT, "card"}:
                inputs[text] = self._stamp(text)
        return key_of({"version": __version__, "command": step.command, "options": step.options, "inputs": inputs})

    def _stamp(self, text: str) -> str | None:
        """The state of an input, whether or not something follows its name."""
        path = Path(beside(self._directory, text))
        return stamp_of(path if is_there(path) else Path(beside(self._directory, text.rpartition("=")[0] or text)))

    def _outputs(self, step: Step, report: Mapping[str, Any]) -> list[Path]:
        """What a step writes, as its report has it."""
        output = report.get("output") or report.get("planned_output") or {}
        listed = [*output.get("shards", ()), *output.get("files", ()), *report.get("shards", ())]
        paths = [output["path"]] if "path" in output else []
        paths += [entry["path"] if isinstance(entry, dict) else entry for entry in listed]
        named = [step.options[name] for name in (_REPORT, "card") if isinstance(step.options.get(name), str)]
        places = [Path(path).absolute() for path in (*paths, *(beside(self._directory, text) for text in named))]
        return list(dict.fromkeys((*places, *self._cards(step, report))))


def _in_step(error: Error, step: Step) -> Error:
    """The same error, which says where it came from; once."""
    if "(in the recipe's step" not in error.message:
        error.message += f" (in the recipe's step {step.name})"
    return error


def _kept(step: Step) -> StepReport:
    return StepReport(step.name, step.command, False, 0, None, "stays in memory until it is taken")


def _is_gguf(output: Path) -> bool:
    return output.suffix.lower() == ".gguf" and not output.is_dir()

"""Recipe files: TOML with a table for every step, in the order in which they are run.

    [project]
    base = "Llama-2-7b-hf"
    aligned = "Llama-2-7b-chat-hf"
    adapter = "my-adapter"
    out = "build/repaired.gguf"

    [merge]
    model = "Llama-2-7b-chat-hf"
    adapter = ["@project"]
    out = "build/model.gguf"
    outtype = "Q4_K_M"

    [smoke]
    model = "@merge"

A table's name is its command, `convert-model` and `convert-adapter` with a dash; `quantize` is another word for
`convert-model`. Where a command is needed twice, all steps stand in `[[step]]` tables with `command = "..."` and, if
they are referred to, a `name`: TOML keeps no other order of tables than that of their first one. Keys are the options
of the command line, paths count from the recipe's directory, and `@NAME` is the output of an earlier step.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.errors import FormatError, UsageError
from converters.names import shortened
from converters.paths import existing, read_bytes
from safelora_gguf.commands.convert_adapter import convert_adapter
from safelora_gguf.commands.convert_model import convert_model
from safelora_gguf.commands.extrapolate import extrapolate
from safelora_gguf.commands.merge import merge
from safelora_gguf.commands.project import project
from safelora_gguf.commands.repair import repair
from safelora_gguf.commands.smoke import smoke
from safelora_gguf.commands.tune import tune
from safelora_gguf.recipe.options import Command, Option, checked, options_of, paths_in

COMMANDS: Mapping[str, Command] = {
    "project": project,
    "extrapolate": extrapolate,
    "merge": merge,
    "convert-model": convert_model,
    "convert-adapter": convert_adapter,
    "quantize": convert_model,
    "smoke": smoke,
    "tune": tune,
    "repair": repair,
}
_MAY_STAY = ("extrapolate", "merge")
_TAKERS = {"merge": "model", "convert-model": "source", "quantize": "source"}
"""Steps that take a model from memory, and the option by which they do."""
_ONLY_OF_FILES = (
    "out", "outtype", "to", "imatrix", "vocab-from", "split-max-size", "allow-requantize", "card", "report",
)  # fmt: skip
_STEPS = "step"
_MOST_BYTES, _MOST_DOTS = 1 << 17, 128  # of a line: reading a key takes the square of their number
_MOST_STEPS = 256
_LONGEST_NAME = 64
_REFERENCE = "@"


@dataclass(frozen=True)
class Reference:
    """`@NAME` in a step's option, with what follows the name (=SCALE).

    Attributes:
        name: of the earlier step.
        rest: the text behind it.
    """

    name: str
    rest: str


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: what it is called in references, `--from` and the report.
        command: a key of `COMMANDS`.
        options: by their names on the command line; paths as they stand in the file.
    """

    name: str
    command: str
    options: Mapping[str, Any]

    @property
    def run(self) -> Command:
        return COMMANDS[self.command]

    @property
    def known(self) -> Mapping[str, Option]:
        """The options that its command has."""
        return options_of(self.run)

    @property
    def stays_in_memory(self) -> bool:
        """Whether it writes nothing: the step that names it as its model computes both together."""
        return "out" not in self.options and self.command in _MAY_STAY

    def references(self) -> list[tuple[str, Reference]]:
        """(option, reference) for everything that it takes from earlier steps."""
        found = ((name, reference_in(text)) for name, text in paths_in(self.options, self.known))
        return [(name, reference) for name, reference in found if reference is not None]


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read and checked."""

    path: Path
    steps: tuple[Step, ...]

    @property
    def directory(self) -> Path:
        """From which its paths count."""
        return self.path.absolute().parent


def read_recipe(path: str | Path) -> Recipe:
    """Reads a recipe and checks every step's options.

    Raises:
        FileMissingError: there is no such file. FormatError: it is no TOML.
        UsageError: an unknown command or option, a missing one, a value of another kind, or a reference to a step that
            does not come before.
    """
    found = existing(path, "the recipe")
    try:
        tables = tomllib.loads(_text(found))
    except (ValueError, RecursionError) as error:  # also of bytes that are no text, and of endless numbers
        raise FormatError(f"is no TOML: {shortened(str(error))}", file=found) from None
    steps = tuple(_steps(tables))
    if not 0 < len(steps) <= _MOST_STEPS:
        told = f"has {len(steps)} steps, expected 1 to {_MOST_STEPS}: tables named {', '.join(COMMANDS)}"
        raise UsageError(f"{found}: {told}")
    steps = tuple(replace(step, options=_checked(step)) for step in steps)
    _check_references(steps)
    _check_kept(steps)
    _check_places(steps)
    return Recipe(found, steps)


def _checked(step: Step) -> dict[str, Any]:
    known = dict(step.known)
    if step.stays_in_memory:
        known["out"] = replace(known["out"], required=False)
    return checked(step.options, known, step.name)


def _text(path: Path) -> str:
    data = read_bytes(path, "the recipe", _MOST_BYTES)
    dots = max(line.count(b".") for line in data.split(b"\n"))
    if dots > _MOST_DOTS:
        told = f"has a line with {dots} dots, expected {_MOST_DOTS} at most: break a list of names into lines"
        raise FormatError(told, file=path)
    return data.decode("utf-8-sig")  # editors on Windows put a byte order mark first


def _steps(tables: Mapping[str, Any]) -> Iterator[Step]:
    if _STEPS in tables:
        if len(tables) > 1:
            other = next(name for name in tables if name != _STEPS)
            raise UsageError(f"the recipe has both [[step]] and [{other}]: which comes first would be left open")
        yield from _numbered([_named_step(table) for table in _as_tables(tables[_STEPS])])
        return
    for command, table in tables.items():
        _check_command(command)
        if isinstance(table, list):
            raise UsageError(f"the recipe has [[{command}]]: then all steps stand in [[step]] tables")
        if not isinstance(table, dict):
            raise UsageError(f"{command!r} is a value, expected a table of options: [{command}]")
        yield Step(command, command, table)


def _named_step(table: Mapping[str, Any]) -> Step:
    command = table.get("command")
    if not isinstance(command, str):
        raise UsageError(f'a [[step]] lacks its command = "...", one of {", ".join(COMMANDS)}')
    _check_command(command)
    name = table.get("name", command)
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.replace("-", "").replace("_", "").isalnum():
        expected = f"expected up to {_LONGEST_NAME} letters, digits, - and _"
        raise UsageError(f"a [[step]] has the name {name!r:.80}: {expected}")
    return Step(name, command, {key: value for key, value in table.items() if key not in {"command", "name"}})


def _check_command(command: str) -> None:
    if command not in COMMANDS:
        raise UsageError(f"the recipe has a step {command!r:.80}, expected one of {', '.join(COMMANDS)}")


def _as_tables(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
        raise UsageError("'step' is expected in double brackets: [[step]]")
    return value


def _numbered(steps: list[Step]) -> Iterator[Step]:
    """Names that stand more than once get the number of their turn: `merge`, `merge-2`."""
    seen: dict[str, int] = {}
    for step in steps:
        seen[step.name] = seen.get(step.name, 0) + 1
        yield step if seen[step.name] == 1 else replace(step, name=f"{step.name}-{seen[step.name]}")


def reference_in(text: str) -> Reference | None:
    """What a value refers to, if it begins with @."""
    if not text.startswith(_REFERENCE):
        return None
    name, equals, rest = text.removeprefix(_REFERENCE).partition("=")
    return Reference(name, equals + rest)


def _check_references(steps: tuple[Step, ...]) -> None:
    earlier: list[str] = []
    for step in steps:
        if step.name in earlier:
            raise UsageError(f"two steps of the recipe are called {step.name!r}")
        for option, reference in step.references():
            if option == "out" or reference.name not in earlier:
                told = f"steps before it: {', '.join(earlier)}" if earlier else "it is the first step"
                given = f"{option} = {'@' + reference.name!r:.80}"
                raise UsageError(shortened(f"[{step.name}] {given} is no earlier step's output; {told}"))
        earlier.append(step.name)


def _check_kept(steps: tuple[Step, ...]) -> None:
    """That every step without an output of its own is a model, and is taken by a step that can."""
    for step in steps:
        if not step.stays_in_memory:
            continue
        needless = [name for name in step.options if name in _ONLY_OF_FILES]
        if needless:
            raise UsageError(
                f"[{step.name}] has no out, and {', '.join(needless)} is for what is written: give it an out"
            )
        if step.command == "extrapolate" and step.options.get("as") != "model":
            raise UsageError(f'[{step.name}] lacks out; without one it must be a model: as = "model"')
        takers = [(later, option) for later in steps for option, reference in later.references()
                  if reference.name == step.name]  # fmt: skip
        wrong = next((later.name for later, option in takers if _TAKERS.get(later.command) != option), None)
        if wrong is not None or not takers:
            told = f"[{wrong}] needs it as a file" if wrong else "no later step takes it as its model"
            raise UsageError(f"[{step.name}] lacks out, and {told}")


def _written(step: Step) -> Iterator[tuple[str, str]]:
    """(option, path) of what a step writes under a name of its own."""
    for option in ("out", "report", "card"):
        value = step.options.get(option)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.endswith(("/", os.sep)):
                yield option, text


def _check_places(steps: tuple[Step, ...]) -> None:
    """That no two steps write to one place: the first one's output would be gone before the run ends."""
    taken: dict[str, str] = {}
    for step in steps:
        for option, text in _written(step):
            place = os.path.normpath(text)
            if place in taken:
                raise UsageError(f"[{step.name}] {option} = {text!r:.200} is where [{taken[place]}] writes already")
            taken[place] = step.name

"""What each command takes, as its function says: the options of a recipe's step are those of the command line."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from typer.models import OptionInfo

from converters.errors import UsageError
from safelora_gguf.outcome import Outcome

Command = Callable[..., Outcome]

_OF_THE_RUN = ("json", "quiet", "verbose", "force", "dry-run")
_ENDLESS = (math.inf, -math.inf)
_MOST_VALUES, _LONGEST_TEXT = 1000, 8192  # of one option; letters of a value
_WORDS_OR_NUMBERS = {"mu"}  # text on the command line, since it may be auto; a recipe has the number
_PATHS = {"out", "adapter", "compare"}  # text on the command line, since something may follow: =SCALE, =LABEL, a slash


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: as on the command line, without the dashes.
        parameter: of the command's function.
        kind: bool, int, float, str or Path; of every item where the option may be repeated.
        repeated: whether it takes a list.
        required: whether the command does not work without it.
    """

    name: str
    parameter: str
    kind: type
    repeated: bool
    required: bool

    @property
    def is_path(self) -> bool:
        """Whether its values name files, with or without something behind the name."""
        return self.kind is Path or self.name in _PATHS


def options_of(command: Command) -> Mapping[str, Option]:
    """A command's options by name, but for those that a run has once for all steps."""
    signature = inspect.signature(command, eval_str=True)
    found = (option for parameter in signature.parameters.values() for option in _options(parameter))
    return {option.name: option for option in found if option.name not in _OF_THE_RUN}


def parameters_of_the_run(command: Command) -> frozenset[str]:
    """Which of `json`, `quiet`, `verbose`, `force` and `dry_run` a command's function has."""
    known = {name.replace("-", "_") for name in _OF_THE_RUN}
    return frozenset(known & set(inspect.signature(command).parameters))


def _options(parameter: inspect.Parameter) -> list[Option]:
    """An option under each of its names."""
    kind, info = parameter.annotation, None
    if get_origin(kind) is Annotated:
        kind, info = get_args(kind)[:2]
    kinds = [item for item in (get_args(kind) or (kind,)) if item is not type(None)]
    repeated = get_origin(kinds[0]) is list or get_origin(kind) is list
    item = get_args(kinds[0])[0] if get_origin(kinds[0]) is list else kinds[0]
    required = parameter.default is inspect.Parameter.empty
    return [Option(name, parameter.name, item, repeated, required) for name in _names(parameter.name, info)]


def _names(parameter: str, info: object) -> list[str]:
    """The long names: typer has the first one that is given in an annotation as the default."""
    given = (info.default, *(info.param_decls or ())) if isinstance(info, OptionInfo) else ()
    long = [name.removeprefix("--") for name in given if isinstance(name, str) and name.startswith("--")]
    return long or [parameter.replace("_", "-")]


def checked(given: Mapping[str, Any], known: Mapping[str, Option], step: str) -> dict[str, Any]:
    """A step's values by option: of the kinds that the options have, lists where they may be repeated.

    Raises:
        UsageError: an option that the command has not, or one that it needs and that is missing, or a value of
            another kind.
    """
    for name in given:
        if name not in known:
            raise UsageError(f"[{step}] has the key {name!r:.80}, {_instead(name[:80], known)}")
    missing = [name for name, option in known.items() if option.required and name not in given]
    if missing:
        raise UsageError(f"[{step}] lacks {', '.join(missing)}")
    return {name: _value(value, known[name], step) for name, value in given.items()}


def _instead(name: str, known: Mapping[str, Option]) -> str:
    if name.replace("_", "-") in _OF_THE_RUN:
        return f"which is an option of the whole run: safelora-gguf run --{name.replace('_', '-')}"
    near = get_close_matches(name.replace("_", "-"), known, 1)
    return f"which no option is called{f'; did you mean {near[0]!r}?' if near else ''} (known: {', '.join(known)})"


def _value(value: Any, option: Option, step: str) -> Any:
    if option.repeated:
        items = value if isinstance(value, list) else [value]
        if len(items) > _MOST_VALUES:
            raise UsageError(f"[{step}] {option.name} has {len(items)} values, expected {_MOST_VALUES} at most")
        if option.required and not items:
            raise UsageError(f"[{step}] {option.name} has no values, expected at least one")
        return [_item(item, option, step) for item in items]
    return _item(value, option, step)


def _item(value: Any, option: Option, step: str) -> Any:
    kind = str if option.kind is Path else option.kind
    if kind is str and option.name in _WORDS_OR_NUMBERS and type(value) in (int, float):
        value = str(value)
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        raise UsageError(f"[{step}] {option.name} has {len(value)} letters, expected {_LONGEST_TEXT} at most")
    with contextlib.suppress(OverflowError):  # stays what it is, and is refused
        value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind or value != value or value in _ENDLESS or "\0" in str(value):  # noqa: PLR0124  NaN
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
        more = f", or a list of them ({expected} each)" if option.repeated else ""
        raise UsageError(f"[{step}] {option.name} = {value!r:.80}: expected {expected}{more}")
    return value


def arguments(values: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """What the command's function is called with."""
    return {known[name].parameter: _as_kind(value, known[name]) for name, value in values.items()}


def _as_kind(value: Any, option: Option) -> Any:
    if option.kind is not Path:
        return value
    if option.repeated:
        return [Path(item) for item in value]
    return Path(value) if isinstance(value, str) else value  # a model in memory


def with_defaults(command: Command) -> dict[str, Any]:
    """The defaults of a command's function."""
    parameters = inspect.signature(command).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}


def beside(directory: Path, text: str) -> str:
    """A path of a recipe, which counts from the recipe's own directory; what follows the name (a slash, =SCALE)
    stays."""
    return os.path.join(directory, text)  # noqa: PTH118  a Path would drop a slash at the end


def paths_in(values: Mapping[str, Any], known: Mapping[str, Option]) -> Sequence[tuple[str, str]]:
    """(option, text) for every value that names files, in order."""
    found = []
    for name, value in values.items():
        if known[name].is_path:
            found += [(name, item) for item in (value if isinstance(value, list) else [value])]
    return found

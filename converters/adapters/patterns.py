"""PEFT's rank_pattern and alpha_pattern: regular expressions from strangers' files, matched as PEFT matches them.

Python's `re` has no end to its patience, and other engines answer differently on the patterns that make it
hang; so whatever is more than a name is compiled and matched by `re` in a child process, which the system ends
when it has used up its time. Names, of which there may be one for each module, are looked up.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from converters.errors import FormatError

_CPU_SECONDS = 0.3  # of the child's own, so that a busy machine refuses nothing
_SECONDS = 20.0 if hasattr(signal, "setitimer") else 3.0  # on the clock
_LONGEST = 1000
_MOST = 10_000
_MOST_LETTERS = 20_000_000  # that are looked at in look-ups, about half a second
_PLAIN_NAME = re.compile(r"[\w.-]*")
_CHILD = f"""
import json, re, signal, sys
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_PROF, {_CPU_SECONDS})
patterns, modules = json.load(sys.stdin)
compiled = []
for pattern in patterns:
    try:
        compiled.append(re.compile(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        json.dump({{"broken": len(compiled), "error": str(error)}}, sys.stdout)
        sys.exit()
found = [next((i for i, p in enumerate(compiled) if p.match(m)), None) for m in modules]
json.dump({{"found": found}}, sys.stdout)
"""


def check_patterns(patterns: Iterable[str], key: str, path: Path) -> None:
    """Whether all are regular expressions of a sane length.

    Raises:
        FormatError: one is not.
    """
    patterns = list(patterns)
    longest = max(map(len, patterns), default=0)
    if longest > _LONGEST or len(patterns) > _MOST:
        found = f"{key} has {len(patterns)} patterns of up to {longest} characters"
        raise FormatError(f"{found}; at most {_MOST} of {_LONGEST} are read", file=path)
    _first_matches(patterns, (), key, path)


def first_matches(patterns: Sequence[str], modules: Sequence[str], path: Path) -> dict[str, str]:
    """The first pattern, in file order, that matches each module; modules that none matches are left out.

    PEFT's rule is `re.match(rf"(.*\\.)?({pattern})$", module)`.

    Raises:
        FormatError: a pattern is no regular expression or backtracks without end.
    """
    found = _first_matches(patterns, modules, "rank_pattern or alpha_pattern", path)
    return {module: patterns[i] for module, i in zip(modules, found, strict=True) if i is not None}


def _first_matches(patterns: Sequence[str], modules: Sequence[str], key: str, path: Path) -> list[int | None]:
    if all(_PLAIN_NAME.fullmatch(pattern) for pattern in patterns):
        names = _Names(patterns)
        if names.are_quick(modules):
            return [names.first(module) for module in modules]
    answer = _ask_child([rf"(.*\.)?({pattern})$" for pattern in patterns], modules, key, path)
    if "broken" in answer:
        raise _broken(patterns[answer["broken"]], answer["error"], key, path)
    found: list[int | None] = answer["found"]
    return found


class _Names:
    """Patterns that are plain names, in which a dot stands for any character."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._places: dict[tuple[tuple[int, ...], str], int] = {}
        self._layouts: dict[int, set[tuple[int, ...]]] = {}  # where dots stand, by length
        for place, pattern in enumerate(patterns):
            dots = tuple(at for at, letter in enumerate(pattern) if letter == ".")
            self._places.setdefault((dots, pattern), place)
            self._layouts.setdefault(len(pattern), set()).add(dots)

    def are_quick(self, modules: Sequence[str]) -> bool:
        """Whether `first` can be asked about all of them; not about names of several lines, either."""
        letters = 0
        for module in modules:
            letters += len(module)
            if letters > _MOST_LETTERS or "\n" in module:
                return False
            for start in _starts(module):
                length = len(module) - start
                letters += 10 + length * len(self._layouts.get(length, ()))
        return letters <= _MOST_LETTERS

    def first(self, module: str) -> int | None:
        """The place of the first one that matches the module's name, or its end behind a dot."""
        keys = (
            (dots, _dotted(module[start:], dots))
            for start in _starts(module)
            for dots in self._layouts.get(len(module) - start, ())
        )
        return min((self._places[key] for key in keys if key in self._places), default=None)


def _starts(module: str) -> list[int]:
    return [0, *(at + 1 for at, letter in enumerate(module) if letter == ".")]


def _dotted(name: str, dots: tuple[int, ...]) -> str:
    letters = list(name)
    for at in dots:
        letters[at] = "."
    return "".join(letters)


def _broken(pattern: str, error: str, key: str, path: Path) -> FormatError:
    return FormatError(f"{key}: {pattern[:100]!r} is no regular expression: {error[:200]}", file=path)


def _ask_child(patterns: Sequence[str], modules: Sequence[str], key: str, path: Path) -> dict[str, Any]:
    question = json.dumps([patterns, modules])
    command = [sys.executable, "-I", "-c", _CHILD]
    try:
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _endless(key, path) from None
    if done.returncode < 0:
        raise _endless(key, path)
    if done.returncode > 0:
        said = done.stderr.strip().rpartition("\n")[2]
        raise FormatError(f"{key} can't be matched: {said[:200]}", file=path)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _endless(key: str, path: Path) -> FormatError:
    return FormatError(
        f"a regular expression in {key} backtracks without end on this adapter's module names, or there are too many "
        f"of them (PEFT would hang, too); write the modules' names instead",
        file=path,
    )

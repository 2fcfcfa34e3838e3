"""PEFT's rank_pattern and alpha_pattern: regular expressions from strangers' files, matched as PEFT matches them.

Python's `re` has no end to its patience, and other engines answer differently on the patterns that make it
hang; so whatever is more than a name is matched by `re` in a child process that is killed when it takes too long.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from converters.errors import FormatError

_SECONDS = 3.0
_LONGEST = 1000
_MOST = 100_000
_PLAIN_NAME = re.compile(r"[\w.\\-]*")  # dots and escapes, but nothing that repeats
_CHILD = """
import json, re, sys
patterns, modules = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
print(json.dumps([next((i for i, p in enumerate(compiled) if p.match(m)), None) for m in modules]))
"""


def check_patterns(patterns: Iterable[str], key: str, path: Path) -> None:
    """Whether all are regular expressions of a sane length.

    Raises:
        FormatError: one is not.
    """
    for count, pattern in enumerate(patterns):
        if len(pattern) > _LONGEST or count > _MOST:
            raise FormatError(f"{key} has {count + 1} patterns or more, one of {len(pattern)} characters", file=path)
        try:
            re.compile(_whole(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(f"{key}: {pattern[:100]!r} is no regular expression: {error}", file=path) from None


def first_matches(patterns: Sequence[str], modules: Sequence[str], path: Path) -> dict[str, str]:
    """The first pattern, in file order, that matches each module; modules that none matches are left out.

    PEFT's rule is `re.match(rf"(.*\\.)?({pattern})$", module)`.

    Raises:
        FormatError: a pattern backtracks without end.
    """
    if not patterns:
        return {}
    whole = [_whole(pattern) for pattern in patterns]
    if all(_PLAIN_NAME.fullmatch(pattern) for pattern in patterns):
        compiled = [re.compile(pattern) for pattern in whole]
        found = [next((i for i, p in enumerate(compiled) if p.match(module)), None) for module in modules]
    else:
        found = _match_in_child(whole, modules, path)
    return {module: patterns[i] for module, i in zip(modules, found, strict=True) if i is not None}


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _match_in_child(patterns: Sequence[str], modules: Sequence[str], path: Path) -> list[int | None]:
    question = json.dumps([patterns, modules])
    command = [sys.executable, "-I", "-c", _CHILD]
    try:
        answer = subprocess.run(command, input=question, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().rpartition("\n")[2]
        raise FormatError(f"rank_pattern or alpha_pattern can't be matched: {said[:200]}", file=path) from None
    except subprocess.TimeoutExpired:
        raise FormatError(
            "a regular expression in rank_pattern or alpha_pattern backtracks without end on this adapter's module "
            "names (PEFT would hang, too); write the modules' names instead",
            file=path,
        ) from None
    found: list[int | None] = json.loads(answer.stdout)
    return found

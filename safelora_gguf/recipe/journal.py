"""What a recipe has done already: a file beside it, so that the next run goes on where an interruption came.

A step is done while nothing of what it came from has changed (its options, this program's version, its input files)
and its outputs are still as it left them. Files are recognised by size and time of change, single outputs by their
contents, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.atomic import atomic_file
from converters.errors import InputError
from converters.fingerprint import sha256_file
from converters.paths import is_there, read_json_object

_MOST_BYTES = 64 << 20
_MOST_FILES = 4096
_FORMAT = 1


@dataclass
class Journal:
    """The state of a recipe's steps; every change is written at once.

    Attributes:
        path: the file that it is kept in.
        done: by step: `key` (what it came from), `outputs` (path to its state), `report`, `status`, `cards`.
        started: by step that was begun: `outputs`, where it writes, and `before`, the state of what it replaces.
        written: when the file that was read was written (its change of state, which no archive can bring along):
            what stands at a begun step's output and is younger was made by this recipe; what is older may be anybody's,
            whatever a journal that came with the recipe says.
    """

    path: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: dict[str, dict[str, Any]] = field(default_factory=dict)
    written: int = 0
    _forgotten: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def beside(cls, recipe: Path) -> Journal:
        """The journal of a recipe; an empty one where there is none, or one that can't be read."""
        path = recipe.absolute().with_name(f".{recipe.name}.safelora-gguf.json")
        try:
            data = read_json_object(path, "the recipe's journal", _MOST_BYTES)
        except InputError:
            return cls(path)
        done, started = data.get("done"), data.get("started")
        if data.get("format") != _FORMAT or not isinstance(done, dict) or not isinstance(started, dict):
            return cls(path)
        if not all(map(_is_record, done.values())) or not all(map(_is_beginning, started.values())):
            return cls(path)
        return cls(path, done, started, path.stat().st_ctime_ns)

    def begin(self, step: str, outputs: Sequence[Path]) -> None:
        """Notes, before a step's work, where it is going to write; whatever is there already must be its own."""
        before = {str(path): {"stamp": stamp_of(path), "sha256": None} for path in outputs if is_there(path)}
        self.started[step] = {"outputs": [str(path) for path in outputs], "before": before}
        self.done.pop(step, None)
        self._save()

    def finish(
        self,
        step: str,
        key: str,
        outputs: Sequence[Path],
        report: Mapping[str, Any],
        status: int,
        *,
        cards: Sequence[Path] = (),
    ) -> None:
        """Notes that a step is complete. Its cards may be written again by a later step, or edited by hand."""
        self.started.pop(step, None)
        made = report.get("output") or {}
        hashes = {Path(made["path"]).absolute(): made["sha256"]} if "sha256" in made else {}
        stamps = {str(path): {"stamp": stamp_of(path), "sha256": hashes.get(path)} for path in outputs}
        self.done[step] = {"key": key, "outputs": stamps, "report": dict(report), "status": status}
        self.note_cards(self.done[step], cards)

    def note_cards(self, record: dict[str, Any], cards: Sequence[Path]) -> None:
        """Notes how a step's cards were left."""
        record["cards"] = {str(path): {"stamp": stamp_of(path), "sha256": None} for path in cards}
        self._save()

    def forget(self, steps: Sequence[str]) -> None:
        """Notes that steps must be run again; their outputs stay this recipe's own."""
        for step in steps:
            if step in self.done:
                self._forgotten[step] = self.done.pop(step)

    def complete(self, step: str, key: str) -> Mapping[str, Any] | None:
        """A step's record, if it is complete and nothing has changed since."""
        found = self.done.get(step)
        if found is None or found.get("key") != key:
            return None
        return found if all(is_as_left(Path(path), state) for path, state in found["outputs"].items()) else None

    def owns(self, step: str, path: Path) -> bool:
        """Whether what stands at a path was made by this step, and by nobody else since."""
        begun = self.started.get(step, {"outputs": [], "before": {}})
        if str(path) in begun["outputs"] and path.lstat().st_ctime_ns >= self.written:
            return True
        done = self.done.get(step) or self._forgotten.get(step) or {"outputs": {}, "cards": {}}
        states = {**begun["before"], **done["outputs"], **done["cards"]}
        return str(path) in states and is_as_left(path, states[str(path)])

    def _save(self) -> None:
        data = {"format": _FORMAT, "done": self.done, "started": self.started}
        with atomic_file(self.path, force=True) as file:
            file.write(json.dumps(data, indent=1).encode())


def _is_record(found: Any) -> bool:
    """Whether a step's record is one that `finish` makes: somebody may have edited the file."""
    if not isinstance(found, dict) or not found.keys() >= {"key", "outputs", "report", "status", "cards"}:
        return False
    if not isinstance(found["report"], dict) or type(found["status"]) is not int:
        return False
    if not isinstance(found["outputs"], dict) or not isinstance(found["cards"], dict):
        return False
    states = [*found["outputs"].values(), *found["cards"].values()]
    return all(map(_is_state, states))


def _is_beginning(found: Any) -> bool:
    """Whether it is what `begin` makes."""
    if not isinstance(found, dict) or not found.keys() >= {"outputs", "before"}:
        return False
    outputs, before = found["outputs"], found["before"]
    if not isinstance(outputs, list) or not all(isinstance(path, str) for path in outputs):
        return False
    return isinstance(before, dict) and all(map(_is_state, before.values()))


def _is_state(found: Any) -> bool:
    return isinstance(found, dict) and found.keys() >= {"stamp", "sha256"}


def stamp_of(path: Path) -> str | None:
    """By what a file, or a directory with everything in it, is recognised; None where there is nothing."""
    try:
        if not path.is_dir():
            return _stamp([path], path.parent)
        files = sorted(Path(place) / name for place, _, names in os.walk(path) for name in names)
        return _stamp(files[:_MOST_FILES], path)
    except OSError:
        return None


def is_as_left(path: Path, state: Mapping[str, Any]) -> bool:
    """Whether an output is what it was: untouched, or a file with the same contents."""
    if stamp_of(path) == state["stamp"]:
        return True
    return state["sha256"] is not None and path.is_file() and sha256_file(path) == state["sha256"]


def _stamp(files: Sequence[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        digest.update(f"{file.relative_to(root)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode("utf-8", "replace"))
    return digest.hexdigest()


def key_of(facts: Mapping[str, Any]) -> str:
    """One word for everything that a step comes from."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()

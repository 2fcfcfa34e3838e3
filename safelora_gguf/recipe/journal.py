"""What a recipe has done already: a file beside it, so that the next run goes on where an interruption came.

A step is done while nothing of what it came from has changed (its options, this program's version, its input files)
and its outputs are still as it left them. Files are recognised by size and time of change, single outputs by their
contents, too.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
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
_NAME, _HEADER = b"safelora", 4 << 20  # bytes: the longest safetensors and GGUF headers have it before
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_DESCRIBING = {".json", ".model", ".jinja", ".txt", ".md"}


@dataclass
class Journal:
    """The state of a recipe's steps; every change is written at once.

    Attributes:
        path: the file that it is kept in.
        done: by step: `key` (what it came from), `outputs` (path to its state), `report`, `status`, `cards`.
        started: by step that was begun: `outputs`, where it writes, and `before`, the state of what it replaces.
        written: when the file that was read was written (its change of state, which no archive can bring along):
            what stands at a begun step's output, is younger and names this program was made by this recipe; what is
            older may be anybody's, whatever a journal that came with the recipe says.
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
        if data.get("directory") != str(path.parent):  # moved or copied: its paths lead elsewhere
            return cls(path)
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

    def abandon(self, step: str) -> None:
        """Notes that a step ended in an error: what stands at its outputs now is its own, as it is."""
        places = [Path(path) for path in self.started.get(step, {"outputs": []})["outputs"]]
        before = {str(path): {"stamp": stamp_of(path), "sha256": None} for path in places if is_there(path)}
        self.started[step] = {"outputs": [], "before": before}
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
        if str(path) in begun["outputs"] and path.lstat().st_ctime_ns >= self.written and _says_so(path):
            return True
        done = self.done.get(step) or self._forgotten.get(step) or {"outputs": {}, "cards": {}}
        states = {**begun["before"], **done["outputs"], **done["cards"]}
        return str(path) in states and is_as_left(path, states[str(path)])

    def _save(self) -> None:
        data = {"format": _FORMAT, "directory": str(self.path.parent), "done": self.done, "started": self.started}
        with atomic_file(self.path, force=True) as file:
            file.write(json.dumps(data, indent=1).encode())


def _says_so(path: Path) -> bool:
    """Whether a file, or one of a directory's, names this program where all that we write does: near its beginning."""
    try:
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        return any(_NAME in _beginning(file) for file in files[:_MOST_FILES])
    except OSError:
        return False


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEADER)


def _is_record(found: Any) -> bool:
    """Whether a step's record is one that `finish` makes: somebody may have edited the file."""
    if not isinstance(found, dict) or not found.keys() >= {"key", "outputs", "report", "status", "cards"}:
        return False
    report = found["report"]
    if not isinstance(report, dict) or found["status"] not in (0, 1):
        return False
    output = report.get("output") or {}
    if not isinstance(output, dict) or not isinstance(output.get("path", ""), str):
        return False
    return _are_states(found["outputs"]) and _are_states(found["cards"])


def _is_beginning(found: Any) -> bool:
    """Whether it is what `begin` makes."""
    if not isinstance(found, dict) or not found.keys() >= {"outputs", "before"}:
        return False
    outputs = found["outputs"]
    return isinstance(outputs, list) and all(map(_is_path, outputs)) and _are_states(found["before"])


def _are_states(found: Any) -> bool:
    """Whether it is paths with their states."""
    if not isinstance(found, dict) or not all(map(_is_path, found)):
        return False
    return all(isinstance(state, dict) and state.keys() >= {"stamp", "sha256"} for state in found.values())


def _is_path(found: Any) -> bool:
    return isinstance(found, str) and "\0" not in found


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


def stamp_of_input(path: Path) -> str | None:
    """The same for what a step reads: with a single file come the other shards of its model, and what describes it."""
    try:
        if path.is_dir() or not path.is_file():
            return stamp_of(path)
        match = _SHARD.fullmatch(path.stem)
        own = {path} if match is None else set(path.parent.glob(f"{glob.escape(match[1])}-*{path.suffix}"))
        if path.suffix in {".safetensors", ".gguf"}:
            own |= {file for file in path.parent.iterdir() if file.suffix in _DESCRIBING and file.is_file()}
        return _stamp(sorted(own)[:_MOST_FILES], path.parent)
    except OSError:
        return None


def key_of(facts: Mapping[str, Any]) -> str:
    """One word for everything that a step comes from."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()

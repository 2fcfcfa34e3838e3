"""Captured inputs of both sets, range by range.

A set is made of parts, each a file of rows, one for each kept token, for each input that weights have. Where the
scratch device has no room for the inputs of all weights at once, they are captured range by range, anew for every use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from converters.errors import Error, LlamaError
from safelora_gguf.repair.reading.captured_rows import UNREAD, CapturedSet, JoinedRows
from safelora_gguf.smoke.llama.capture_file import ALIGNMENT, nbytes
from safelora_gguf.smoke.parent.session import Captured, Session, Tell
from safelora_gguf.smoke.protocol import AdapterChoice, InputGroup, InputShape, Reading

__all__ = ["CapturedSet", "CapturedSets", "Inputs", "Mixture", "Progress", "RangeInputs", "Taken"]

Progress = Callable[[int, int, str], None]
"""Called with prompts done, prompts of this step, and the step's name."""


@dataclass(frozen=True)
class RangeInputs:
    """Both sets, of the weights of one range; good until the next range is asked for."""

    weights: tuple[str, ...]
    harmful: CapturedSet
    benign: CapturedSet


class Inputs(Protocol):
    """What a solver takes the inputs from, as often as it likes."""

    def ranges(self) -> Iterator[RangeInputs]: ...


@dataclass(frozen=True)
class Taken:
    """What one part of a set is taken from.

    Attributes:
        adapters: that the model has meanwhile.
        readings: of the prompts that give tokens to it.
        items: of each reading, the prompt's place in `Asked`.
        folds: of each reading, the prompt's fold.
        share: of this part in the set's second moment.
    """

    name: str
    adapters: tuple[AdapterChoice, ...]
    readings: tuple[Reading, ...]
    items: tuple[int, ...]
    folds: tuple[int, ...]
    share: float = 1.0

    @property
    def prompts(self) -> int:
        return len(self.readings)

    @property
    def tokens(self) -> int:
        return sum(len(reading.keep) for reading in self.readings)


@dataclass(frozen=True)
class Mixture:
    """What one set, H or G, is taken from."""

    name: str
    parts: tuple[Taken, ...]

    @property
    def prompts(self) -> int:
        """Each counts once, however many parts it is in."""
        return len({item for part in self.parts for item in part.items})

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)


class CapturedSets:
    """Both sets of all weights, range by range.

    Attributes:
        harmful, benign: what H and G are taken from.
        groups: inputs that weights share, of all ranges; their rows and offsets are those of no file.
        bytes: that all inputs of both sets take.
        plan: the weights of each range; one range is captured once and kept.
        passes: how often the model has read both sets so far.
        notes: prompts that were left out, and what llama.cpp's process did otherwise than asked.
        losses: children that were lost on the way, without harm.
    """

    def __init__(
        self,
        session: Session,
        harmful: Mixture,
        benign: Mixture,
        groups: Sequence[InputGroup],
        shapes: Mapping[str, InputShape],
        *,
        scratch: Path,
        room: int,
        notes: Sequence[str] = (),
        losses: Sequence[Error] = (),
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            groups: as a capture of a single token found them.
            shapes: of the inputs of their weights.
            room: bytes that files may take at a time; a group that takes more has them all the same.
        """
        self.harmful = harmful
        self.benign = benign
        self.groups = tuple(groups)
        self.bytes = sum(size(group, harmful, benign) for group in groups)
        self.plan = tuple(_divided([(group.weights, size(group, harmful, benign)) for group in groups], room))
        self.passes = 0
        self.notes = list(notes)
        self.losses = list(losses)
        self._session = session
        self._shapes = shapes
        self._scratch = scratch
        self._progress = progress
        self._kept: RangeInputs | None = None
        self._last = benign.parts[0].adapters

    def ranges(self) -> Iterator[RangeInputs]:
        """Captures what is not there yet. Not for two at a time, where there is more than one range.

        Raises:
            LlamaError, UnsupportedError: llama.cpp crashed or hung twice, or could not read a single prompt of a set.
            MissingLlamaError: llama-cpp-python does not load.
            WriteError: the disk is full or fails.
        """
        for number, weights in enumerate(self.plan):
            if self._kept is not None:
                yield self._kept
                continue
            parts = [*self.harmful.parts, *self.benign.parts]
            files = [self._scratch / f"part-{place}-{number}.inputs" for place in range(len(parts))]
            try:
                self.passes += 1
                found = self._range(weights, parts, files)
                self._kept = found if len(self.plan) == 1 else None
                yield found
            finally:
                if self._kept is None:
                    _remove(files)

    def _range(self, weights: tuple[str, ...], parts: Sequence[Taken], files: Sequence[Path]) -> RangeInputs:
        """Reads the parts, first those with the adapters that the last one had: setting them takes as long as a few
        prompts."""
        order = sorted(range(len(parts)), key=lambda place: parts[place].adapters != self._last)
        found = {place: self._captured(parts[place], weights, files[place]) for place in order}
        self._last = parts[order[-1]].adapters
        read = [(part, file, found[place]) for place, (part, file) in enumerate(zip(parts, files, strict=True))]
        count = len(self.harmful.parts)
        harmful = _joined(self._session, self.harmful.name, read[:count])
        return RangeInputs(weights, harmful, _joined(self._session, self.benign.name, read[count:]))

    def _captured(self, taken: Taken, weights: Sequence[str], file: Path) -> Captured:
        how = " with the adapter" if taken.adapters else ""
        tell = telling(self._progress, taken.prompts, f"reading {taken.name} prompts{how}")
        shapes = {weight: self._shapes[weight] for weight in weights}
        found = captured(self._session, taken, shapes, file, losses=self.losses, tell=tell)
        errors = [error for error in found.errors if error is not None]
        told = list(found.notes)
        if errors:
            told.append(f"{len(errors)} of {taken.prompts} {taken.name} prompts give no inputs; the first: {errors[0]}")
        self.notes += [note for note in dict.fromkeys(told) if note not in self.notes]
        return found


def _joined(session: Session, name: str, parts: Sequence[tuple[Taken, Path, Captured]]) -> CapturedSet:
    """One set; parts of which nothing could be read are no parts of it.

    Raises:
        LlamaError: there is none that could.
    """
    read = [part for part in parts if any(part[2].rows)]
    if not read:
        raise nothing_given(session, name, parts[0][2])
    rows = JoinedRows([file for _, file, _ in read], [found.groups for _, _, found in read])
    return CapturedSet(
        rows,
        rows.groups,
        np.concatenate([_by_row(taken, taken.items, found) for taken, _, found in read]),
        np.concatenate([_by_row(taken, taken.folds, found) for taken, _, found in read]),
        sum(sum(found.rows) for _, _, found in read),
        tuple(taken.tokens for taken, _, _ in read),
        tuple(taken.share for taken, _, _ in read),
    )


def captured(
    session: Session,
    taken: Taken,
    weights: Mapping[str, InputShape],
    file: Path,
    *,
    losses: list[Error],
    tell: Tell | None = None,
) -> Captured:
    """The inputs of weights in a file.

    Args:
        losses: takes a loss that did no harm.

    Raises:
        LlamaError and others: whatever the session tells as failure, where there is no file.
    """
    found = session.capture(taken.adapters, taken.readings, weights, file, tell=tell)
    if found.failure is not None:
        if not found.complete:
            raise found.failure
        losses.append(found.failure)
    return found


def nothing_given(session: Session, name: str, found: Captured) -> LlamaError:
    """Why there is nothing of a set, though there is a file."""
    error = next((error for error in found.errors if error is not None), "no reason given")
    return LlamaError(f"not one {name} prompt gives inputs; the first: {error}", file=session.file)


def _by_row(taken: Taken, values: Sequence[int], found: Captured) -> npt.NDArray[np.int32]:
    """(rows,) Values of the readings, for each of their rows; `UNREAD` where these can't be used."""
    known = [value if rows else UNREAD for value, rows in zip(values, found.rows, strict=True)]
    return np.repeat(np.asarray(known, np.int32), [len(reading.keep) for reading in taken.readings])


def size(group: InputGroup, harmful: Mixture, benign: Mixture) -> int:
    """Bytes that a group takes in the files of both sets."""
    parts = [*harmful.parts, *benign.parts]
    rows = sum(part.tokens for part in parts)
    return nbytes(rows, group.slots, group.width, group.used) + len(parts) * ALIGNMENT


def _divided(sizes: Sequence[tuple[Sequence[str], int]], room: int) -> Iterator[tuple[str, ...]]:
    """The weights in as few ranges as can be, each of groups that follow upon each other and fit into the room.

    Args:
        sizes: weights and bytes of each group.
    """
    found: list[str] = []
    left = room
    for weights, taken in sizes:
        if found and taken > left:
            yield tuple(found)
            found, left = [], room
        found += weights
        left -= taken
    yield tuple(found)


def telling(progress: Progress | None, count: int, step: str) -> Tell | None:
    return None if progress is None else lambda done: progress(done, count, step)


@contextlib.contextmanager
def removed(files: Sequence[Path]) -> Iterator[None]:
    """Files that are gone after the block."""
    try:
        yield
    finally:
        _remove(files)


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)

"""The rows of a set of inputs: those of several captures, one after another, and what each counts.

A set is a mixture: each of its parts has a share of the set's second moment, however many rows it has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from converters.errors import LlamaError, WriteError, system_reason
from safelora_gguf.smoke.llama.capture_file import BrokenCaptureError, CaptureReader
from safelora_gguf.smoke.protocol import InputGroup

UNREAD = -1
"""In place of a prompt's number and fold: a row of a prompt that could not be read."""


class Rows(Protocol):
    """Gives inputs as `CaptureReader` does."""

    def inputs(self, group: InputGroup, first: int = 0, last: int | None = None) -> Any:
        """Rows `first` to `last` (excluded; None: all that follow), float32 (rows, slots, width)."""

    def experts(self, group: InputGroup) -> Any:
        """The experts that each row went to, int32 (rows, used)."""


@dataclass(frozen=True)
class CapturedSet:
    """The inputs of one set, H or G, of the weights of one range.

    Attributes:
        items: (rows,) which prompt each row is of, by its place in `Asked`; `UNREAD`: not to be used.
        folds: (rows,) that prompt's fold.
        tokens: N: rows that can be used.
        lengths: rows of each part, which follow upon each other; empty: there is one part.
        shares: of each part in the second moment.
    """

    reader: Rows
    groups: tuple[InputGroup, ...]
    items: npt.NDArray[np.int32]
    folds: npt.NDArray[np.int32]
    tokens: int
    lengths: tuple[int, ...] = ()
    shares: tuple[float, ...] = (1.0,)

    def without(self, fold: int | None) -> npt.NDArray[np.bool_]:
        """(rows,) Which rows a fold's solution is made from: those of all other folds; None: all that can be used."""
        read: npt.NDArray[np.bool_] = self.items != UNREAD
        return read if fold is None else read & (self.folds != fold)

    def parts(self) -> npt.NDArray[np.int32]:
        """(rows,) The part that each row is of, by its place in `shares`."""
        return np.repeat(np.arange(len(self.shares), dtype=np.int32), self.lengths or (len(self.items),))

    def weights(self, fold: int | None) -> npt.NDArray[np.float64]:
        """(rows,) What each row counts in the second moment of a fold's solution, C = sum over rows of w x x^T.

        All used rows of a part count the same, together the part's share; a part without any gives its share to the
        others in proportion. Rows that are left out count 0. Their sum is 1, or 0 where no row is used.
        """
        used, parts = self.without(fold), self.parts()
        rows = np.bincount(parts[used], minlength=len(self.shares))
        shares = np.where(rows > 0, np.asarray(self.shares, np.float64), 0.0)
        each = shares / np.maximum(rows, 1) / (shares.sum() or 1.0)
        weights: npt.NDArray[np.float64] = np.where(used, each[parts], 0.0)
        return weights

    def group_of(self, weight: str) -> InputGroup:
        """The rows that are this weight's inputs.

        Raises:
            KeyError: it is not in this range.
        """
        for group in self.groups:
            if weight in group.weights:
                return group
        raise KeyError(weight)


class JoinedRows:
    """The rows of several captures of the same weights, one capture after another.

    Attributes:
        groups: inputs that weights share in all captures; their rows are those of all, their offsets those of no file.

    All methods raise
        LlamaError: a file is not what llama.cpp's process said that it wrote.
        WriteError: the system can't read it.
    """

    def __init__(self, files: Sequence[Path], groups: Sequence[Sequence[InputGroup]]) -> None:
        """
        Args:
            groups: of each file; each has all weights.
        """
        self._captures = [_Capture.opened(*one) for one in zip(files, groups, strict=True)]
        self.groups = tuple(self._shared())

    def inputs(self, group: InputGroup, first: int = 0, last: int | None = None) -> Any:
        """Rows `first` to `last` (excluded; None: all that follow) of all captures, float32 (rows, slots, width)."""
        last = group.rows if last is None else last
        assert 0 <= first <= last <= group.rows, (first, last, group.rows)
        found, start = [], 0
        for capture in self._captures:
            own = capture.groups[group.weights[0]]
            low, high = max(first - start, 0), min(last - start, own.rows)
            if low < high:
                with _told(capture.file):
                    found.append(capture.reader.inputs(own, low, high))
            start += own.rows
        if not found:
            return np.empty((0, group.slots, group.width), np.float32)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def experts(self, group: InputGroup) -> Any:
        """The experts that each row went to, int32 (rows, used)."""
        found = []
        for capture in self._captures:
            with _told(capture.file):
                found.append(capture.reader.experts(capture.groups[group.weights[0]]))
        return np.concatenate(found)

    def _shared(self) -> Iterator[InputGroup]:
        together: dict[tuple[int, ...], list[str]] = {}
        for weight in self._captures[0].groups:
            together.setdefault(tuple(one.groups[weight].offset for one in self._captures), []).append(weight)
        for names in together.values():
            own = [one.groups[names[0]] for one in self._captures]
            if len({(one.width, one.slots, one.used) for one in own}) > 1:
                told = f"captured inputs are of several forms: {', '.join(map(str, own))}; run it again"
                raise LlamaError(told, file=self._captures[0].file, tensor=names[0])
            yield replace(own[0], weights=tuple(names), rows=sum(one.rows for one in own))


@dataclass(frozen=True)
class _Capture:
    """One file, and the input of each weight in it."""

    file: Path
    reader: CaptureReader
    groups: Mapping[str, InputGroup]

    @classmethod
    def opened(cls, file: Path, groups: Sequence[InputGroup]) -> _Capture:
        with _told(file):
            reader = CaptureReader(file, groups)
        return cls(file, reader, {weight: group for group in groups for weight in group.weights})


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    """Failures of a file of captured inputs, for the user."""
    try:
        yield
    except BrokenCaptureError as error:
        told = f"the inputs that llama.cpp's process wrote can't be used: {error}; run it again"
        raise LlamaError(told, file=file) from error
    except OSError as error:
        told = f"captured inputs can't be read: {system_reason(error)}; run it again, or set TMPDIR to another device"
        raise WriteError(told, file=file) from error

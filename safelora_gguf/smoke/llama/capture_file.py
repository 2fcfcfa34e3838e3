"""Captured inputs of weights in a file: rows of F16 with a power of two for each, group after group; numpy alone.

The file (little-endian), for as long as one command runs; its own reader still checks every size. Each group begins at
its `offset`, a multiple of ALIGNMENT, and holds, in this order:

    values   F16 (rows, slots, width)
    scales   F32 (rows, slots)      input = value * scale; 0: the row was never captured
    experts  I32 (rows, used)       where weights are stacks of experts: those a row went to; -1: never captured

F16 alone would overflow on the outliers that language models have: a row's scale brings its largest element just below
2^15, so that elements down to 2^-29 of that one keep eleven bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from safelora_gguf.smoke.protocol import InputGroup

ALIGNMENT = 64

_VALUE, _SCALE, _EXPERT = (np.dtype(code) for code in ("<f2", "<f4", "<i4"))
_EXPONENT = 15  # of the largest element of a row, as it is stored
_LEAST_EXPONENT = -126  # of a scale: a normal float32
_NEVER = -1


class BrokenCaptureError(Exception):
    """The file is not what the groups say."""


def nbytes(rows: int, slots: int, width: int, used: int) -> int:
    """What a group takes in the file, without what aligns the next one."""
    return rows * (slots * (width * _VALUE.itemsize + _SCALE.itemsize) + used * _EXPERT.itemsize)


def halves(values: Any) -> Any:
    """float32 values as F16, rounded to nearest even."""
    with np.errstate(over="ignore"):
        return values.astype(_VALUE)


def halved(inputs: Any, halves: Callable[[Any], Any] = halves) -> tuple[Any, Any]:
    """Inputs float32 (..., width) as F16 values and their scales, float32 (...), powers of two; a scale is NaN where an
    input is not finite.

    Args:
        halves: does the same as the function of that name, faster.
    """
    largest = np.linalg.norm(inputs, np.inf, axis=-1)
    finite = np.isfinite(largest)
    _, exponent = np.frexp(np.where(finite, largest, 1.0))
    exponent = np.where(largest == 0, 0, np.maximum(exponent - _EXPONENT, _LEAST_EXPONENT))
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told by its scale
        values = halves(inputs * np.ldexp(np.float32(1), -exponent)[..., None])
    return values, np.where(finite, np.ldexp(np.float32(1), exponent), np.nan).astype(_SCALE)


@dataclass
class _Written:
    """A group of a file that is being written: its scales and experts stay in memory, they go last."""

    width: int
    slots: int
    used: int
    offset: int
    scales: Any
    experts: Any


class CaptureWriter:
    """Writes a file in place, each group with room for `rows` rows.

    Raises:
        OSError: the file can't be written.
    """

    def __init__(self, stream: IO[bytes], rows: int) -> None:
        self.rows = rows
        self._stream = stream
        self._groups: list[_Written] = []
        self._end = 0

    def add_group(self, *, width: int, slots: int, used: int) -> int:
        """The number of a new group, whose rows were never captured so far."""
        rows, offset = self.rows, _aligned(self._end)
        scales = np.zeros((rows, slots), _SCALE)
        self._groups.append(_Written(width, slots, used, offset, scales, np.full((rows, used), _NEVER, _EXPERT)))
        self._end = offset + nbytes(rows, slots, width, used)
        self._stream.truncate(self._end)
        return len(self._groups) - 1

    def put(self, group: int, row: int, values: Any, scales: Any, experts: Any = None) -> None:
        """Rows from `row` on: F16 values (n, slots, width) and scales (n, slots) of `halved`; experts (n, used)."""
        written, last = self._groups[group], row + len(values)
        assert values.shape[1:] == (written.slots, written.width), values.shape
        assert 0 <= row <= last <= self.rows, (row, last, self.rows)
        written.scales[row:last] = scales
        if written.used:
            written.experts[row:last] = experts
        self._stream.seek(written.offset + row * written.slots * written.width * _VALUE.itemsize)
        self._stream.write(np.ascontiguousarray(values).data)

    def drop(self, first: int, last: int) -> None:
        """Makes rows `first` to `last` (excluded) ones that were never captured."""
        for group in self._groups:
            group.scales[first:last] = 0
            group.experts[first:last] = _NEVER

    def close(self, weights: Sequence[Sequence[str]]) -> tuple[InputGroup, ...]:
        """Writes what is left; the groups, given the names of their weights in the order added."""
        for group in self._groups:
            self._stream.seek(group.offset + self.rows * group.slots * group.width * _VALUE.itemsize)
            self._stream.write(group.scales.data)
            self._stream.write(group.experts.data)
        self._stream.flush()
        return tuple(
            InputGroup(tuple(names), group.width, self.rows, group.slots, group.used, group.offset)
            for names, group in zip(weights, self._groups, strict=True)
        )


class CaptureReader:
    """The groups of a file.

    Raises:
        BrokenCaptureError: the file is not as large as the groups need, or they overlap or are no groups.
        OSError: it can't be read.
    """

    def __init__(self, file: Path, groups: Sequence[InputGroup]) -> None:
        self.groups = tuple(groups)
        self._file = file
        size = file.stat().st_size
        end = 0
        for group in self.groups:
            _check_counts(group)
            if group.offset % ALIGNMENT or group.offset < end:
                raise BrokenCaptureError(f"the group at {group.offset} is not aligned, or lies within another one")
            end = group.offset + nbytes(group.rows, group.slots, group.width, group.used)
        if size != end:
            raise BrokenCaptureError(f"it has {size} bytes, its groups take {end}")

    def inputs(self, group: InputGroup, first: int = 0, last: int | None = None) -> Any:
        """Rows `first` to `last` (excluded; None: all that follow), float32 (rows, slots, width); zeros where a row was
        never captured.

        Raises:
            BrokenCaptureError: the file ends before, or holds what is not finite or no scale.
            OSError: it can't be read.
        """
        last = group.rows if last is None else last
        assert 0 <= first <= last <= group.rows, (first, last, group.rows)
        rows, slots = last - first, group.slots
        row_bytes = slots * group.width * _VALUE.itemsize
        values = self._read(_VALUE, group.offset + first * row_bytes, rows * slots * group.width)
        scales = self._scales(group, first, last)[..., None]
        # a row that was never captured, or was given up, may hold anything
        inputs = np.where(scales == 0, np.float32(0), values.reshape(rows, slots, group.width))
        with np.errstate(invalid="ignore", over="ignore"):
            np.multiply(inputs, scales, out=inputs)
        if not np.isfinite(inputs).all():
            raise BrokenCaptureError(f"the group at {group.offset} holds numbers that are not finite")
        return inputs

    def experts(self, group: InputGroup) -> Any:
        """The experts that each row went to, int32 (rows, used); -1 where a row was never captured.

        Raises:
            BrokenCaptureError: the file ends before.
            OSError: it can't be read.
        """
        before = nbytes(group.rows, group.slots, group.width, 0)
        experts = self._read(_EXPERT, group.offset + before, group.rows * group.used)
        return experts.reshape(group.rows, group.used)

    def check(self, group: InputGroup, read: Sequence[bool], experts: int) -> None:
        """That all rows that were read are there, and went to some of so many experts; 0: to none.

        Args:
            read: of each row, whether it was.

        Raises:
            BrokenCaptureError: they are not.
            OSError: the file can't be read.
        """
        if (group.used == 0) != (experts == 0) or group.used > experts:
            raise BrokenCaptureError(f"{group.weights[0]} has {experts} experts, and {group.used} were used")
        rows = np.asarray(read, bool)
        if (self._scales(group, 0, group.rows)[rows] == 0).any():
            raise BrokenCaptureError(f"the group at {group.offset} lacks rows of what was read")
        chosen = self.experts(group)[rows]
        if ((chosen < 0) | (chosen >= experts)).any():
            raise BrokenCaptureError(f"the group at {group.offset} names experts that {group.weights[0]} has not")

    def _scales(self, group: InputGroup, first: int, last: int) -> Any:
        """float32 (rows, slots): 0 or a positive power of two."""
        slots = group.slots
        after = group.offset + (group.rows * group.width * _VALUE.itemsize + first * _SCALE.itemsize) * slots
        scales = self._read(_SCALE, after, (last - first) * slots).reshape(-1, slots)
        mantissa, _ = np.frexp(scales)
        if not (np.isfinite(scales) & ((scales == 0) | (mantissa == 0.5))).all():
            raise BrokenCaptureError(f"the group at {group.offset} has scales that are not finite, or no powers of two")
        return scales

    def _read(self, kind: Any, offset: int, count: int) -> Any:
        values = np.fromfile(self._file, kind, count, offset=offset)
        if values.size != count:
            raise BrokenCaptureError(f"it ends within the group at {offset}")
        return values


def _check_counts(group: InputGroup) -> None:
    one_slot = group.slots in {1, group.used}
    if not (group.weights and group.width > 0 and group.rows >= 0 and group.used >= 0 and group.slots > 0 and one_slot):
        raise BrokenCaptureError(f"a group is none: {group}")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT

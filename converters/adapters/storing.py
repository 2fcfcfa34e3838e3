"""Rounding pairs to the type they are stored in, losing as little of their product as that type allows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from converters.errors import UnsupportedError
from converters.ggml import QType, decode, encode, fits
from converters.products import relative_error

_AHEAD = 2  # threads, and stacks that wait in memory
_EXPECTED_ERROR = {QType.F32: 0.0, QType.F16: 1e-3, QType.BF16: 8e-3, QType.Q8_0: 2e-2}
"""What rounding alone costs a pair; more than that means that values fell under the type's range."""


@dataclass(frozen=True)
class PairOut:
    """A pair that is about to be written.

    Attributes:
        name: what its tensors are called, as far as the format's own endings.
        a_shape, b_shape: (r, in) and (out, r).
        load: gives A and B in float32 on the CPU, in the output's layout and scale.
        source: the file that the pair comes from, for messages.
        embedding: whether the weight is an embedding table; formats name its pairs in their own way.
        transpose_a: whether A is stored as (in, r).
        stacked: whether it is one matrix of a stack (experts, ...) stored as one tensor.
    """

    name: str
    a_shape: tuple[int, int]
    b_shape: tuple[int, int]
    load: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    source: Path
    embedding: bool = False
    transpose_a: bool = False
    stacked: bool = False

    @property
    def stored_a_shape(self) -> tuple[int, int]:
        return self.a_shape[::-1] if self.transpose_a else self.a_shape

    def types(self, qtype: QType) -> tuple[QType, QType]:
        """The types of A and B: `qtype`, or F16 where rows are no whole number of its blocks."""
        a, b = (qtype if fits(shape, qtype) else QType.F16 for shape in (self.stored_a_shape, self.b_shape))
        return a, b


def of_rank(pair: PairOut, rank: int) -> PairOut:
    """The pair with zeros in A and B up to a rank that is no smaller: the same delta, in a stack of one rank."""
    added = rank - pair.a_shape[0]
    if added == 0:
        return pair

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        a, b = pair.load()
        return torch.nn.functional.pad(a, (0, 0, 0, added)), torch.nn.functional.pad(b, (0, added))

    return replace(pair, a_shape=(rank, pair.a_shape[1]), b_shape=(pair.b_shape[0], rank), load=load)


def zeros_like(pair: PairOut) -> PairOut:
    """A pair of the same shapes that changes nothing, for an expert without one."""
    return replace(pair, load=lambda: (torch.zeros(pair.a_shape), torch.zeros(pair.b_shape)))


@dataclass(frozen=True)
class Rounding:
    """What storing did to a pair.

    Attributes:
        error: ||stored delta - delta|| / ||delta|| (Frobenius).
        exponent: B was multiplied by 2**exponent and A divided by it, which leaves the delta as it is.
        types: how A and B are stored.
    """

    error: float
    exponent: int
    types: tuple[QType, QType]


@dataclass(frozen=True)
class RoundedPair:
    """A pair in its stored bytes."""

    a: bytes
    b: bytes
    rounding: Rounding


def round_pair(pair: PairOut, qtype: QType) -> RoundedPair:
    """Rounds one pair to `qtype`.

    Where B (shrunk by a projection, say) falls under a narrow type's range, powers of two move from A to B:
    that is exact, and keeps both in range.

    Raises:
        UnsupportedError: the values don't fit the type even so.
    """
    return _round(pair, *pair.load(), qtype)


def rounded_in_turn(stacks: Iterable[Sequence[PairOut]], qtype: QType) -> Iterator[list[RoundedPair]]:
    """Every stack's pairs rounded, stacks in order: the next two are rounded while one is being written.

    Pairs are loaded in the caller's thread, so that `load` need not care.
    """
    with ThreadPoolExecutor(_AHEAD) as pool:
        waiting: deque[list[Future[RoundedPair]]] = deque()
        for stack in stacks:
            waiting.append([pool.submit(_round, pair, *pair.load(), qtype) for pair in stack])
            if len(waiting) > _AHEAD:
                yield [rounded.result() for rounded in waiting.popleft()]
        while waiting:
            yield [rounded.result() for rounded in waiting.popleft()]


def _round(pair: PairOut, a: torch.Tensor, b: torch.Tensor, qtype: QType) -> RoundedPair:
    types = pair.types(qtype)
    rounded = _rounded(a, b, types, 0, pair.transpose_a)
    if rounded.rounding.error > max(_EXPECTED_ERROR[kind] for kind in types):
        rounded = min(
            rounded,
            _rounded(a, b, types, _balance(a, b), pair.transpose_a),
            key=lambda candidate: candidate.rounding.error,
        )
    if not math.isfinite(rounded.rounding.error):
        message = f"its values don't fit the type {qtype.name}; use --outtype f32"
        raise UnsupportedError(message, file=pair.source, tensor=pair.name)
    return rounded


def _rounded(
    a: torch.Tensor, b: torch.Tensor, types: tuple[QType, QType], exponent: int, transpose: bool
) -> RoundedPair:
    if exponent:
        factor = torch.tensor(2.0, dtype=torch.float32) ** exponent
        a, b = a / factor, b * factor
    stored_a = a.T.contiguous() if transpose else a
    data = encode(stored_a, types[0]), encode(b, types[1])
    if types == (QType.F32, QType.F32):
        return RoundedPair(*data, Rounding(0.0, exponent, types))
    back = decode(data[0], tuple(stored_a.shape), types[0])
    error = relative_error(a, b, back.T if transpose else back, decode(data[1], tuple(b.shape), types[1]))
    return RoundedPair(*data, Rounding(math.inf if math.isnan(error) else error, exponent, types))


def _balance(a: torch.Tensor, b: torch.Tensor) -> int:
    """The exponent that brings the largest entries of A and B to about the same size."""
    largest_a, largest_b = float(a.abs().max()), float(b.abs().max())
    if largest_a == 0 or largest_b == 0 or not math.isfinite(largest_a * largest_b):
        return 0
    return round((math.log2(largest_a) - math.log2(largest_b)) / 2)

"""What every format comes down to: named tensors whose headers are known before any data is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


def matrices_within(start: int, stop: int, height: int) -> Iterator[tuple[int, int, int]]:
    """The matrices of some height that rows [start, stop) of a stack are in: number, and its own first and last row."""
    for number in range(start // height, -(-stop // height)):
        first = number * height
        yield number, max(start - first, 0), min(stop - first, height)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its file's header describes it.

    Attributes:
        name: the name in the file.
        shape: outermost dimension first, as in torch: a weight is (out, in).
        dtype: the type's name as its format spells it (F32, F16, BF16, Q4_K, ...).
        nbytes: the size of the data in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, from headers alone."""

    def load(self, name: str) -> torch.Tensor:
        """The tensor on the CPU in its stored floating type, float32 where that is a quantized one. May share the
        file's pages: not to be changed."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor seen as a matrix, all dimensions but the last merged; like `load`, but
        only these rows are read."""

    def prefetch(self, name: str) -> None:
        """Asks the system to read this tensor's pages soon; returns at once."""

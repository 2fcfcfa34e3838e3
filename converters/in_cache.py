"""Passes over large tensors in pieces that stay in the processor's cache, each of which torch takes on one thread.

In one go every step of a pass would read and write memory again, and wake torch's other threads, which on a busy
machine wait for each other longer than they work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

_PIECE = 1 << 15  # elements, which torch does not share out yet
_SAFE_SQUARES = (1e-20, 1e30)  # sums in float32 that have lost nothing to its range


def pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a matrix (rows, columns), a few at a time; at least one."""
    step = max(1, _PIECE // max(1, shape[-1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def square(values: torch.Tensor) -> float:
    """||values||_F^2 of a piece; not finite where a value is not."""
    total = float(torch.linalg.vector_norm(values)) ** 2  # in float64 from the start it takes three times as long
    if _SAFE_SQUARES[0] < total < _SAFE_SQUARES[1]:
        return total
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite numbers."""
    flat = values.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        least, most = flat[start : start + _PIECE].aminmax()
        if not (math.isfinite(float(least)) and math.isfinite(float(most))):
            return False
    return True


def copied(values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copies (rows, columns) into `out`, whatever types the two have."""
    for some in pieces(tuple(values.shape)):
        out[some].copy_(values[some])
    return out


def widened(values: torch.Tensor, out: torch.Tensor) -> float:
    """Copies (rows, columns) into `out`, float32, unless they are the same; ||values||_F^2."""
    total = 0.0
    for some in pieces(tuple(values.shape)):
        if out is not values:
            out[some].copy_(values[some])
        total += square(out[some])
    return total


def lost(stored: torch.Tensor, wanted: torch.Tensor) -> float:
    """||stored - wanted||_F^2 of two matrices in float32; `stored` is used up."""
    return sum(square(stored[some].sub_(wanted[some])) for some in pieces(tuple(wanted.shape)))


def rounded(values: torch.Tensor, out: torch.Tensor) -> tuple[float, float]:
    """Rounds (rows, columns) to the type of `out`, to nearest even: from float64 if it is that, or else from float32.

    Returns:
        ||out - values||_F^2 and ||values||_F^2.
    """
    off = size = 0.0
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    for some in pieces(tuple(values.shape)):
        wanted, stored = values[some].to(wide), out[some]
        stored.copy_(wanted)
        size += square(wanted)
        if out.dtype != wide:
            off += square(stored.to(wide).sub_(wanted))
    return off, size

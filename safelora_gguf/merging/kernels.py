"""Kernels of merging: some rows of a weight with what adapters add to them.

A pair's update of a weight (out, in) is s * B @ A with A (r, in) and B (out, r). A table of tokens is stored turned
over, (vocabulary, width) = (s * B @ A).T, as are the experts of some checkpoints: `transposed` says so. Rows are asked
for piece by piece, so that nothing of a weight's size is ever held.

DoRA (Liu et al., arXiv 2402.09353) gives the rows of W + s B A lengths m of their own:

    W' - W = (f - 1) W + f s B A,  f = m / ||W + s B A||_row

where little cancels. In a table that is stored turned over, those rows are columns, whose lengths take a pass over all
of it; the lengths of its own rows, which MLX trains, take none.
"""

from __future__ import annotations

import torch


def add_update(
    rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, start: int, *, transposed: bool = False
) -> torch.Tensor:
    """Adds s * B @ A to rows [start, start + count) of its weight, in place.

    Args:
        rows: float32 (count, columns) of the weight as it is stored.
        a, b: float32 A (r, in) and B (out, r).
        transposed: whether the weight is stored as (in, out).
    """
    stop = start + len(rows)
    left, right = (a.T[start:stop], b.T) if transposed else (b[start:stop], a)
    return rows.addmm_(left, right, alpha=scaling)


def row_lengths(rows: torch.Tensor) -> torch.Tensor:
    """||.|| of every row, float64 (count,)."""
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return lengths


def column_squares(rows: torch.Tensor) -> torch.Tensor:
    """The sum of the squares of every column, float64 (columns,): of all pieces of a weight together, the squares of
    its columns' lengths."""
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64)
    return lengths.square_()


def dora_factors(magnitude: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """f = m / ||.||, float64; 1 where both are 0, as in the row of a padding token."""
    wanted = magnitude.to(torch.float64)
    return torch.where((lengths == 0) & (wanted == 0), 1.0, wanted / lengths)


def dora_rows(rows: torch.Tensor, update: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Rows of W', float32.

    Args:
        rows: of W, float32 (count, columns).
        update: the same of s B A.
        factors: f, float64 (count, 1) for the rows or (1, columns) for the columns.
    """
    return (update * factors.to(torch.float32)).addcmul_(rows, (factors - 1).to(torch.float32)).add_(rows)

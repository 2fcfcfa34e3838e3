"""Norms and inner products of low-rank products B @ A, without forming them.

With B (out, r), A (r, in): <B A, C A>_F = sum((B^T C) * (A A^T)), which costs O((out + in) r^2) instead of
O(out in r). The factors are small, so the sums run in float64 on the CPU, whatever device they come from.
"""

from __future__ import annotations

import math

import torch


def gram(a: torch.Tensor) -> torch.Tensor:
    """A A^T (r, r) in float64 for A (r, in)."""
    wide = a.detach().cpu().to(torch.float64)
    return wide @ wide.T


def inner(b: torch.Tensor, c: torch.Tensor, gram_a: torch.Tensor) -> float:
    """<B A, C A>_F from B and C (out, r) and A's Gram matrix (r, r)."""
    left, right = (factor.detach().cpu().to(torch.float64) for factor in (b, c))
    return float(((left.T @ right) * gram_a).sum())


def norm(b: torch.Tensor, gram_a: torch.Tensor) -> float:
    """||B A||_F from B (out, r) and A's Gram matrix (r, r); not a number when an entry is not finite."""
    square = inner(b, b, gram_a)
    return 0.0 if square < 0 else math.sqrt(square)  # rounding can leave a small negative; max() would hide a NaN


def relative_error(a: torch.Tensor, b: torch.Tensor, a_stored: torch.Tensor, b_stored: torch.Tensor) -> float:
    """||B' A' - B A||_F / ||B A||_F; 0 where B A is 0 and so is B' A', infinite where only B A is.

    Uses B' A' - B A = (B' - B) A' + B (A' - A), so that nothing cancels.
    """
    a, b, a_stored, b_stored = (factor.cpu().to(torch.float64) for factor in (a, b, a_stored, b_stored))
    columns = torch.cat([b_stored - b, b], dim=1)
    rows = torch.cat([a_stored, a_stored - a], dim=0)
    error, size = norm(columns, gram(rows)), norm(b, gram(a))
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size

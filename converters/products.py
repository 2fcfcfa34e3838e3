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

    With D = B' - B and E = A' - A, B' A' - B A = D A' + B E, so that nothing large cancels:

        ||D A' + B E||^2 = <D^T D, A' A'^T> + 2 <D^T B, A' E^T> + <B^T B, E E^T>

    So the products of the factors are exact enough in float32, in a fifth of the time that float64 takes, as long as
    no square leaves its range; only the last sums run in float64.
    """
    a, b, a_stored, b_stored = (factor.detach().cpu().float() for factor in (a, b, a_stored, b_stored))
    a, a_stored = _scaled(a, a_stored)
    b, b_stored = _scaled(b, b_stored)
    d, e = b_stored - b, a_stored - a
    gram_b = b.T @ b
    gram_a, a_e, gram_e = a @ a.T, a @ e.T, e @ e.T
    size = _dot(gram_b, gram_a)
    stored_e = a_e + gram_e  # A' E^T
    error = _dot(d.T @ d, gram_a + a_e.T + stored_e) + 2 * _dot(d.T @ b, stored_e) + _dot(gram_b, gram_e)
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / size) if error > 0 else 0.0 if error <= 0 else error  # rounding; a NaN stays one


def _scaled(exact: torch.Tensor, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both divided by the largest entry where a square could leave float32's range."""
    low, high = exact.aminmax()
    largest = torch.maximum(-low, high)
    return (exact, stored) if largest == 0 or 1e-6 < largest < 1e6 else (exact / largest, stored / largest)


def _dot(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.double() * right.double()).sum())

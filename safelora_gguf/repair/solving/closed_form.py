"""The repaired A of a pair, which keeps its update on some inputs and loses it on others: tensors in, tensors out.

A weight's inputs are the rows of X (n, in). They weigh g (n,) where the update B A is wanted, h (n,) where it is not.
A' (r, in) is the least of

    ||(A' - A) X^T diag(g)^1/2||^2 + ridge ||A' - A||^2 + ||A' X^T diag(h)^1/2||^2

whatever B is. With the mean second moments C_G and C_H of both sets, g = 1 / N_G and h = mu / N_H:

    A' = A (C_G + ridge I) M^-1,    M = C_G + ridge I + mu C_H    (in, in)
    A' = A - U,    U M = mu A C_H
    U = W Z,    W (ridge I + Z Z^T) = A X^T diag(h)^1/2    with Z = diag(g + h)^1/2 X (n, in)

U is the change alone, so that it is exact where it is small. The last line is the same among tokens instead of inputs:
the smaller of both spaces is taken. Its matrix is factored in float32; that solution is refined by residuals that are
computed in float64 from X itself, never from the rounded matrix. Where this does not converge fast, as the matrix is
too ill-conditioned for float32, it is made and factored in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from converters.products import gram, norm
from safelora_gguf.low_rank import gram64
from safelora_gguf.repair.solving.lower_triangles import add_lower_gram, factor_in_place, lower_gram

_TOLERANCE = 1e-5  # of the last correction of each row, relative to the smaller of its change and what is left of it
_NOTHING = 1e-300
_WORST = 1e-3  # the largest relative error of a row that is accepted
_ROUNDS = 8
_SLOW = 0.3  # a round that leaves more than this of the error
_HIDDEN = 10.0  # the error over the last correction, where that is but rounding; a few times, as measured
_MOST_GRAMS = 1 << 30  # bytes that Gram matrices of parts may take
_CACHED = 1 << 19  # entries that are in the processor's cache while they are float64
_MOVED = 1 << 24  # the same on another device, where few large products are faster


@dataclass(frozen=True)
class Moments:
    """Products of the rows of X, whatever their weights. For every weighting they are used anew.

    Attributes:
        x: (n, in) in float32.
        parts: rows come in stretches of these lengths, each of one weight.
        grams: among tokens, where these are not more than inputs, one: X X^T (n, n); else X_p^T X_p (in, in) of every
            part, or none where all these would take too much memory. In float32, their lower triangles alone.
    """

    x: torch.Tensor
    parts: tuple[int, ...]
    grams: tuple[torch.Tensor, ...]

    @property
    def among_tokens(self) -> bool:
        return len(self.x) <= self.x.shape[1]


@dataclass(frozen=True)
class Weighted:
    """Both sets, as some rows make them up.

    Attributes:
        wanted: g of each part of the rows, 1 / N_G; 0 where it is no part of G, or left out.
        unwanted: h / mu of each part, 1 / N_H; 0 likewise. No part has both.
        sums: C_G and C_H, of which the lower triangles alone, in float32; None where `seen` has Gram matrices.
    """

    seen: Moments
    wanted: tuple[float, ...]
    unwanted: tuple[float, ...]
    sums: tuple[torch.Tensor, torch.Tensor] | None


class IllConditionedError(ArithmeticError):
    """There is no solution that can be relied on, even in float64."""


@dataclass(frozen=True)
class Solution:
    """A' (r, in) in float32, and a bound on the relative error of its rows, each relative to the smaller of its change
    and what is left of it."""

    a: torch.Tensor
    error: float


def moments(x: torch.Tensor, parts: Sequence[int]) -> Moments:
    """The Gram matrices of X (n, in) in float32, whose rows come in parts of these lengths.

    They are made on X's device, with the precision that products in float32 have there (TF32 should be off); what
    follows is done there, too, but on the CPU where the device has no float64.
    """
    if len(x) <= x.shape[1]:
        grams = [lower_gram(x)]
    elif len(parts) * x.shape[1] ** 2 * x.element_size() <= _MOST_GRAMS:
        grams = [lower_gram(part.T) for part in torch.split(x, list(parts))]
    else:
        grams = []
    if x.device.type == "mps":
        x, grams = x.cpu(), [one.cpu() for one in grams]
    return Moments(x, tuple(parts), tuple(grams))


def weighted(seen: Moments, wanted: Sequence[float], unwanted: Sequence[float]) -> Weighted:
    """Both sets for one weighting, see `Weighted`. Where there are no Gram matrices of parts, their sums are made."""
    sums = None
    if not seen.grams:
        c_g, c_h = (torch.zeros(seen.x.shape[1], seen.x.shape[1], device=seen.x.device) for _ in range(2))
        for part, g, h in zip(torch.split(seen.x, list(seen.parts)), wanted, unwanted, strict=True):
            for total, weight in ((c_g, g), (c_h, h)):
                if weight:
                    add_lower_gram(total, part.T, weight)
        sums = c_g, c_h
    return Weighted(seen, tuple(wanted), tuple(unwanted), sums)


def repaired_a(a: torch.Tensor, sets: Weighted, mu: float, *, ridge: float) -> Solution:
    """A' for A (r, in) in any type; several A of one input are solved together, one below the other.

    Args:
        mu: weight of C_H.
        ridge: added to the diagonal of C_G, absolute.

    Raises:
        ValueError: a ridge that is not above zero: A' is not determined.
        IllConditionedError: the error would be above 1e-3 of the smaller of a row's change and what is left of it.
        ArithmeticError: inputs, or A, that are not finite.
    """
    if not ridge > 0:
        raise ValueError(f"ridge {ridge}")
    seen, exact = sets.seen, a.to(sets.seen.x.device, torch.float64)
    weights = _Weights.of(sets, mu)
    if not weights.unwanted.any():
        return Solution(exact.float(), 0.0)
    system = (_among_tokens if seen.among_tokens else _among_inputs)(exact, sets, mu, weights, ridge)
    for dtype in (torch.float32, torch.float64):
        solve, bound = system.factored(dtype), math.inf
        if solve is not None:
            u, bound, converged = _refined(system, solve, exact)
            if converged or (dtype == torch.float64 and bound <= _WORST):
                return Solution((exact - u).float(), bound)
    if not (seen.x.isfinite().all() and exact.isfinite().all()):
        raise ArithmeticError("the inputs are not finite")
    told = f"; its error may be {bound:.0e} of what changes or is left" if math.isfinite(bound) else ""
    raise IllConditionedError(f"too ill-conditioned for float64{told}")


def kept(a: torch.Tensor, a_new: torch.Tensor, b: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> float | None:
    """||B A' X^T W||_F / ||B A X^T W||_F from A and A' (r, in), B (out, r), X (n, in) and W^2 the weights (n,) of its
    rows, all on one device but B; None where the denominator is zero."""
    roots = weights.to(x).sqrt()
    before, after = (norm(b, gram((x @ one.to(x.dtype).T).T * roots)) for one in (a, a_new))
    return after / before if before > 0 else None


@dataclass(frozen=True)
class _Weights:
    """g + h by part; diag(g + h)^1/2 and diag(h)^1/2 by row, (n,) in float64."""

    parts: tuple[float, ...]
    roots: torch.Tensor
    unwanted: torch.Tensor

    @classmethod
    def of(cls, sets: Weighted, mu: float) -> _Weights:
        unwanted = [mu * one for one in sets.unwanted]
        total = tuple(g + h for g, h in zip(sets.wanted, unwanted, strict=True))
        lengths = torch.tensor(sets.seen.parts)
        roots, lost = (
            torch.tensor(list(values), dtype=torch.float64).sqrt().repeat_interleave(lengths).to(sets.seen.x.device)
            for values in (total, unwanted)
        )
        return cls(total, roots, lost)


Solve = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _System:
    """V S = Y in one of the spaces, for rows: V and Y (r, n) or (r, in), U (r, in).

    Attributes:
        right: Y in float64.
        image: V -> U, computed in the type of V.
        apply: (V, U) -> V S in float64.
        factored: Y -> Y S^-1, nearly, by a factor in a type; None where S is not positive definite in it.
    """

    right: torch.Tensor
    image: Callable[[torch.Tensor], torch.Tensor]
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    factored: Callable[[torch.dtype], Solve | None]


def _among_tokens(a: torch.Tensor, sets: Weighted, _: float, weights: _Weights, ridge: float) -> _System:
    seen = sets.seen
    x, roots = seen.x, weights.roots
    rows = roots.nonzero()[:, 0]  # those left out are no part of the matrix

    def factored(dtype: torch.dtype) -> Solve | None:
        matrix = seen.grams[0] if dtype == torch.float32 else gram64(x)
        if len(rows) < len(x):
            matrix = matrix.index_select(0, rows).index_select(1, rows)
        scale = roots[rows].to(dtype)
        solve = _cholesky((matrix * scale).mul_(scale[:, None]), ridge)
        return None if solve is None else lambda y: torch.zeros_like(y).index_copy_(1, rows, solve(y[:, rows]))

    return _System(
        right=_rows_times_transposed(a, x) * weights.unwanted,
        image=lambda w: _rows_times(w * roots.to(w.dtype), x),
        apply=lambda w, u: ridge * w + _rows_times_transposed(u, x) * roots,
        factored=factored,
    )


def _among_inputs(a: torch.Tensor, sets: Weighted, mu: float, weights: _Weights, ridge: float) -> _System:
    seen = sets.seen
    x, squares = seen.x, weights.roots.square()

    def factored(dtype: torch.dtype) -> Solve | None:
        if dtype == torch.float32 and sets.sums is not None:
            return _cholesky(torch.add(*sets.sums, alpha=mu), ridge)
        matrix = torch.zeros(x.shape[1], x.shape[1], dtype=dtype, device=x.device)
        for place, weight in enumerate(weights.parts):
            if weight:
                part = torch.split(x, list(seen.parts))[place].T
                matrix.add_(seen.grams[place] if dtype == torch.float32 else gram64(part), alpha=weight)
        return _cholesky(matrix, ridge)

    return _System(
        right=_rows_times(_rows_times_transposed(a, x) * weights.unwanted.square(), x),
        image=lambda u: u,
        apply=lambda u, _: ridge * u + _rows_times(_rows_times_transposed(u, x) * squares, x),
        factored=factored,
    )


def _cholesky(matrix: torch.Tensor, ridge: float) -> Solve | None:
    """Y -> Y (matrix + ridge I)^-1 from the lower triangle, which is overwritten."""
    matrix.diagonal().add_(ridge)
    if matrix.device.type == "cpu" and matrix.dtype == torch.float32:
        factor, failed = matrix, factor_in_place(matrix)
    else:
        factor, info = torch.linalg.cholesky_ex(matrix)
        failed = bool(info)
    if failed or not math.isfinite(float(factor.diagonal().sum())):
        return None
    return lambda y: torch.cholesky_solve(y.T.to(factor.dtype), factor).T.to(y.dtype)


def _refined(system: _System, solve: Solve, a: torch.Tensor) -> tuple[torch.Tensor, float, bool]:
    """U, a bound on the relative error of its rows, and whether it converged fast; the bound is NaN, or above 1, where
    it went nowhere."""
    v = solve(system.right)
    u = system.image(v)
    before = 1.0
    for _ in range(_ROUNDS):
        step = solve(system.right - system.apply(v, u))
        moved = system.image(step.float()).double()  # rounding is relative to the step
        v, u = v + step, u + moved
        sizes = torch.minimum(u.norm(dim=1), (a - u).norm(dim=1)).clamp(min=_NOTHING)
        error = float((moved.norm(dim=1) / sizes).max())
        if error <= _TOLERANCE:
            return u, error, True
        if not error <= _SLOW * before:
            return u, _HIDDEN * error, False
        before = error
    return u, before, False


def _rows_times(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(r, n) times X (n, in), in the precision of the first, converting a few rows of X at a time."""
    if rows.dtype == x.dtype:
        return rows @ x
    result = torch.zeros(len(rows), x.shape[1], dtype=rows.dtype, device=x.device)
    step = _block_rows(x)
    for part, block in zip(torch.split(rows, step, dim=1), torch.split(x, step), strict=True):
        result.addmm_(part, block.to(rows.dtype))
    return result


def _rows_times_transposed(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(r, in) times X^T (in, n), likewise."""
    step = _block_rows(x)
    return torch.cat([rows @ block.to(rows.dtype).T for block in torch.split(x, step)], dim=1)


def _block_rows(x: torch.Tensor) -> int:
    return max(16, (_CACHED if x.device.type == "cpu" else _MOVED) // x.shape[1])

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

_TOLERANCE = 1e-5  # of the last correction of each row, relative to the smaller of its change and what is left of it
_NOTHING = 1e-300
_ROUNDS = 8
_SLOW = 0.3  # a round that leaves more than this of the error
_TILE = 512  # rows and columns of a matrix that are computed at a time
_CACHED = 1 << 19  # entries that are in the processor's cache while they are float64
_MOVED = 1 << 24  # the same on another device, where few large products are faster


@dataclass(frozen=True)
class Moments:
    """Products of the rows of X, whatever their weights. For every weighting they are used anew.

    Attributes:
        x: (n, in) in float32.
        parts: rows come in stretches of these lengths, each of one weight.
        grams: among tokens, where these are not more than inputs, one: X X^T (n, n); else X_p^T X_p (in, in) of every
            part. In float32, their lower triangles alone.
    """

    x: torch.Tensor
    parts: tuple[int, ...]
    grams: tuple[torch.Tensor, ...]

    @property
    def among_tokens(self) -> bool:
        return len(self.x) <= self.x.shape[1]


@dataclass(frozen=True)
class Solution:
    """A' (r, in) in float32, and the largest relative error of a row before the last correction: a bound on what is
    left of it."""

    a: torch.Tensor
    error: float


def moments(x: torch.Tensor, parts: Sequence[int]) -> Moments:
    """The Gram matrices of X (n, in) in float32, whose rows come in parts of these lengths.

    They are made on X's device, with the precision that products in float32 have there (TF32 should be off); what
    follows is done there, too, but on the CPU where the device has no float64.
    """
    among_tokens = len(x) <= x.shape[1]
    grams = [_lower_gram(x)] if among_tokens else [_lower_gram(part.T) for part in torch.split(x, list(parts))]
    if x.device.type == "mps":
        x, grams = x.cpu(), [one.cpu() for one in grams]
    return Moments(x, tuple(parts), tuple(grams))


def repaired_a(
    a: torch.Tensor, seen: Moments, wanted: Sequence[float], unwanted: Sequence[float], *, ridge: float
) -> Solution:
    """A' for A (r, in) in any type; several A of one input are solved together, one below the other.

    Args:
        wanted: g of each part of the rows, 1 / N_G; 0 where it is no part of G, or left out.
        unwanted: h of each part, mu / N_H; 0 likewise. No part has both.
        ridge: added to the diagonal of C_G, absolute.

    Raises:
        ValueError: a ridge that is not above zero: A' is not determined.
        ArithmeticError: inputs that are not finite, or beyond even float64.
    """
    if not ridge > 0:
        raise ValueError(f"ridge {ridge}")
    exact = a.to(seen.x.device, torch.float64)
    if not any(unwanted):
        return Solution(exact.float(), 0.0)
    weights = _Weights.of(seen, wanted, unwanted)
    system = (_among_tokens if seen.among_tokens else _among_inputs)(exact, seen, weights, ridge)
    for dtype in (torch.float32, torch.float64):
        solve = system.factored(dtype)
        found = None if solve is None else _refined(system, solve, exact, last=dtype == torch.float64)
        if found is not None:
            return Solution((exact - found[0]).float(), found[1])
    raise ArithmeticError("the inputs are not finite, or too ill-conditioned for float64")


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
    def of(cls, seen: Moments, wanted: Sequence[float], unwanted: Sequence[float]) -> _Weights:
        total = tuple(g + h for g, h in zip(wanted, unwanted, strict=True))
        lengths = torch.tensor(seen.parts)
        roots, lost = (
            torch.tensor(list(values), dtype=torch.float64).sqrt().repeat_interleave(lengths).to(seen.x.device)
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


def _among_tokens(a: torch.Tensor, seen: Moments, weights: _Weights, ridge: float) -> _System:
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


def _among_inputs(a: torch.Tensor, seen: Moments, weights: _Weights, ridge: float) -> _System:
    x, squares = seen.x, weights.roots.square()

    def factored(dtype: torch.dtype) -> Solve | None:
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
        factor, failed = matrix, _factor_in_place(matrix)
    else:
        factor, info = torch.linalg.cholesky_ex(matrix)
        failed = bool(info)
    if failed or not math.isfinite(float(factor.diagonal().sum())):
        return None
    return lambda y: torch.cholesky_solve(y.T.to(factor.dtype), factor).T.to(y.dtype)


def _factor_in_place(matrix: torch.Tensor) -> bool:
    """Puts the Cholesky factor into the lower triangle, tile by tile, nearly all by `_product`; whether it failed."""
    for start in range(0, len(matrix), _TILE):
        corner, failed = torch.linalg.cholesky_ex(matrix[start : start + _TILE, start : start + _TILE])
        if failed:
            return True
        size, after = len(corner), start + len(corner)
        matrix[start:after, start:after] = corner
        if after == len(matrix):
            break
        inverse = _operand(torch.linalg.solve_triangular(corner, torch.eye(size), upper=False))
        column = torch.split(matrix[after:, start:after], _TILE)
        for tile in column:
            tile.copy_(_product(_operand(tile), inverse))
        operands = [_operand(tile) for tile in column]
        rest = torch.split(matrix[after:, after:], _TILE)
        for place, (rows, operand) in enumerate(zip(rest, operands, strict=True)):
            for tile, other in zip(torch.split(rows, _TILE, dim=1), operands[: place + 1], strict=False):
                tile.sub_(_product(operand, other))
    return False


def _refined(
    system: _System, solve: Solve, a: torch.Tensor, *, last: bool = False
) -> tuple[torch.Tensor, float] | None:
    """U and the largest relative error of a row by the last correction; None where these shrink too slowly for trust.

    Args:
        last: there is nothing better to fall back on, so that rounding's floor is taken for the end.
    """
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
            return u, error
        if not error <= _SLOW * before:
            return (u, error) if last and math.isfinite(error) else None
        before = error
    return (u, error) if last else None


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


def _lower_gram(x: torch.Tensor) -> torch.Tensor:
    """X X^T in float32, at least its lower triangle."""
    if x.device.type != "cpu":
        return x @ x.T
    result = torch.zeros(len(x), len(x))
    operands = [_operand(block) for block in torch.split(x, _TILE)]
    for column, other in enumerate(operands):
        for row in range(column, len(operands)):
            tile = _product(operands[row], other)
            result[row * _TILE :, column * _TILE :][: tile.shape[0], : tile.shape[1]] = tile
    return result


def _operand(x: torch.Tensor) -> torch.Tensor:
    """What `_product` takes. torch leaves products in float32 to MKL, which on AMD's processors takes twice as long as
    oneDNN does; a tensor in oneDNN's own layout is multiplied by that."""
    x = x.contiguous()
    return x.to_mkldnn() if x.numel() and torch.backends.mkldnn.is_available() else x  # type: ignore[no-untyped-call]


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """X Y^T of two operands."""
    product: torch.Tensor = torch.nn.functional.linear(x, y)
    return product.to_dense() if product.is_mkldnn else product

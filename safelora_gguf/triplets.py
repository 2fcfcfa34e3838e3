"""The top singular triplets of a matrix, to a residual that is computed: LoX's rank-k part of V.

Block Golub-Kahan-Lanczos with full reorthogonalisation and thick restarts (Golub and Van Loan, section 10.4; Baglama
and Reichel, SIAM J. Sci. Comput. 27 (2005)). For V (n, m), n <= m, orthonormal L (n, c) and R (m, c) grow by a block
at a time and keep V^T L = R C, so that with C = X S Y^T the triplets are L Y, S and R X; V R X - L Y S then lies in the
next block alone, where its size costs nothing. The products run in float32.

What converges too slowly to pay is started again from the eigenvectors of V V^T in float32, a third of the price of a
full decomposition, and where these are too coarse, decomposed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from safelora_gguf.low_rank import gram64, times

_OVERSAMPLING = 10
_SMALL = 256  # sides up to this are decomposed at once
_LARGE_K = 8  # from this part of the side on, too
_BLOCKS = 10  # per basis; more means fewer restarts and more orthogonalisation
_FLOAT32 = 1e-5  # tolerances that float32 products reach for certain
_LEAST = {torch.float32: 1e-6, torch.float64: 1e-12}  # residuals that products always reach
_DEEP = 1e-3  # singular values under this share of the first are refined in float64
_RANK_FLOOR = 1e-6  # singular values under this share of the first are rounding
_SEPARATED = 1.1  # a singular value this many times the block's last is resolved beyond its residual
_WINDOW = 8  # steps, at most, from which a rate of convergence is taken
_REFINING = 4  # steps from vectors that are nearly right, and the fewest from others
_PATIENCE = 2  # side / (2 b) steps with a block of b cost less than half of a full decomposition
_STRIP = 512  # rows or columns scaled at a time
_TOGETHER = 32  # triplets whose residuals are computed at a time


@dataclass(frozen=True)
class Triplets:
    """The top triplets of V (out, in): U S W^T is its rank-k part.

    Attributes:
        u: left singular vectors (out, k), orthonormal columns in float32; fewer where V has a lower rank.
        singular_values: k values in float64 on the CPU, falling.
        w: right singular vectors (in, k), likewise.
        residual: max_i ||V w_i - s_i u_i|| / s_1 where out <= in, max_i ||V^T u_i - s_i w_i|| / s_1 where V is taller:
            the other one of the two is zero by construction, up to rounding.
        iterations: steps of two products with a block each; 0 where V was decomposed directly.
        r_align: ||U U^T V||_F / ||V||_F = sqrt(sum s_i^2) / ||V||_F.
    """

    u: torch.Tensor
    singular_values: torch.Tensor
    w: torch.Tensor
    residual: float
    iterations: int
    r_align: float


class _Problem(NamedTuple):
    """V (n, m), n <= m, and what is wanted of it; `scale` brings ||V||_F to 1/2 .. 1.

    Blocks are multiplied by it on their way into a product, so that no square leaves float32's range.
    """

    v: torch.Tensor
    k: int
    tolerance: float
    scale: float


class _Found(NamedTuple):
    """Triplets of V or V^T, whichever is wide (n, m): left (n, k), values (k), right (m, k)."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    residual: float
    iterations: int


def leading_triplets(
    v: torch.Tensor, k: int, *, tolerance: float = 1e-3, norm: float | None = None, seed: int = 0
) -> Triplets:
    """The top k singular triplets of V, the singular values to 1e-4 of themselves where they are separated.

    Where s_k and s_(k+1) are close the vectors are any of those that fit; residual and energy hold all the same.

    Args:
        v: (out, in), float32, any device (the result may come on the CPU instead), not all zero. Never copied while
            the iteration lasts.
        k: how many; min(out, in) at most come back.
        tolerance: the residual to reach, in units of s_1.
        norm: ||V||_F where it is known.
        seed: of the starting block; equal inputs give equal results.
    """
    if v.device.type == "mps" and tolerance < _FLOAT32:  # has no float64
        v = v.cpu()
    norm = _frobenius(v) if norm is None else norm
    tall = v.shape[0] > v.shape[1]
    scale = 2.0 ** -_exponent(norm)  # a power of two: exact
    found = _solve(_Problem(v.T if tall else v, k, tolerance, scale), seed)
    u, w = (side.to(torch.float32) for side in (found.left, found.right))
    r_align = min(1.0, float(torch.linalg.vector_norm(found.values)) / norm)
    if tall:
        u, w = w, u
    return Triplets(u, found.values, w, found.residual, found.iterations, r_align)


def _solve(problem: _Problem, seed: int) -> _Found:
    """The cheapest way to the tolerance."""
    side, size = problem.v.shape[0], problem.k + _OVERSAMPLING
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if problem.tolerance >= _FLOAT32 else torch.float64
    found = None
    if side > max(_SMALL, _LARGE_K * problem.k):
        start = torch.randn(side, size, generator=generator).to(problem.v.device, dtype)
        found = _iterate(problem, start, max(_REFINING, side // (_PATIENCE * size)))
    if found is None and side > max(_SMALL, 2 * size):
        found = _iterate(problem, _eigenvectors(problem, size).to(dtype), _REFINING)
        found = None if found is None else found._replace(iterations=0)
    exact = problem._replace(v=problem.v.cpu()) if problem.v.device.type == "mps" else problem
    if found is not None and dtype == torch.float32 and found.values[-1] < _DEEP * found.values[0]:
        rest = torch.randn(side, size - found.left.shape[1], generator=generator, dtype=torch.float64)
        fine = _iterate(exact, torch.cat([found.left.to(rest), rest], dim=1).to(exact.v.device), _REFINING)
        found = None if fine is None else fine._replace(iterations=found.iterations + fine.iterations)
    return _decompose(exact.v, problem.k) if found is None else found


def _iterate(problem: _Problem, start: torch.Tensor, steps: int) -> _Found | None:
    """From a starting block (n, b), in its precision; None where so many steps are too few, as soon as that shows."""
    v, k, tolerance, scale = problem
    size, widest = start.shape[1], min(_BLOCKS * start.shape[1], v.shape[0] // 2)
    fresh = _orthonormal(start, start[:, :0])[0]
    left, right = fresh[:, :0], fresh.new_zeros(v.shape[1], 0)
    core = torch.zeros(0, 0, dtype=torch.float64)
    least = _LEAST[start.dtype]
    history: list[float] = []
    while len(history) < steps:
        image, inside, new = _orthonormal(_product(v.T, fresh * scale), right)
        left, right = torch.cat([left, fresh], dim=1), torch.cat([right, image], dim=1)
        core = torch.cat([torch.nn.functional.pad(core, (0, 0, 0, size)), torch.cat([inside, new])], dim=1)
        fresh, _, coupling = _orthonormal(_product(v, image * scale), left)
        values, from_left, from_right = _ritz(core)
        estimate = torch.linalg.vector_norm(coupling @ from_right[-size:, :k], dim=0) / values[0]
        history.append(float((estimate / _limits(values[:size], k, tolerance, least)).max()))
        if history[-1] <= 1:
            turned = (_turn(left, from_left[:, :size]), values[:size], _turn(right, from_right[:, :size]))
            return _certified(problem, *turned, len(history))
        if _stalls(history, steps):
            return None
        if left.shape[1] + size > widest:
            best, core = torch.linalg.qr(core @ from_left[:, :size])
            left, right = _turn(left, from_left[:, :size]), _turn(right, best)
    return None


def _orthonormal(block: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, C and R of block = known C + Q R, Q orthonormal and orthogonal to `known`; C and R in float64 on the CPU."""
    inside = torch.zeros(known.shape[1], block.shape[1], dtype=torch.float64)
    outside = torch.eye(block.shape[1], dtype=torch.float64)
    for _ in range(2):  # twice is enough (Kahan)
        part = known.T @ block
        block = block - known @ part
        inside += part.cpu().to(torch.float64) @ outside
        q, r = torch.linalg.qr(block.cpu() if block.device.type == "mps" else block)
        block, outside = q.to(block.device), r.cpu().to(torch.float64) @ outside
    return block, inside, outside


def _ritz(core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """S, Y and X of C = X S Y^T; X only where s_i is no rounding. C is known to 1e-7 at best, its square to 1e-16."""
    squares, turn = torch.linalg.eigh(core.T @ core)
    values, turn = squares.flip(0).clamp(min=0).sqrt(), turn.flip(1)
    return values, turn, core @ turn / values.clamp(min=1e-3 * _RANK_FLOOR * float(values[0]))


def _turn(basis: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    return basis @ rotation.to(basis.dtype).to(basis.device)


def _limits(values: torch.Tensor, k: int, tolerance: float, least: float) -> torch.Tensor:
    """The residual each of the k triplets may have, from the singular values (b) of a block.

    s_i is within r_i^2 / (2 gap) of its true value (Kato and Temple), the gap being that to what the block left out;
    so residuals under 1e-2 sqrt(s_i gap) leave no more than 1e-4 s_i, if they are not under what products reach. Values
    that are rounding themselves have no limit.
    """
    shares = values / values[0]
    first, last = shares[:k], float(shares[-1])
    resolved = (1e-2 * (first * (first - last)).clamp(min=0).sqrt()).clamp(min=min(least, tolerance), max=tolerance)
    limits = torch.where(first > _SEPARATED * last, resolved, tolerance)
    return torch.where(first > _RANK_FLOOR, limits, math.inf)


def _stalls(history: list[float], steps: int) -> bool:
    """Whether residuals in units of their limits, one a step, will by their latest rate not come down to 1 in time."""
    window = min(_WINDOW, steps // 2)
    if len(history) <= window:
        return False
    rate = math.log(history[-1 - window] / history[-1]) / window
    return rate * (1.5 * steps - len(history)) < math.log(history[-1])  # a rate still grows on the way


def _certified(
    problem: _Problem, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, iterations: int
) -> _Found | None:
    """The first k of the triplets (b) of V * scale as triplets of V; None with a residual above the tolerance."""
    k = min(problem.k, _rank(values))
    residual = _residual(problem.v, left, values, right, k, scale=problem.scale)
    if residual > problem.tolerance:
        return None
    return _Found(left[:, :k], values[:k] / problem.scale, right[:, :k], residual, iterations)


def _residual(
    v: torch.Tensor, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, k: int, *, scale: float = 1.0
) -> float:
    """max_i ||V w_i - s_i u_i|| / s_1 of V * scale for i up to k, a few triplets at a time.

    The products of all that are given are taken: with six columns they take longer than with sixteen.
    """
    known = left * values.to(left.dtype).to(left.device)
    parts = zip(torch.split(right, _TOGETHER, dim=1), torch.split(known, _TOGETHER, dim=1), strict=True)
    errors = [torch.linalg.vector_norm(_product(v, part * scale) - expected, dim=0) for part, expected in parts]
    return float(torch.cat(errors)[:k].max()) / float(values[0])


def _product(matrix: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """matrix @ block in the block's precision; of a transpose, block^T @ matrix^T transposed is the faster way."""
    if matrix.dtype == block.dtype and matrix.stride(1) != 1:
        return (block.T @ matrix.T).T
    return times(matrix, block)


def _rank(values: torch.Tensor) -> int:
    return int((values > _RANK_FLOOR * values[0]).sum())


def _eigenvectors(problem: _Problem, count: int) -> torch.Tensor:
    """The top eigenvectors (n, count) of V V^T in float32."""
    v = problem.v
    gram = v.new_zeros(v.shape[0], v.shape[0])
    for part in torch.split(v, _STRIP, dim=1):
        scaled = part * problem.scale
        gram.addmm_(scaled, scaled.T)
    vectors: torch.Tensor = torch.linalg.eigh(gram.cpu() if v.device.type == "mps" else gram)[1]
    return vectors[:, -count:].to(v.device)


def _decompose(v: torch.Tensor, k: int) -> _Found:
    """From the eigenvectors U of V V^T (n, n) in float64, which tells singular values down to 1e-6 of the first.

    V^T U = W R has R diagonal but for rounding, and W is orthonormal even where 1e-16 s_1^2 is much of s_i^2.
    """
    squares, vectors = torch.linalg.eigh(gram64(v))
    rank = _rank(squares.flip(0)[:k].clamp(min=0).sqrt())
    left = vectors.flip(1)[:, :rank]
    right, r = torch.linalg.qr(times(v.T, left))
    values, order = r.diagonal().abs().sort(descending=True)
    left, right = left[:, order], (right * r.diagonal().sign())[:, order]
    return _Found(left, values.cpu(), right, _residual(v, left, values, right, rank), 0)


def _frobenius(v: torch.Tensor) -> float:
    """||V||_F, rows in float32 and the rest in float64, scaled first where a square could leave float32's range."""
    norm = _norm_of([torch.linalg.vector_norm(v, dim=1)])
    if 1e-12 < norm < 1e18:
        return norm
    low, high = torch.aminmax(v)
    scale = 2.0 ** -_exponent(max(-float(low), float(high)))
    return _norm_of([torch.linalg.vector_norm(part * scale, dim=1) for part in torch.split(v, _STRIP)]) / scale


def _norm_of(norms: Sequence[torch.Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat(list(norms)).cpu().to(torch.float64)))


def _exponent(size: float) -> int:
    """Of the next power of two, within what float32 can be multiplied by."""
    return min(120, max(-120, math.frexp(size)[1]))

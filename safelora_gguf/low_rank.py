"""The leading singular subspace of a matrix, to a residual that is computed and not hoped for.

Block Krylov iteration with restarts (Golub and Van Loan, section 10.3; Musco and Musco, arXiv 1504.05477):
from a block Q the basis [Q, V V^T Q, (V V^T)^2 Q, ...] is built and orthonormalised, the best k + p directions
within it become the next block. Products run in float32 until the subspace is nearly right, then in float64:
where singular values are close, a direction is only as exact as residual / gap. When the iteration stalls
(a flat spectrum) the eigenvectors of the smaller Gram matrix in float64 settle it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_OVERSAMPLING = 10
_DEPTH = 6  # blocks per basis; deeper means fewer restarts and more orthonormalisation
_SWITCH = 1e-5  # residual below which float32 products no longer help
_SMALL = 256  # sides up to this are decomposed at once
_ROWS = 512  # rows converted to float64 at a time
_RANK_FLOOR = 1e-6  # singular values under this share of the first are rounding


@dataclass(frozen=True)
class LeadingSubspace:
    """The top left singular vectors of V (out, in).

    Attributes:
        u: orthonormal columns (out, k), in float32; fewer than asked for where V has a lower rank.
        singular_values: k values in float64, falling.
        residual: max_i ||V V^T u_i / s_i - s_i u_i|| / s_1.
        iterations: products with V V^T of the block; 0 for a direct decomposition.
    """

    u: torch.Tensor
    singular_values: torch.Tensor
    residual: float
    iterations: int


def leading_subspace(
    v: torch.Tensor, k: int, *, tolerance: float = 1e-6, max_iterations: int = 240, seed: int = 0
) -> LeadingSubspace:
    """The top k left singular vectors of V.

    Args:
        v: (out, in), float32, any device (the result may come on the CPU instead), not all zero.
        k: how many, 1 to min(out, in).
        tolerance: the residual to reach in units of the gap behind k (of 1e-2 where the gap is smaller), so
            that the subspace itself is right to about this angle.
        max_iterations: products with V V^T before the direct decomposition takes over.
        seed: of the starting block; equal inputs give equal results.
    """
    if v.device.type == "mps":  # has no float64
        v = v.cpu()
    if min(v.shape) <= max(_SMALL, 2 * (k + _OVERSAMPLING)):
        return _direct(v, k)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(v.shape[0], k + _OVERSAMPLING, generator=generator).to(v.device)
    dtype, iterations = torch.float32, 0
    while iterations < max_iterations:
        block, values = _krylov_step(v, block.to(dtype))
        iterations += _DEPTH + 1
        rank = min(k, _rank(values))
        residual = _residual(v, block[:, :rank], values[:rank])
        if dtype == torch.float32 and residual < _SWITCH:
            dtype = torch.float64
        elif dtype == torch.float64 and residual <= tolerance * _gap(values, rank):
            return _cut(block, values, rank, residual, iterations)
    return _direct(v, k)


def _krylov_step(v: torch.Tensor, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One restart: the best block.shape[1] directions of the Krylov basis and their singular values."""
    size = block.shape[1]
    basis, images = [torch.linalg.qr(block)[0]], []
    for _ in range(_DEPTH):
        images.append(times(v.T, basis[-1]))
        fresh = times(v, images[-1])
        for _ in range(2):  # twice is enough (Kahan)
            for known in basis:
                fresh = fresh - known @ (known.T @ fresh)
            fresh = torch.linalg.qr(fresh)[0]
        basis.append(fresh)
    images.append(times(v.T, basis[-1]))
    whole, image = torch.cat(basis, dim=1), torch.cat(images, dim=1).to(torch.float64)
    squares, rotation = torch.linalg.eigh(image.T @ image)
    best = rotation.flip(1)[:, :size]
    return whole @ best.to(whole.dtype), squares.flip(0)[:size].clamp(min=0).sqrt()


def _rank(values: torch.Tensor) -> int:
    return int((values > _RANK_FLOOR * values[0]).sum())


def _residual(v: torch.Tensor, u: torch.Tensor, values: torch.Tensor) -> float:
    scale = values.to(u.dtype)
    error = times(v, times(v.T, u)) / scale - u * scale
    return float(torch.linalg.vector_norm(error, dim=0).max() / scale[0])


def _gap(values: torch.Tensor, k: int) -> float:
    """The distance behind the k-th value in units of the first, but no less than the 1e-2 that is resolved."""
    return max(1e-2, float((values[k - 1] - values[k]) / values[0]))


def times(matrix: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """matrix @ block in the block's precision, converting a few rows of the matrix at a time."""
    if matrix.dtype == block.dtype:
        return matrix @ block
    if matrix.stride(0) == 1 and matrix.stride(1) != 1:  # a transpose: sum over its columns instead
        parts = zip(torch.split(matrix, _ROWS, dim=1), torch.split(block, _ROWS), strict=True)
        return torch.stack([part.to(block.dtype) @ rows for part, rows in parts]).sum(dim=0)
    return torch.cat([part.to(block.dtype) @ block for part in torch.split(matrix, _ROWS)])


def _direct(v: torch.Tensor, k: int) -> LeadingSubspace:
    """All singular vectors from the Gram matrix of the smaller side in float64, the top k of them kept."""
    tall = v.shape[0] > v.shape[1]
    gram = gram64(v.T if tall else v)
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp(min=0).sqrt()
    rank = min(k, _rank(values))
    vectors = vectors.flip(1)[:, :rank]
    if tall:
        vectors = torch.linalg.qr(times(v, vectors))[0]
    return _cut(vectors, values, rank, _residual(v, vectors, values[:rank]), 0)


def gram64(matrix: torch.Tensor) -> torch.Tensor:
    """matrix @ matrix^T in float64, converting a few columns at a time."""
    total = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64, device=matrix.device)
    for part in torch.split(matrix, _ROWS, dim=1):
        wide = part.to(torch.float64)
        total.addmm_(wide, wide.T)
    return total


def _cut(u: torch.Tensor, values: torch.Tensor, rank: int, residual: float, iterations: int) -> LeadingSubspace:
    return LeadingSubspace(u[:, :rank].to(torch.float32), values[:rank].cpu(), residual, iterations)

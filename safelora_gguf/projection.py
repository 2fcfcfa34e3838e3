"""Safe LoRA's kernels: tensors in, tensors out.

V = W_aligned - W_base (out, in) is a weight's alignment matrix, dW = B A its LoRA update without the scalar
scaling, B (out, r), A (r, in). An operator P (out, out) replaces B by P B where P dW points away from dW:

    paper      C = V V^T / ||V||_F        Hsu et al., NeurIPS 2024, arXiv 2405.16833; the norm is not squared
    subspace   P_k = U_k U_k^T            U_k the top k left singular vectors of V, a true projector

Neither operator is ever formed, and neither is dW.
"""

from __future__ import annotations

import math

import torch

from converters.products import inner

_BLOCK = 1 << 20  # entries that are squared in float64 at a time


def alignment_matrix(aligned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """V = aligned - base in float32, each upcast before the difference."""
    difference = aligned.to(torch.float32, copy=True)
    return difference.sub_(base)


def frobenius_norm(matrix: torch.Tensor) -> float:
    """||matrix||_F with squares summed in float64 (on devices without it, row by row in float32).

    Not finite exactly when an entry is not finite.
    """
    if matrix.device.type == "mps":
        squares = torch.linalg.vector_norm(matrix, dim=1).to("cpu", torch.float64).square()
        return math.sqrt(float(squares.sum()))
    rows = max(1, _BLOCK // max(1, matrix.shape[1]))
    blocks = [torch.linalg.vector_norm(block, dtype=torch.float64) for block in torch.split(matrix, rows)]
    return float(torch.linalg.vector_norm(torch.stack(blocks)))


def paper_operator(v: torch.Tensor, b: torch.Tensor, v_norm: float) -> torch.Tensor:
    """C B = V (V^T B) / ||V||_F for V (out, in), B (out, r) in float32; `v_norm` is ||V||_F > 0."""
    return v @ ((v.T @ b) / v_norm)


def subspace_operator(u: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """P_k B = U (U^T B) for orthonormal columns U (out, k) and B (out, r)."""
    return u @ (u.T @ b)


def cosine(b: torch.Tensor, projected: torch.Tensor, gram_a: torch.Tensor) -> float | None:
    """cos(P dW, dW) in Frobenius geometry, from B and P B (out, r) and A A^T (r, r).

    With M = P B and G = A A^T this is sum((M^T B) * G) / sqrt(sum((M^T M) * G) * sum((B^T B) * G)).
    None when dW is zero and there is no angle; 0 when only P dW is zero: nothing of dW points to the alignment.
    """
    size = inner(b, b, gram_a)
    size_projected = inner(projected, projected, gram_a)
    if size <= 0:
        return None
    if size_projected <= 0:
        return 0.0
    return inner(projected, b, gram_a) / math.sqrt(size) / math.sqrt(size_projected)


def blend(b: torch.Tensor, projected: torch.Tensor, strength: float) -> torch.Tensor:
    """(1 - S) B + S P B; S = 1 gives P B itself, bit for bit."""
    return projected if strength == 1 else torch.lerp(b, projected, strength)

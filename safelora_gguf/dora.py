"""DoRA adapters as plain pairs, as near as a rank allows.

DoRA (Liu et al., arXiv 2402.09353) gives every row of an adapted weight W (out, in) a length m of its own:

    W' = m / ||W + s B A||_row * (W + s B A)

so that W' - W is of full rank, and no LoRA. Its best approximation of rank k is the truncated singular value
decomposition, U_k (U_k^T (W' - W)).
"""

from __future__ import annotations

import torch

from safelora_gguf.low_rank import leading_subspace, subspace_within


def dora_delta(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """W' - W (out, in) in float32 for W (out, in), A (r, in), B (out, r) and m (out,)."""
    w = weight.to(torch.float32)
    directed = torch.addmm(w, b.to(torch.float32), a.to(torch.float32), alpha=scaling)
    lengths = torch.linalg.vector_norm(directed, dim=1, dtype=torch.float64)
    factors = (magnitude.to(torch.float64) / lengths).to(torch.float32)
    return directed.mul_(factors[:, None]).sub_(w)


def nearest_pair(
    delta: torch.Tensor, rank: int | None, error: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (k, in) and B (out, k) in float32 whose product is the best approximation of delta (out, in), not all zero.

    Args:
        rank: k; None is the smallest that keeps the relative error under `error`.

    Returns:
        A, B and ||B A - delta||_F / ||delta||_F.
    """
    found = subspace_within(delta, error) if rank is None else leading_subspace(delta, rank)
    u = found.u.to(delta.device)
    a = u.T @ delta
    left = delta - u @ a
    return a, u, float(torch.linalg.vector_norm(left) / torch.linalg.vector_norm(delta))

"""Rounding noise of quantized references: how much of V it can be, and which of V's directions stand above it.

V = W_aligned - W_base (out, in) of two references whose entries are off by independent rounding errors of known
variances s_ij^2 (the sum over both references, zero for an exact one):

    energy  N^2 = sum_ij s_ij^2                                    expected ||noise||_F^2
    SNR     max(0, ||V||_F^2 / N^2 - 1)
    edge    sqrt(max_i sum_j s_ij^2) + sqrt(max_j sum_i s_ij^2)    bounds the noise's largest singular value

The edge is the leading term of Bandeira and van Handel (arXiv 1408.6185). Where both references round to
the same code their errors cancel, so N^2 and the edge are upper estimates.
"""

from __future__ import annotations

import math

import torch

# Real rounding of normal, row-scaled and outlier-row weights stays under 0.97 of the bare edge; uniform weights in Q4_0
# reach 1.07, since their variances are understated. Errors that are not independent pass it all the same: in Q4_1, Q5_1
# and Q2_K next to entries 30 times larger (1.5 times the bare edge), in TQ and Q1_0 against float weights with strong
# directions (2.5 times).
_MARGIN = 1.1


class NoiseSums:
    """Row and column sums of the variances of V's entries, gathered block of rows by block of rows.

    Args:
        rows, columns: V's shape.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._rows = torch.zeros(rows, dtype=torch.float64)
        self._columns = torch.zeros(columns, dtype=torch.float64)

    def add(self, variances: torch.Tensor, run: int, start: int = 0) -> None:
        """Adds one reference's variances of the rows from `start` on.

        Args:
            variances: float32 (rows of the block, columns // run), on the CPU.
            run: how many neighbouring columns each stands for.
        """
        wide = variances.to(torch.float64)
        self._rows[start : start + len(wide)] += run * wide.sum(dim=1)
        self._columns += wide.sum(dim=0).repeat_interleave(run)

    @property
    def energy(self) -> float:
        """N^2, in squared units of the weights; 0 when nothing was added: exact references."""
        return float(self._rows.sum())

    @property
    def edge(self) -> float:
        """What the largest singular value of the noise stays under, with a margin of a tenth; 0 when exact."""
        return _MARGIN * (math.sqrt(float(self._rows.max())) + math.sqrt(float(self._columns.max())))


def snr(v_norm: float, energy: float) -> float | None:
    """max(0, ||V||_F^2 / N^2 - 1); None when N^2 is 0 and V exact."""
    return max(0.0, v_norm**2 / energy - 1) if energy else None


def directions_above(singular_values: torch.Tensor, edge: float) -> int:
    """How many singular values (k) stand above the edge and are signal."""
    return int((singular_values > edge).sum())

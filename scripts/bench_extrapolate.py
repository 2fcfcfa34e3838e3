"""The rank-k part of one difference: `safelora_gguf.triplets.leading_triplets` against torch's full SVD.

Matrices of an alignment's kind: Gaussian noise of deviation 5e-4, whose largest singular value is near
5e-4 (sqrt(out) + sqrt(in)), and eight random orthonormal directions of 10 down to 2 times that. Without the directions
it is a flat spectrum, iteration's worst case. Both methods take turns in one process, from the same V to U, S and W,
after a first run of each that is not timed and whose results are compared. ||V||_F is known beforehand, as it is in
`extrapolate`, which measures it while it reads.

Whole pairs of models, each run in a process of its own, belong beside this module.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bench_agreement import DisagreementError
from bench_outcome import timed

from safelora_gguf.triplets import Triplets, leading_triplets

HEAD = ("V", "shape", "full SVD s", "leading_triplets s", "faster by", "iterations", "residual", "error of the part")

_DEVIATION = 5e-4
_DIRECTIONS = 8
_STRONGEST, _WEAKEST = 10.0, 2.0  # in units of the noise's largest singular value


@dataclass(frozen=True)
class Case:
    """One matrix; `full_runs` is how often the full SVD runs at most, where one takes long."""

    shape: tuple[int, int]
    directions: int
    full_runs: int

    @property
    def title(self) -> str:
        return f"{self.directions} directions over noise" if self.directions else "noise alone"

    def matrix(self) -> torch.Tensor:
        """V (out, in), float32."""
        generator = torch.Generator().manual_seed(1)
        v = torch.randn(self.shape, generator=generator).mul_(_DEVIATION)
        if self.directions:
            bases = [torch.randn(side, self.directions, generator=generator) for side in self.shape]
            left, right = (torch.linalg.qr(basis)[0] for basis in bases)
            edge = _DEVIATION * sum(side**0.5 for side in self.shape)
            v.addmm_(left * (edge * torch.linspace(_STRONGEST, _WEAKEST, self.directions)), right.T)
        return v


CASES = (
    Case((2048, 2048), _DIRECTIONS, 100),
    Case((5632, 2048), _DIRECTIONS, 100),
    Case((4096, 4096), _DIRECTIONS, 2),
    Case((2048, 2048), 0, 100),
)


@dataclass(frozen=True)
class Timings:
    """Seconds of all runs on one matrix.

    Attributes:
        error: ||ours - exact||_F / ||exact||_F of the rank-k part U S W^T; None where noise alone leaves it undefined.
    """

    case: Case
    full: Sequence[float]
    ours: Sequence[float]
    residual: float
    iterations: int
    error: float | None

    @property
    def factor(self) -> float:
        return statistics.median(self.full) / statistics.median(self.ours)

    def row(self) -> tuple[str, ...]:
        """As under `HEAD`: medians, and in brackets the smallest and the largest."""
        shape = f"{self.case.shape[0]} x {self.case.shape[1]}"
        error = "" if self.error is None else f"{self.error:.1e}"
        ends = (f"{self.factor:.0f} times", str(self.iterations), f"{self.residual:.1e}", error)
        return (self.case.title, shape, _seconds(self.full, 2), _seconds(self.ours, 3), *ends)

    def to_json(self) -> dict[str, object]:
        found = {"residual": self.residual, "iterations": self.iterations, "error": self.error}
        times = {"full_svd_s": self.full, "ours_s": self.ours, "faster_by": self.factor}
        return {"v": self.case.title, "shape": self.case.shape, **times, **found}


def measure(case: Case, rank: int, tolerance: float, runs: int, say: Callable[[str], None]) -> Timings:
    """`runs` rounds of both methods on one matrix, in turns.

    Raises:
        DisagreementError: the residual, the energy or, where it is defined, the rank-k part is off by more than the
            tolerance; or a singular value by more than 1e-4.
    """
    say(f"{case.title}, {case.shape[0]} x {case.shape[1]}")
    v = case.matrix()
    norm = float(torch.linalg.vector_norm(v, dtype=torch.float64))

    def work() -> Triplets:
        return leading_triplets(v, rank, tolerance=tolerance, norm=norm)

    found = work()
    error = _check(case, found, _full(v), tolerance)
    full, ours = [], []
    for turn in range(runs):
        if turn < case.full_runs:
            full.append(timed(lambda: _full(v)))
            say(f"run {turn + 1} of {runs}: full SVD {full[-1]:.2f} s")
        ours.append(timed(work))
        say(f"run {turn + 1} of {runs}: ours {ours[-1]:.3f} s")
    return Timings(case, full, ours, found.residual, found.iterations, error)


def subject(rank: int, tolerance: float, runs: int, threads: int) -> str:
    few = [f"{case.shape[0]} x {case.shape[1]}" for case in CASES if case.full_runs < runs]
    but = f"; the full SVD of {', '.join(few)} fewer times" if few else ""
    return (
        f"extrapolate, one difference: rank {rank}, tolerance {tolerance:g}, {threads} threads; "
        f"medians of {runs} runs each (min to max){but}"
    )


def _full(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, wt = torch.linalg.svd(v, full_matrices=False)
    return u, s, wt


def _check(
    case: Case, found: Triplets, full: tuple[torch.Tensor, torch.Tensor, torch.Tensor], tolerance: float
) -> float | None:
    u, s, wt = full
    rank = len(found.singular_values)
    exact = s[:rank].double()
    if found.residual > tolerance:
        raise DisagreementError(f"{case.title}: a residual of {found.residual:.1e}, above {tolerance:g}")
    worst = float(((found.singular_values - exact).abs() / exact).max())
    if worst > 1e-4:
        raise DisagreementError(f"{case.title}: a singular value differs from the full SVD's by {worst:.1e}")
    if not case.directions:
        return None
    part = (u[:, :rank] * s[:rank]) @ wt[:rank]
    ours = (found.u * found.singular_values.float()) @ found.w.T
    error = float((ours - part).norm() / part.norm())
    if error > tolerance:
        raise DisagreementError(f"{case.title}: the rank-{rank} part differs from the full SVD's by {error:.1e}")
    return error


def _seconds(seconds: Sequence[float], digits: int) -> str:
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

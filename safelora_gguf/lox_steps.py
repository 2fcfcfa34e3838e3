"""LoX's arithmetic on a pair of models: what is added to each matrix, computed when it is asked for.

V = W_aligned - W_base = U S W^T        W_lox = W_aligned + coef * U_k S_k W_k^T
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from converters.errors import UnsupportedError
from converters.models import Model
from safelora_gguf.alignment import Difference, Differences
from safelora_gguf.lox import identical
from safelora_gguf.noise import directions_above
from safelora_gguf.pairing import Triple
from safelora_gguf.references import FINER
from safelora_gguf.triplets import leading_triplets

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the matrix that comes next."""


@dataclass(frozen=True)
class Step:
    """What extrapolating does to one matrix.

    Attributes:
        singular_values: of the directions that were used, falling.
        residual: see `leading_triplets`; None where nothing was decomposed.
        iterations: likewise.
        r_align: ||U_k U_k^T V||_F / ||V||_F.
        alignment_norm: ||V||_F.
        snr, edge: see `Difference`.
        a, b: the addition coef * U S W^T as B @ A, with A (k, in) and B (out, k) in float32 on the CPU; None for a
            matrix that stays as it is.
    """

    alignment_norm: float
    singular_values: tuple[float, ...] = ()
    residual: float | None = None
    iterations: int | None = None
    r_align: float | None = None
    snr: float | None = None
    edge: float = 0.0
    note: str | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None


@dataclass(frozen=True)
class Extrapolator:
    """Computes the steps of one run, a matrix at a time.

    Attributes:
        rank: k; 0 for all of V.
        tolerance: of the residual, in units of the largest singular value.
        allow_noise: use quantized references whatever their noise.
    """

    base: Model
    aligned: Model
    differences: Differences
    rank: int
    coef: float
    tolerance: float
    allow_noise: bool

    def step(self, triple: Triple) -> Step:
        """What is added to one matrix.

        Raises:
            FormatError: NaN or Inf in a weight.
        """
        found = self.differences.of(triple)
        if not math.isfinite(found.norm):
            raise self.differences.non_finite(triple)
        if found.norm == 0:
            return Step(0.0, snr=found.snr, edge=found.edge, note="base and aligned hold the same weight: left alone")
        return self._decomposed(found)

    def is_rounded(self, triple: Triple) -> bool:
        """Whether the aligned model's weight is quantized."""
        return self.aligned.rounding(triple.aligned_tensor, 0, 1) is not None

    def whole_step(self, triple: Triple, norm: float) -> Step:
        """What rank 0 has done to a matrix whose ||V||_F is `norm`.

        Raises:
            FormatError: it is not finite. UnsupportedError: V is mostly rounding noise.
        """
        if not math.isfinite(norm):
            raise self.differences.non_finite(triple)
        ratio, edge = self.differences.noise_of(triple, norm)
        if ratio is not None and ratio < 1 and norm and not self.allow_noise:
            raise UnsupportedError(
                f"minus the base {self.base.path} is mostly rounding noise (signal to noise {ratio:.2g}), and rank 0 "
                f"would add all of it. {FINER}, give a --rank, or go on with --allow-noisy-reference",
                file=self.aligned.path,
                tensor=self.aligned.stored_name(triple.aligned_tensor),
            )
        return Step(norm, r_align=1.0 if norm else None, snr=ratio, edge=edge)

    def _decomposed(self, found: Difference) -> Step:
        rank = min(self.rank, *found.v.shape)
        triplets = leading_triplets(found.v, rank, tolerance=self.tolerance, norm=found.norm)
        every, above = len(triplets.singular_values), directions_above(triplets.singular_values, found.edge)
        kept = every if self.allow_noise else above
        values = triplets.singular_values[:kept]
        note = None
        if above < every:
            used = "all are used" if self.allow_noise else "are used"
            note = f"{above} of {every} directions stand above the references' rounding noise and {used}"
        root = values.sqrt().to(torch.float32).to(triplets.u.device)
        return Step(
            alignment_norm=found.norm,
            singular_values=tuple(values.tolist()),
            residual=triplets.residual,
            iterations=triplets.iterations,
            r_align=min(1.0, float(values.square().sum().sqrt()) / found.norm) if kept else None,
            snr=found.snr,
            edge=found.edge,
            note=note,
            a=(triplets.w[:, :kept] * root).T.contiguous().cpu() if kept else None,
            b=(triplets.u[:, :kept] * root * self.coef).cpu() if kept else None,
        )


class Steps:
    """The steps of a run, computed when they are asked for; what they found is kept, what they add is not.

    Attributes:
        found: by module, without a and b.
        whole: whether all of V is added (rank 0), which needs no decomposition: see `add_all`.
    """

    def __init__(self, extrapolator: Extrapolator, triples: Sequence[Triple], progress: Progress | None) -> None:
        self._extrapolator, self._progress = extrapolator, progress
        self._sizes = {triple.pair.module: extrapolator.differences.nbytes(triple) for triple in triples}
        self._total = sum(self._sizes.values())
        self.whole = extrapolator.rank == 0
        self._done = 0
        self._seen: dict[str, tuple[int, float]] = {}  # of matrices that are under way, rows and ||V||^2 so far
        self._kept: dict[str, Step] = {}
        self.found: dict[str, Step] = {}

    def that_add(self, triples: Sequence[Triple]) -> list[Triple]:
        """The matrices to which something is added. Rounding quantized ones again would lose some of them for nothing,
        so that their steps are computed now and kept until they are asked for; the others are all taken to change.

        Raises: see `of`.
        """
        adding = []
        for triple in triples:
            if self._extrapolator.is_rounded(triple) and not self.whole:
                step = self.of(triple)
                if step.a is None:
                    continue
                self._kept[triple.pair.module] = step
            adding.append(triple)
        return adding

    def of(self, triple: Triple) -> Step:
        """Computes a step. With the last one it is known whether there was anything to extrapolate.

        Raises:
            FormatError: NaN or Inf in a weight. MismatchError, UnsupportedError: see `check_steps`.
        """
        module = triple.pair.module
        if module in self._kept:
            return self._kept.pop(module)
        if self._progress:
            self._progress(self._done, self._total, module)
        step = self._extrapolator.step(triple)
        self._record(module, step)
        return step

    def add_all(self, triple: Triple, rows: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Rank 0 for the next rows of a matrix: adds coef (rows - base) to `rows` in place, in float32.

        Raises: see `of`; also UnsupportedError where V is mostly rounding noise, all of which would be added.
        """
        module = triple.pair.module
        if self._progress:
            self._progress(self._done, self._total, module)
        v = rows - base
        seen, energy = self._seen.pop(module, (0, 0.0))
        seen, energy = seen + len(rows), energy + float(torch.linalg.vector_norm(v, dtype=torch.float64)) ** 2
        if seen < triple.pair.shape[0]:
            self._seen[module] = seen, energy
        else:
            self._record(module, self._extrapolator.whole_step(triple, math.sqrt(energy)))
        return rows.add_(v, alpha=self._extrapolator.coef)

    def _record(self, module: str, step: Step) -> None:
        self._done += self._sizes[module] if module not in self.found else 0
        self.found[module] = replace(step, a=None, b=None)
        if len(self.found) == len(self._sizes):
            models = self._extrapolator.base, self._extrapolator.aligned
            check_steps(*models, list(self.found.values()))


def check_steps(base: Model, aligned: Model, steps: Sequence[Step]) -> None:
    """That the difference of two references was more than nothing, and more than rounding.

    Raises:
        MismatchError: they hold the same weights. UnsupportedError: what differs is rounding noise.
    """
    if all(step.alignment_norm == 0 for step in steps):
        raise identical(base, aligned)
    if all(step.r_align is None for step in steps):
        raise UnsupportedError(
            f"minus the base {base.path} is nothing but rounding noise: no singular direction stands above it in any "
            f"matrix. {FINER}, or go on at your own risk with --allow-noisy-reference",
            file=aligned.path,
        )

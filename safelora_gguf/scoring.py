"""Scores every module of an adapter against its references, one weight in memory at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from converters.adapters.lora import LoraAdapter
from converters.errors import FormatError
from converters.models import Model
from converters.products import gram, norm
from safelora_gguf.alignment import Difference, Differences
from safelora_gguf.low_rank import leading_subspace
from safelora_gguf.noise import directions_above
from safelora_gguf.pairing import Triple
from safelora_gguf.projection import cosine, paper_operator, subspace_operator

logger = logging.getLogger(__name__)

Operator = Literal["paper", "subspace"]
Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and the module that comes next."""


@dataclass(frozen=True)
class Score:
    """What one module's weights say.

    Attributes:
        cosine: cos(P dW, dW); None where there is no angle, and `note` says why.
        alignment_norm: ||V||_F.
        delta_norm: ||B A||_F, the module's scaling left out.
        projected_b: P B (out, r) in float32 on the CPU.
        gram_a: A A^T (r, r) in float64.
        snr: signal to noise of V; None where both references are exact.
        edge: singular values of V up to this are noise.
        directions: how many singular directions of V the subspace operator uses; None for the paper's.
    """

    cosine: float | None
    alignment_norm: float
    delta_norm: float
    projected_b: torch.Tensor | None
    gram_a: torch.Tensor
    snr: float | None = None
    edge: float = 0.0
    directions: int | None = None
    note: str | None = None


def norm_of(b: torch.Tensor, score: Score) -> float:
    """||B A||_F for another B (out, r) of the scored module."""
    return norm(b, score.gram_a)


@dataclass(frozen=True)
class Scorer:
    """Scores modules on the untouched adapter.

    Attributes:
        k: rank of the subspace operator.
        device: where weights are subtracted and multiplied.
    """

    base: Model
    aligned: Model
    adapter: LoraAdapter
    operator: Operator
    k: int
    device: torch.device

    def score_all(self, triples: Sequence[Triple], progress: Progress | None) -> dict[str, Score]:
        """Scores by module.

        Raises:
            FormatError: NaN or Inf in a weight or a pair.
            UnsupportedError: a weight in a type that can't be read.
        """
        differences = Differences(self.base, self.aligned, triples, self.device)
        sizes = [differences.nbytes(triple) for triple in triples]
        scores: dict[str, Score] = {}
        done = 0
        for place, triple in enumerate(triples):
            if progress:
                progress(done, sum(sizes), triple.pair.module)
            if place + 1 < len(triples):  # the disk reads the next weights while this one is multiplied
                differences.prefetch(triples[place + 1])
            score = scores[triple.pair.module] = self._score(triple, differences)
            logger.debug("%s: cosine %s, |V| %.4g", triple.pair.module, score.cosine, score.alignment_norm)
            done += sizes[place]
        if progress:
            progress(done, done, "")
        return scores

    def _score(self, triple: Triple, differences: Differences) -> Score:
        a, b = self.adapter.load(triple.pair.module)
        gram_a = gram(a)
        delta_norm = norm(b, gram_a)
        self._check_pair(delta_norm, a, triple)
        found = differences.of(triple)
        if not math.isfinite(found.norm):
            raise differences.non_finite(triple)

        blank = Score(None, found.norm, delta_norm, None, gram_a, found.snr, found.edge)
        if found.norm == 0:
            return replace(blank, note="base and aligned hold the same weight here: left alone")
        if delta_norm == 0:
            return replace(blank, note="its update is zero: left alone")
        b = b.to(self.device, torch.float32)
        projected, directions = self._project(found, b)
        if projected is None:
            note = "no direction of V stands above the references' rounding noise: left alone"
            return replace(blank, directions=0, note=note)
        angle = cosine(b, projected, gram_a)
        return replace(blank, cosine=angle, projected_b=projected.cpu(), directions=directions)

    def _project(self, found: Difference, b: torch.Tensor) -> tuple[torch.Tensor | None, int | None]:
        """P B, and the number of directions behind it; None where no direction is more than noise."""
        if self.operator == "paper":
            return paper_operator(found.v, b, found.norm), None
        leading = leading_subspace(found.v, self.k)
        directions = directions_above(leading.singular_values, found.edge)
        if directions == 0:
            return None, 0
        return subspace_operator(leading.u[:, :directions].to(b.device), b), directions

    def _check_pair(self, delta_norm: float, a: torch.Tensor, triple: Triple) -> None:
        if math.isfinite(delta_norm):
            return
        tensor = triple.pair.tensors[int(bool(torch.isfinite(a).all()))]
        raise FormatError("holds NaN or Inf: the adapter is broken", file=self.adapter.tensor_file, tensor=tensor)

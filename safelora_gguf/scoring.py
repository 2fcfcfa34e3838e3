"""Scores every module of an adapter against its references, one weight in memory at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from converters.adapters.lora import LoraAdapter
from converters.checkpoint import Checkpoint
from converters.errors import FormatError
from converters.products import gram, norm
from safelora_gguf.low_rank import leading_subspace
from safelora_gguf.pairing import Triple
from safelora_gguf.projection import (
    alignment_matrix,
    cosine,
    paper_operator,
    subspace_operator,
)

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
    """

    cosine: float | None
    alignment_norm: float
    delta_norm: float
    projected_b: torch.Tensor | None
    gram_a: torch.Tensor
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

    base: Checkpoint
    aligned: Checkpoint
    adapter: LoraAdapter
    operator: Operator
    k: int
    device: torch.device

    def score_all(self, triples: Sequence[Triple], progress: Progress | None) -> dict[str, Score]:
        """Scores by module.

        Raises:
            FormatError: NaN or Inf in a weight or a pair.
            UnsupportedError: a weight in a type that isn't a float.
        """
        sizes = [self._nbytes(triple) for triple in triples]
        largest = max(prod(triple.pair.shape) for triple in triples)
        buffer = torch.empty(largest, dtype=torch.float32, device=self.device)
        scores = {}
        for place, triple in enumerate(triples):
            if progress:
                progress(sum(sizes[:place]), sum(sizes), triple.pair.module)
            if place + 1 < len(triples):  # the disk reads the next weights while this one is multiplied
                self._prefetch(triples[place + 1])
            score = scores[triple.pair.module] = self._score(triple, buffer)
            logger.debug("%s: cosine %s, |V| %.4g", triple.pair.module, score.cosine, score.alignment_norm)
        if progress:
            progress(sum(sizes), sum(sizes), "")
        return scores

    def _score(self, triple: Triple, buffer: torch.Tensor) -> Score:
        a, b = self.adapter.load(triple.pair.module)
        gram_a = gram(a)
        delta_norm = norm(b, gram_a)
        self._check_pair(delta_norm, a, triple)
        v, v_norm = self._alignment_matrix(triple, buffer)
        if not math.isfinite(v_norm):
            raise self._non_finite(triple)
        if v_norm == 0:
            note = "base and aligned hold the same weight here: left alone"
            return Score(None, 0.0, delta_norm, None, gram_a, note)
        if delta_norm == 0:
            return Score(None, v_norm, 0.0, None, gram_a, "its update is zero: left alone")
        b = b.to(self.device, torch.float32)
        projected = self._project(v, b, v_norm)
        return Score(cosine(b, projected, gram_a), v_norm, delta_norm, projected.cpu(), gram_a)

    def _project(self, v: torch.Tensor, b: torch.Tensor, v_norm: float) -> torch.Tensor:
        if self.operator == "paper":
            return paper_operator(v, b, v_norm)
        return subspace_operator(leading_subspace(v, self.k).u.to(b.device), b)

    def _alignment_matrix(self, triple: Triple, buffer: torch.Tensor) -> tuple[torch.Tensor, float]:
        """V (out, in) of a weight and its norm; of an embedding table its transpose, the map its pair adds to."""
        base = self.base.load(triple.base_tensor).to(self.device)
        aligned = self.aligned.load(triple.aligned_tensor).to(self.device)
        v, v_norm = alignment_matrix(aligned, base, buffer)
        return (v.T if triple.pair.embedding else v), v_norm

    def _nbytes(self, triple: Triple) -> int:
        return self.base.infos[triple.base_tensor].nbytes + self.aligned.infos[triple.aligned_tensor].nbytes

    def _prefetch(self, triple: Triple) -> None:
        self.base.prefetch(triple.base_tensor)
        self.aligned.prefetch(triple.aligned_tensor)

    def _check_pair(self, delta_norm: float, a: torch.Tensor, triple: Triple) -> None:
        if math.isfinite(delta_norm):
            return
        tensor = triple.pair.tensors[int(bool(torch.isfinite(a).all()))]
        raise FormatError("holds NaN or Inf: the adapter is broken", file=self.adapter.tensor_file, tensor=tensor)

    def _non_finite(self, triple: Triple) -> FormatError:
        for model, name in ((self.base, triple.base_tensor), (self.aligned, triple.aligned_tensor)):
            if not bool(torch.isfinite(model.load(name)).all()):
                return FormatError("holds NaN or Inf: the model is broken", file=model.file_of(name), tensor=name)
        message = "minus the base's weight overflows float32"
        return FormatError(message, file=self.aligned.path, tensor=triple.aligned_tensor)

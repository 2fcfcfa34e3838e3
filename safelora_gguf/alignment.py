"""V = aligned - base of one weight after another, with what is known of the noise in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

from converters.errors import FormatError, UnsupportedError
from converters.models import Model
from safelora_gguf.noise import NoiseSums, snr
from safelora_gguf.pairing import Triple
from safelora_gguf.projection import alignment_matrix

_BLOCK = 1 << 20  # entries whose rounding is looked at in one go


@dataclass(frozen=True)
class Difference:
    """A weight's alignment matrix.

    Attributes:
        v: V (out, in); of an embedding table its transpose, the map that its pair adds to. Good until the next
            one is asked for.
        norm: ||V||_F.
        snr: signal to noise, max(0, ||V||^2 / N^2 - 1); None where both references are exact.
        edge: singular values of V up to this are noise; 0 where both references are exact.
    """

    v: torch.Tensor
    norm: float
    snr: float | None
    edge: float


class Differences:
    """Reads the two references side by side, one weight in memory at a time.

    Args:
        triples: all that will be asked for.
        device: where V is wanted.

    Raises:
        UnsupportedError: the largest weight does not fit into memory.
    """

    def __init__(self, base: Model, aligned: Model, triples: Sequence[Triple], device: torch.device) -> None:
        self._base, self._aligned = base, aligned
        largest = max(prod(triple.pair.shape) for triple in triples)
        try:
            self._buffer = torch.empty(largest, dtype=torch.float32, device=device)
        except RuntimeError:  # torch's word for "not enough memory"
            found = f"the largest adapted weight needs {4 * largest:,} bytes of memory on {device}, which are not there"
            raise UnsupportedError(found, file=aligned.path) from None

    def of(self, triple: Triple) -> Difference:
        """Raises UnsupportedError for a weight in a type that can't be read."""
        aligned = partial(_rows, self._aligned, triple.aligned_tensor, triple.first_row)
        base = partial(_rows, self._base, triple.base_tensor, triple.first_row)
        v, norm = alignment_matrix(aligned, base, triple.pair.shape, self._buffer)
        ratio, edge = self.noise_of(triple, norm)
        return Difference(v.T if triple.pair.embedding else v, norm, ratio, edge)

    def noise_of(self, triple: Triple, norm: float) -> tuple[float | None, float]:
        """Signal to noise of a V of this norm, and the noise's edge; see `Difference`."""
        noise = self._noise(triple)
        return snr(norm, noise.energy), noise.edge

    def non_finite(self, triple: Triple) -> FormatError:
        """Why the norm of a weight's V is not finite."""
        for model, name in ((self._base, triple.base_tensor), (self._aligned, triple.aligned_tensor)):
            rows = model.rows(name, triple.first_row, triple.first_row + triple.pair.shape[0])
            if not bool(torch.isfinite(rows).all()):
                told = "holds NaN or Inf: the model is broken"
                return FormatError(told, file=model.file_of(name), tensor=model.stored_name(name))
        told = "minus the base's weight overflows float32"
        return FormatError(told, file=self._aligned.path, tensor=self._aligned.stored_name(triple.aligned_tensor))

    def nbytes(self, triple: Triple) -> int:
        """What is read for a weight, or for one expert of a stack, in stored bytes."""
        found = 0
        for model, tensor in ((self._base, triple.base_tensor), (self._aligned, triple.aligned_tensor)):
            info = model.infos[tensor]
            found += info.nbytes * prod(triple.pair.shape) // max(1, info.elements)
        return found

    def prefetch(self, triple: Triple) -> None:
        """Asks the system to read a weight's pages soon; a stack's all at once, with its first expert."""
        if triple.pair.expert:
            return
        self._base.prefetch(triple.base_tensor)
        self._aligned.prefetch(triple.aligned_tensor)

    def _noise(self, triple: Triple) -> NoiseSums:
        out, into = triple.pair.shape
        sums, step = NoiseSums(out, into), max(1, _BLOCK // into)
        for model, tensor in ((self._base, triple.base_tensor), (self._aligned, triple.aligned_tensor)):
            for start in range(0, out, step):
                rows = triple.first_row + start, triple.first_row + min(start + step, out)
                found = model.rounding(tensor, *rows)
                if found is None:
                    break
                sums.add(*found, start)
        return sums


def _rows(model: Model, tensor: str, first: int, start: int, stop: int) -> torch.Tensor:
    return model.rows(tensor, first + start, first + stop)

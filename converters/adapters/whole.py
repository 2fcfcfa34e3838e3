"""Tensors that an adapter holds beside its pairs, and that only a merged model can hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converters.errors import FormatError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WholeTensor:
    """A tensor that changes one of its model's by itself, as headers and configuration describe it.

    What replaces a tensor comes first, then what replaces rows of it, then pairs (DoRA's included) and what is added.

    Attributes:
        key: its name in the adapter's own file.
        target: the model's tensor in the adapter's layout, ending included: `model.embed_tokens.weight`, or a bare
            parameter (`model.layers.0.mlp.experts.down_proj`).
        shape: its own, which is the target's except for `rows`.
        kind: `replaces` the target; `adds` to it, whose lack counts as zeros; or replaces single `rows`.
        factor: of what is added: target + factor * tensor.
        rows: those that it replaces, in its own order, of the target seen as a matrix, all dimensions but the last
            merged. They may be beyond the model's last: new tokens.
        frozen: whether it was saved along untrained: the model's own, except where the vocabulary was resized.
    """

    key: str
    target: str
    shape: tuple[int, ...]
    kind: Literal["replaces", "adds", "rows"]
    factor: float = 1.0
    rows: tuple[int, ...] = ()
    frozen: bool = False


def check_finite(loaded: torch.Tensor, file: Path, key: str) -> torch.Tensor:
    """The tensor, if all its values are numbers.

    Raises:
        FormatError: they aren't.
    """
    import torch

    if not torch.isfinite(loaded).all():
        raise FormatError("holds values that are not finite: the training diverged", file=file, tensor=key)
    return loaded

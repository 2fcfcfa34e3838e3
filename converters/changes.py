"""A model's tensors with new values, before anything says how they will be stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Rows = Callable[[int, int], "torch.Tensor"]
"""Gives rows [start, stop) of a tensor seen as a matrix, all dimensions but the last merged: float32
(stop - start, columns). Asked once for every row, in order."""


@dataclass(frozen=True)
class Change:
    """New values of a tensor of a model, or a tensor that the model did not have.

    Attributes:
        name: in the names of the model's own file.
        rows: gives the values; of a vector, one row.
        shape: the new shape, if it is not the stored one.
        qtype: ggml's number of the type to store it in, if it is not the stored one; for GGUF alone.
        after: for a tensor that the model did not have: the one that it follows, and is stored like.
        copy_of: the stored tensor whose values these are: as long as the type stays, its bytes are copied.
    """

    name: str
    rows: Rows
    shape: tuple[int, ...] | None = None
    qtype: int | None = None
    after: str | None = None
    copy_of: str | None = None


@dataclass(frozen=True)
class Edits:
    """Everything in which a model differs from its stored form.

    Attributes:
        changes: by name of the tensor.
        config: keys of config.json with their new values, where those follow from the tensors: the vocabulary's size,
            tied embeddings.
        tokenizer: a directory whose tokenizer takes the place of the model's own: its vocabulary was extended.
    """

    changes: Mapping[str, Change] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None

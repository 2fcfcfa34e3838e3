"""A stored model seen with its edits applied, so that what comes next needs no file in between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.architectures import HeadCounts
from converters.changes import Change, Edits
from converters.checkpoint import Checkpoint
from converters.edited_config import edited_config
from converters.gguf_model import GgufModel
from converters.models import Layout, Model, ModelSizes
from converters.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

_HEADS = ("output.weight", "lm_head.weight")
Stored = Checkpoint | GgufModel


class ChangedModel:
    """A model whose tensors are the stored ones but for its edits (a `Model`); new values are computed when asked for.

    Attributes:
        stored: the model on disk.
        edits: all of them, also those of a changed model that this one was made from.
    """

    def __init__(self, model: Model, edits: Edits) -> None:
        self.stored, self.edits = unedited(model, edits)

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shapes as they become; types and sizes are still the stored ones', of a new tensor those of the one that it
        follows."""
        found: dict[str, TensorInfo] = {}
        for name, info in self.stored.infos.items():
            found[name] = _as_changed(info, self.edits.changes.get(name))
        waiting = [change for name, change in self.edits.changes.items() if name not in found]
        while waiting:
            ready = [change for change in waiting if change.after in found]
            assert ready, f"the model has no {waiting[0].name}, and nothing says after what it comes"
            for change in ready:
                found[change.name] = _as_changed(replace(found[str(change.after)], name=change.name), change)
            waiting = [change for change in waiting if change.name not in found]
        return found

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json as it becomes; empty for GGUF."""
        return edited_config(self.stored.config, self.edits.config) if isinstance(self.stored, Checkpoint) else {}

    def load(self, name: str) -> torch.Tensor:
        """Like `Model.load`; a changed tensor in float32."""
        if name not in self.edits.changes:
            return self.stored.load(name)
        shape = self.infos[name].shape
        return self.edits.changes[name].rows(0, math.prod(shape[:-1])).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Like `Model.rows`; of a changed tensor in float32."""
        change = self.edits.changes.get(name)
        return self.stored.rows(name, start, stop) if change is None else change.rows(start, stop)

    def prefetch(self, name: str) -> None:
        if name in self.stored.infos:
            self.stored.prefetch(name)

    def rounding(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, int] | None:
        """The stored tensor's: what was added to it was added exactly. None for other rows than the stored ones."""
        stored = self.stored.infos.get(name)
        return None if stored is None or stored.shape != self.infos[name].shape else self.stored.rounding(
            name, start, stop)  # fmt: skip

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def layout(self) -> Layout:
        return self.stored.layout

    @property
    def format(self) -> str:
        return self.stored.format

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    @property
    def architecture(self) -> str:
        return self.stored.architecture

    @property
    def model_class(self) -> str | None:
        return self.stored.model_class

    @property
    def tied_embeddings(self) -> bool:
        return not any(name.endswith(head) for name in self.infos for head in _HEADS)

    @property
    def ties_assumed(self) -> str | None:
        return self.stored.ties_assumed

    @property
    def described_by(self) -> Path:
        return self.stored.described_by

    @property
    def sources(self) -> tuple[Path, ...]:
        return self.stored.sources

    @property
    def repositories(self) -> tuple[str, ...]:
        return self.stored.repositories

    @property
    def experts(self) -> int:
        return self.stored.experts

    @property
    def width(self) -> int | None:
        return self.stored.width

    def sizes(self) -> ModelSizes:
        return self.stored.sizes()

    def heads(self) -> HeadCounts:
        return self.stored.heads()

    def check_type(self, name: str) -> None:
        while name not in self.stored.infos:
            name = str(self.edits.changes[name].after)
        self.stored.check_type(name)

    def file_of(self, name: str) -> Path:
        while name not in self.stored.infos:
            name = str(self.edits.changes[name].after)
        return self.stored.file_of(name)

    def stored_name(self, name: str) -> str:
        return name

    def fingerprint(self) -> str:
        """The stored model's: what was done to it is told by whoever did it."""
        return self.stored.fingerprint()


def unedited(model: Model, edits: Edits) -> tuple[Stored, Edits]:
    """The model on disk, and all edits that lead from it: where `model` is a changed one, its own come first."""
    if isinstance(model, ChangedModel):
        return model.stored, _both(model.edits, edits)
    assert isinstance(model, Checkpoint | GgufModel), "a model that is written again comes as it is stored"
    return model, edits


def _both(first: Edits, second: Edits) -> Edits:
    """Two steps as one; rows of the second are computed from those of the first by whoever made it."""
    changes = dict(first.changes)
    for name, change in second.changes.items():
        changes[name] = _following(changes[name], change) if name in changes else change
    return Edits(changes, {**first.config, **second.config}, second.tokenizer or first.tokenizer)


def _following(first: Change, second: Change) -> Change:
    return replace(
        second,
        shape=first.shape if second.shape is None else second.shape,
        qtype=first.qtype if second.qtype is None else second.qtype,
        after=first.after if second.after is None else second.after,
    )


def _as_changed(info: TensorInfo, change: Change | None) -> TensorInfo:
    if change is None or change.shape is None or change.shape == info.shape:
        return info
    size = info.nbytes * math.prod(change.shape) // max(info.elements, 1)
    return replace(info, shape=change.shape, nbytes=size)

"""What a step of a chain made and no file holds: the next step takes it instead of a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converters.changed_model import ChangedModel
from converters.model_card import Fact
from safelora_gguf.report import InputReport


@dataclass(frozen=True)
class Unwritten:
    """A model in memory.

    Attributes:
        model: its changed tensors are computed when they are asked for, each time anew.
        inputs: what it was made from.
        facts: what its file would have had in its metadata, for the file that is written in the end.
        losses: what of its inputs is not in it.
        notes: gives what a careful reader should know; all of it once every tensor was asked for.
    """

    model: ChangedModel
    inputs: tuple[InputReport, ...]
    facts: Mapping[str, Fact]
    losses: tuple[str, ...]
    notes: Callable[[], tuple[str, ...]]

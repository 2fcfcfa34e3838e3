"""What every adapter output has in common: what it can say of itself beforehand, and where it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.storing import PairOut, Rounding
from converters.architectures import NO_HEADS, HeadCounts, Rule
from converters.models import ModelDescription

if TYPE_CHECKING:
    import torch

Fact = str | int | float | Sequence[str]
LoadPair = Callable[[str], "tuple[torch.Tensor, torch.Tensor]"]
"""Gives A (r, in) and B (out, r) of a module in float32 on the CPU, in the adapter's own layout and scale."""


@dataclass(frozen=True)
class Origin:
    """What a reader of the output must be able to trace.

    Attributes:
        title: what happened, for names: "Safe LoRA"; empty where only the format changed.
        description: one sentence.
        tags: what hubs file the output under.
        facts: metadata keys and values, kept in order.
        invocation: the command line, for a directory's card.
    """

    title: str
    description: str
    tags: tuple[str, ...]
    facts: Mapping[str, Fact]
    invocation: str | None = None


class AdapterOutput(Protocol):
    """An adapter output that has passed every check that headers allow.

    Attributes:
        target: the file or directory that will appear.
        tensor_file: the file in it that holds the tensors.
    """

    target: Path
    tensor_file: Path

    @property
    def losses(self) -> tuple[str, ...]:
        """What the format can't hold, or llama.cpp loads and does not apply; a sentence each, with the way out."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What else a reader should know of how the output is applied; a sentence each."""

    def name_of(self, module: str) -> str | None:
        """The module's tensor in GGUF, where its architecture is known."""

    def planned_bytes(self) -> int:
        """The size of the tensors."""

    def write(self, load: LoadPair, origin: Origin) -> Mapping[str, Rounding]:
        """Writes every pair as `load` gives it; how each was rounded, by module."""


@dataclass(frozen=True)
class Place:
    """Where a module goes in the output.

    Attributes:
        name: in the output's own naming.
        rule: brings its pair from the run's layout into the output's; None where that is the same.
    """

    name: str
    rule: Rule | None = None

    def bring(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in the output's layout; `heads` of the model where there is a rule."""
        if self.rule is None or not self.rule.transforms:
            return a, b
        assert heads is not None, "a rule needs the model's heads"
        return self.rule.pair(a, b, heads)


def needed_heads(model: ModelDescription, places: Iterable[Place]) -> HeadCounts:
    """The model's heads, if any rule depends on them, else `NO_HEADS`; not every model says.

    Raises:
        FormatError, UnsupportedError: they are needed and can't be told.
    """
    return model.heads() if any(place.rule and place.rule.by_heads for place in places) else NO_HEADS


def pair_out(
    pair: LoraPair, place: Place, load: LoadPair | None, adapter: LoraAdapter, heads: HeadCounts | None
) -> PairOut:
    """A pair on its way to its place, its scale untouched. Without `load` only names and shapes can be used."""
    rows, columns = pair.shape[::-1] if pair.embedding else pair.shape

    def load_pair() -> tuple[torch.Tensor, torch.Tensor]:
        assert load is not None, "a plan has no tensors"
        return place.bring(*load(pair.module), heads)

    return PairOut(place.name, (pair.rank, columns), (rows, pair.rank), load_pair, adapter.tensor_file, pair.embedding)


def names_of(adapter: LoraAdapter, model: ModelDescription) -> tuple[str | None, ...]:
    """What the adapted model may be called, the adapter's own word first."""
    return (adapter.base_model_name, *model.repositories)

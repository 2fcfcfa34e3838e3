"""The pairs of a PEFT directory, and which of a run's pairs each is made of.

Mostly they are the same. What GGUF splits or stacks is one pair again here: the deltas of gate and up, each with zeros
in the rows of the other, add up to that of the parameter that holds both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from converters.adapters.converted import ConvertedAdapter
from converters.adapters.gguf import GgufAdapter
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.output import LoadPair, Place
from converters.adapters.storing import PairOut
from converters.architectures import NO_HEADS, Architecture, Destination, HeadCounts, architecture_of, find_architecture
from converters.architectures.transforms import SwapFactors
from converters.errors import Error, FormatError, UnsupportedError
from converters.models import ModelDescription
from converters.names import canonical

if TYPE_CHECKING:
    from pathlib import Path

_REMEDY = "Writing a GGUF adapter (an --out that ends in .gguf) works for any architecture"
_NESTED = ".base_layer"


@dataclass(frozen=True)
class Part:
    """One of a run's pairs on its way into a PEFT pair.

    Attributes:
        factor: its scaling in units of the PEFT pair's.
    """

    module: str
    place: Place
    factor: float = 1.0


@dataclass(frozen=True)
class PeftPair:
    """A pair of a PEFT directory.

    Attributes:
        name: the module as its tensors' names have it.
        target: the module or parameter as the configuration names it.
        parameter: whether it is one of `target_parameters`.
        shape: (out, in), or (vocabulary, width).
        parts: what it is the sum of, all with the same A if `shared`.
        expert: which matrix of a stack; None for an ordinary pair.
    """

    name: str
    target: str
    parameter: bool
    rank: int
    scaling: float
    shape: tuple[int, int]
    parts: tuple[Part, ...]
    shared: bool = True
    embedding: bool = False
    expert: int | None = None

    def out(self, load: LoadPair, source: Path, heads: HeadCounts | None) -> PairOut:
        """The pair on its way to its file; `load` gives the run's pairs, `source` is for messages."""
        rows, columns = self.shape[::-1] if self.embedding else self.shape
        return PairOut(self.name, (self.rank, columns), (rows, self.rank), lambda: self._sum(load, heads), source,
                       self.embedding, stacked=self.expert is not None)  # fmt: skip

    def _sum(self, load: LoadPair, heads: HeadCounts | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of the sum of all parts' deltas."""
        if not self.parts:
            return torch.zeros(self.rank, self.shape[1]), torch.zeros(self.shape[0], self.rank)
        brought = [part.place.bring(*load(part.module), heads) for part in self.parts]
        scaled = [(a, b if part.factor == 1 else (b.double() * part.factor).float())
                  for part, (a, b) in zip(self.parts, brought, strict=True)]  # fmt: skip
        if self.shared and any(_swaps(part.place) for part in self.parts):  # then it is B that they share
            a, b = torch.stack([a for a, _ in scaled]).sum(dim=0), scaled[0][1]
        elif self.shared:
            a, b = scaled[0][0], torch.stack([b for _, b in scaled]).sum(dim=0) if len(scaled) > 1 else scaled[0][1]
        else:
            a, b = torch.cat([a for a, _ in scaled]), torch.cat([b for _, b in scaled], dim=1)
        missing = self.rank - len(a)  # another expert's pair in the stack may be of a higher rank
        return (a, b) if not missing else (pad(a, (0, 0, 0, missing)), pad(b, (0, missing)))


def _swaps(place: Place) -> bool:
    """Whether A and B change places on the way."""
    return place.rule is not None and any(isinstance(each, SwapFactors) for each in place.rule.transforms)


def peft_pairs(adapter: LoraAdapter, model: ModelDescription) -> list[PeftPair]:
    """What a PEFT directory of a run's adapter holds.

    Raises:
        UnsupportedError: a GGUF adapter's architecture has no table, or no place for a module.
    """
    if isinstance(adapter, ConvertedAdapter) and adapter.peft_config is not None:
        return _own_pairs(adapter)
    if isinstance(adapter, ConvertedAdapter):
        return _named_by(adapter, adapter.bridge.architecture, model)
    if adapter.layout != "gguf":
        return [_same(adapter, pair, model) for pair in adapter.pairs.values()]
    try:
        architecture = architecture_of(adapter.architecture or model.architecture, _REMEDY)
    except Error as error:
        raise type(error)(error.message, file=adapter.path) from None
    return _named_by(adapter, architecture, model)


def _same(adapter: LoraAdapter, pair: LoraPair, model: ModelDescription) -> PeftPair:
    """An adapter's own name for the module where PEFT wrote it; else the one that PEFT finds in the model."""
    name = pair.key if adapter.peft_config is not None else _as_peft_names(model, canonical(pair.key))
    parts = (Part(pair.module, Place(name)),)
    return PeftPair(name, name, False, pair.rank, pair.scaling, pair.shape, parts, embedding=pair.embedding)


def _own_pairs(adapter: ConvertedAdapter) -> list[PeftPair]:
    """A PEFT adapter that was seen as GGUF: every pair as its own files have it."""
    found = []
    for module, origins in adapter.origins().items():
        pair = adapter.source.pairs[module]
        parts = tuple(Part(name, Place(pair.key, rule)) for name, rule in origins)
        found.append(PeftPair(pair.key, pair.key, False, pair.rank, pair.scaling, pair.shape, parts,
                              embedding=pair.embedding, expert=pair.expert))  # fmt: skip
    return found


def _named_by(adapter: LoraAdapter, architecture: Architecture, model: ModelDescription) -> list[PeftPair]:
    """GGUF's pairs by the table, those of one parameter together."""
    groups: dict[str, dict[int | None, list[tuple[LoraPair, Destination]]]] = {}
    for pair in adapter.pairs.values():
        found = architecture.to_hugging_face(pair.weight)
        if found is None:
            raise UnsupportedError(
                f"the table of {architecture.name} has no Hugging Face name for this weight; write a .gguf",
                file=adapter.path,
                tensor=pair.key,
            )
        if found.rule.stacked != (pair.expert is not None):
            told = "a matrix, expected a stack of experts" if found.rule.stacked else "a stack, expected a matrix"
            raise FormatError(f"is {told}: {architecture.name} has none here", file=adapter.path, tensor=pair.key)
        name = _as_peft_names(model, found.name)
        groups.setdefault(name, {}).setdefault(pair.expert, []).append((pair, found))
    pairs = [pair for name, group in groups.items() for pair in _joined(name, group, adapter, model)]
    return list(_nested(pairs, architecture))


def _joined(
    name: str,
    group: Mapping[int | None, Sequence[tuple[LoraPair, Destination]]],
    adapter: LoraAdapter,
    model: ModelDescription,
) -> Iterator[PeftPair]:
    """The pairs of one module, or of every expert in a parameter."""
    members = list(group.values())
    scaling = next((pair.scaling for parts in members for pair, _ in parts if pair.scaling), 0.0)
    shared = all(_same_a([pair for pair, _ in parts], adapter) for parts in members)
    rank = max(parts[0][0].rank if shared else sum(pair.rank for pair, _ in parts) for parts in members)
    heads = model.heads() if any(place.rule.by_heads for parts in members for _, place in parts) else NO_HEADS
    for expert, parts in group.items():
        first, place = parts[0]
        shape = place.rule.pair_shape(first.shape, heads)
        ways = tuple(
            Part(pair.module, Place(name, found.rule), pair.scaling / scaling if scaling else 1.0)
            for pair, found in parts
        )
        target = f"{name}.weight" if place.rule.parameter and place.rule.bare is None else name
        yield PeftPair(name, target, place.rule.parameter, rank, scaling, shape, ways,
                       shared, first.embedding, expert)  # fmt: skip


def _same_a(pairs: Sequence[LoraPair], adapter: LoraAdapter) -> bool:
    """Whether pairs have one A: then their sum is of no higher rank."""
    if len(pairs) == 1:
        return True
    if len({pair.rank for pair in pairs}) > 1 or not isinstance(adapter, ConvertedAdapter | GgufAdapter):
        return False  # pairs that are computed one by one have nothing in common
    first, *others = (adapter.load(pair.module)[0] for pair in pairs)
    return all(torch.equal(first, other) for other in others)


def _nested(pairs: Sequence[PeftPair], architecture: Architecture) -> Iterator[PeftPair]:
    """Names as PEFT gives them: of several parameters of one module, each wraps the ones defined before it."""
    order = [rule.source.rpartition(".")[2] for rule in architecture.rules if rule.stacked and rule.parameter]
    stacks: dict[str, set[str]] = {}
    for pair in pairs:
        if pair.expert is not None:
            module, _, parameter = pair.name.rpartition(".")
            stacks.setdefault(module, set()).add(parameter)
    for pair in pairs:
        if pair.expert is None:
            yield pair
            continue
        module, _, parameter = pair.name.rpartition(".")
        later = [other for other in stacks[module] if order.index(other) > order.index(parameter)]
        yield replace(pair, name=module + _NESTED * len(later))


def _as_peft_names(model: ModelDescription, module: str) -> str:
    """The module's name inside the model's class, which may wrap its text half."""
    table = find_architecture(model.model_class or "")
    return table.name_in(model.model_class or "", module) if table else module

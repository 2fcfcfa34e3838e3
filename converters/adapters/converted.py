"""Adapters in Hugging Face's layout, seen through an architecture's table as GGUF: pair by pair, as they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.converted_whole import PlacedWhole, whole_in_gguf
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.peft import PeftAdapter
from converters.adapters.whole import WholeTensor
from converters.architectures import Architecture, Destination, Rule, find_architecture
from converters.architectures.transforms import StoredTransposed, SwapFactors
from converters.bridge import Bridge
from converters.conv1d import is_conv1d
from converters.errors import FormatError, MismatchError, UnsupportedError
from converters.models import Layout, ModelDescription
from converters.names import named, natural_order

if TYPE_CHECKING:
    import torch

_INWARD = ("ffn_gate_exps", "ffn_up_exps")
_OUTWARD = ("ffn_down_exps",)
_ORDER_KNOWN = (0, 19)  # the PEFT from which on stacks have their model's order


def places_in_gguf(architecture: Architecture, pair: LoraPair, adapter: Path) -> tuple[Destination, ...]:
    """Where a Hugging Face pair goes, to one place or in parts to several.

    Raises:
        UnsupportedError: the table has no place for it.
    """
    found = architecture.to_gguf(pair.weight)
    if not found:
        raise UnsupportedError(
            f"the architecture {architecture.name} has no place for this module in GGUF", file=adapter, tensor=pair.key
        )
    return found


def needs_table(adapter: LoraAdapter, architecture: Architecture | None, *, to_gguf: bool) -> bool:
    """Whether a Hugging Face adapter's pairs are other ones in GGUF, and must be those.

    That is so where one is for the experts of a stack or for a router, which checkpoints have in other forms and under
    other names than transformers in memory; and in GGUF's own files where a module of its own is an expert there, is
    split, or has no counterpart.
    """
    if adapter.layout == "gguf":
        return False
    if any(pair.expert is not None for pair in adapter.pairs.values()):
        return True
    if architecture is None:
        return False
    places = [architecture.to_gguf(pair.module) for pair in adapter.pairs.values()]
    if any(place.rule.parameter for found in places for place in found):
        return True
    absent = any(architecture.no_pairs_because(pair.weight) for pair in adapter.pairs.values())
    return to_gguf and (absent or any(len(found) > 1 or (found and found[0].expert is not None) for found in places))


def check_orientation(adapter: LoraAdapter, model: ModelDescription) -> None:
    """That no pair is for a weight that is stored as (in, out). PEFT sets `fan_in_fan_out` by the weight's class: aside
    for every nn.Linear, as all adapted weights of an architecture with a table are, and on for every Conv1D.

    Raises:
        UnsupportedError: one is, or in an unknown architecture may be.
    """
    if not isinstance(adapter, PeftAdapter):
        return
    turned = [pair for pair in adapter.pairs.values() if is_conv1d(model, pair.weight)]
    if turned:
        told = f"is for a weight that {model.architecture} stores as (in, out) (Conv1D), which merge alone supports"
        raise UnsupportedError(told, file=adapter.tensor_file, tensor=turned[0].tensors[0])
    if adapter.config.fan_in_fan_out and find_architecture(model.architecture) is None:
        told = (
            f"has fan_in_fan_out, which says that weights are stored as (in, out), as GPT-2's Conv1D has them; which "
            f"of a {model.architecture}'s are is not known here. Merge it with PEFT, which has the model's classes"
        )
        raise UnsupportedError(told, file=adapter.config.path)


class ConvertedAdapter:
    """A Hugging Face adapter as a `LoraAdapter` in GGUF's layout.

    A pair for several matrices of GGUF becomes a pair for each, with the same A and the matching rows of B.

    Args:
        may_be_empty: whether it is one, too, when all of its pairs are left out.

    Attributes:
        source: the adapter as it is.
        bridge: the way it came.
    """

    layout: Layout = "gguf"

    def __init__(self, adapter: LoraAdapter, bridge: Bridge, *, may_be_empty: bool = False) -> None:
        """Raises:
        UnsupportedError: the table has no place for a module. FormatError: heads that don't divide the rows.
        MismatchError: experts that the model hasn't.
        """
        self.source = adapter
        self.bridge = bridge
        self._places: dict[str, tuple[str, Rule]] = {}
        self._left_out: dict[str, list[str]] = {}
        self._check_stacks()
        pairs = [part for pair in adapter.pairs.values() for part in self._parts(pair)]
        if not pairs and not may_be_empty:
            raise UnsupportedError("; ".join(self._told_left_out()), file=adapter.path)
        self.pairs: Mapping[str, LoraPair] = {
            pair.module: pair for pair in sorted(pairs, key=lambda pair: natural_order(pair.module))
        }

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def tensor_file(self) -> Path:
        return self.source.tensor_file

    @property
    def format(self) -> str:
        return self.source.format

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def architecture(self) -> str | None:
        return self.bridge.architecture.name

    @property
    def lora_alpha(self) -> float:
        return self.source.lora_alpha

    @property
    def base_model_name(self) -> str | None:
        return self.source.base_model_name

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        return self.source.invocation_tokens

    @property
    def peft_config(self) -> bytes | None:
        return self.source.peft_config

    @cached_property
    def frozen_tables(self) -> Mapping[str, str]:
        found = {name: self.bridge.architecture.to_gguf(module) for module, name in self.source.frozen_tables.items()}
        return {places[0].name: name for name, places in found.items() if places}

    @property
    def notes(self) -> tuple[str, ...]:
        return self.source.notes

    @property
    def losses(self) -> tuple[str, ...]:
        gone = {key for keys in self._left_out.values() for key in keys}  # how near their pairs are is beside the point
        kept = (loss for loss in self.source.losses if loss.partition(": ")[0] not in gone)
        return (*kept, *self._told_left_out())

    @property
    def missing(self) -> tuple[str, ...]:
        return (*self.source.missing, *self._told_left_out())

    @cached_property
    def magnitudes(self) -> Mapping[str, str]:
        lengths = self.source.magnitudes
        return {name: lengths[own] for name, (own, _) in self._places.items() if own in lengths}

    @cached_property
    def whole(self) -> Mapping[str, WholeTensor]:
        """See `LoraAdapter.whole`; also raises what `whole_in_gguf` raises."""
        return {name: placed.tensor for name, placed in self._whole.items()}

    @cached_property
    def _whole(self) -> Mapping[str, PlacedWhole]:
        return whole_in_gguf(self.source, self.bridge)

    def load_whole(self, key: str) -> torch.Tensor:
        placed = self._whole[key]
        return placed.bring(self.source.load_whole(placed.source), self.bridge.heads)

    def load_magnitude(self, module: str) -> torch.Tensor:
        """See `LoraAdapter.load_magnitude`: lengths of rows go B's way.

        Raises:
            UnsupportedError: the rows of columns that have lengths are other ones in GGUF.
        """
        own, rule = self._places[module]
        lengths = self.source.load_magnitude(own)
        if not rule.transforms:
            return lengths
        if lengths.ndim > 1 or any(isinstance(each, SwapFactors) for each in rule.transforms):
            told = "has lengths of columns, and GGUF has the weight in another form: merge the adapter in safetensors"
            raise UnsupportedError(told, file=self.tensor_file, tensor=self.magnitudes[module])
        return rule.pair(lengths.new_zeros(1, 1), lengths[:, None], self.bridge.heads)[1][:, 0]

    def load_frozen_table(self, module: str) -> torch.Tensor:
        found = self.bridge.architecture.to_hugging_face(module)
        assert found is not None, "only what came through the table is asked for"
        return self.source.load_frozen_table(found.name)

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        own, rule = self._places[module]
        return rule.pair(*self.source.load(own), self.bridge.heads)

    def origins(self) -> Mapping[str, Sequence[tuple[str, Rule]]]:
        """By module of the source: its pairs here, each with the rule that leads back."""
        found: dict[str, list[tuple[str, Rule]]] = {}
        for name in self.pairs:
            own, rule = self._places[name]
            found.setdefault(own, []).append((name, rule.inverse()))
        return found

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def _parts(self, pair: LoraPair) -> list[LoraPair]:
        """What a pair becomes; nothing, and a loss, where GGUF has no counterpart of its kind."""
        reason = self.bridge.architecture.no_pairs_because(pair.weight)
        if reason is not None:
            self._left_out.setdefault(reason, []).append(pair.key)
            return []
        return [self._part(pair, place) for place in places_in_gguf(self.bridge.architecture, pair, self.path)]

    def _told_left_out(self) -> tuple[str, ...]:
        """A sentence for every reason."""
        return tuple(
            f"{len(keys)} of {len(self.source.pairs)} pairs are left out, since {reason}; merge the adapter into the "
            f"model: {named(keys)}"
            for reason, keys in self._left_out.items()
        )

    def _part(self, pair: LoraPair, place: Destination) -> LoraPair:
        rule = self._oriented(pair, place)
        expert = pair.expert if pair.expert is not None else place.expert
        try:
            shape = rule.pair_shape(pair.shape, self.bridge.heads)
        except FormatError as error:
            raise FormatError(error.message, file=self.path, tensor=pair.tensors[1]) from None
        if expert is not None and expert >= self.bridge.experts:
            told = (
                f"has {self.bridge.experts} experts" if self.bridge.experts else "doesn't say how many experts it has"
            )
            message = f"adapts the expert {expert}, and its model {told}: the adapter is for another model"
            raise MismatchError(message, file=self.path, tensor=pair.tensors[0])
        name = place.name if expert is None else f"{place.name}[{expert}]"
        if name in self._places:
            other = self.source.pairs[self._places[name][0]]
            found = f"is a second pair for {name}, the first is {other.tensors[0]}"
            raise FormatError(found, file=self.path, tensor=pair.tensors[0])
        self._places[name] = pair.module, rule
        return replace(pair, module=name, shape=shape, expert=expert)

    def _oriented(self, pair: LoraPair, place: Destination) -> Rule:
        """The rule for a pair as it is.

        PEFT before 0.19 took every stack of experts for (experts, in, out): its factors have changed places where a
        model has (experts, out, in). A's columns then are not as many as the weight has inputs, or where these are as
        many as its outputs, the version that wrote the adapter tells.
        """
        width, kind = self.bridge.width, place.name.rpartition(".")[2]
        if not (place.rule.stacked and width and kind in (*_INWARD, *_OUTWARD)):
            return place.rule
        inner, outer = (pair.shape[1], pair.shape[0]) if kind in _INWARD else pair.shape
        swapped = replace(place.rule, transforms=(SwapFactors(), *place.rule.transforms))
        if inner == outer == width:
            in_order = any(isinstance(transform, StoredTransposed) for transform in place.rule.transforms)
            return swapped if self._unaware_of_order() and not in_order else place.rule
        if inner == width:
            return place.rule
        if outer == width:
            return swapped
        message = f"is a pair for experts of {list(pair.shape)}, and the model is {width} wide: it is for another model"
        raise MismatchError(message, file=self.path, tensor=pair.tensors[0])

    def _unaware_of_order(self) -> bool:
        """Whether the adapter was written by a PEFT that took all stacks for (experts, in, out)."""
        return isinstance(self.source, PeftAdapter) and self.source.config.peft_version < _ORDER_KNOWN

    def _check_stacks(self) -> None:
        """That stacks which a file has whole are the model's."""
        counts = Counter(pair.weight for pair in self.source.pairs.values() if pair.expert is not None)
        for pair in self.source.pairs.values():
            if pair.expert is not None and counts[pair.weight] != self.bridge.experts:
                told = self.bridge.experts or "an unknown number of"
                message = f"is for {counts[pair.weight]} experts, and its model has {told}: it is for another model"
                raise MismatchError(message, file=self.path, tensor=pair.tensors[0])

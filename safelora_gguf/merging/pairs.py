"""Where an adapter's pairs stand in a model as it is stored, whatever names and row order the two have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from converters.adapters.converted import ConvertedAdapter, places_in_gguf
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.architectures import NO_HEADS, Architecture, HeadCounts, Rule
from converters.architectures.transforms import StoredTransposed, Transform
from converters.bridge import Bridge
from converters.conv1d import is_conv1d
from converters.converted_model import ConvertedModel
from converters.errors import FormatError, MismatchError, UnsupportedError
from converters.layouts import find_table, table_of
from converters.models import Model
from converters.names import canonical, named
from converters.origins import origins_in
from safelora_gguf.merging.fused import OneHead, RowsOfWhole, fused_place, head_places
from safelora_gguf.merging.tables import Tables
from safelora_gguf.pairing import check_adapted, within_base

_WEIGHT = ".weight"
_REMEDY = "Files of one format need none: merge a GGUF adapter into a GGUF file of the model"


@dataclass(frozen=True)
class LoadedPair:
    """A pair's numbers as they act on one stored matrix.

    Attributes:
        a, b: float32 A (r, in) and B (out, r).
        transposed: whether the matrix is stored as (in, out).
        magnitude: DoRA's lengths in float64; None without DoRA.
        by_row: whether those are the lengths of the stored matrix' rows, not of its columns.
        covered: which of those rows the pair is for, where it is for a part of them; None for all.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool
    magnitude: torch.Tensor | None
    by_row: bool
    covered: torch.Tensor | None


@dataclass(frozen=True)
class PlacedPair:
    """A pair where it stands in a model.

    Attributes:
        adapter: gives A and B by `module`, in the layout in which it came here.
        tensor: the model's.
        number: the matrix, of a stack.
        rule: leads from the adapter's layout to the model's; None where they are one.
        heads: that the rule depends on.
        turned: whether the model stores the weight as (in, out).
    """

    adapter: LoraAdapter
    module: str
    tensor: str
    number: int = 0
    rule: Rule | None = None
    heads: HeadCounts | None = None
    turned: bool = False

    @property
    def pair(self) -> LoraPair:
        return self.adapter.pairs[self.module]

    def load(self, device: torch.device) -> LoadedPair:
        """Reads it.

        Raises:
            FormatError: values that are not finite.
        """
        pair = self.pair
        a, b = (half.float() for half in self.adapter.load(self.module))
        for half, tensor in zip((a, b), pair.tensors, strict=True):
            self._check_finite(half, tensor)
        lengths = self._magnitude()
        covered = None
        transposed = pair.embedding != self.turned
        if self.rule is not None:
            assert self.heads is not None
            is_part = self.rule.is_part or any(isinstance(step, RowsOfWhole) for step in self.rule.transforms)
            if lengths is not None and is_part:
                covered = self.rule.weight(torch.ones(len(b)), self.heads) > 0
            a, b = self.rule.pair(a, b, self.heads)
            lengths = None if lengths is None else self.rule.weight(lengths, self.heads)
            transposed ^= any(_turns(step) for step in self.rule.transforms)
        by_row = lengths is not None and (lengths.ndim == 1) != transposed
        return LoadedPair(
            a=a.to(device).contiguous(),
            b=b.to(device).contiguous(),
            scaling=pair.scaling,
            transposed=transposed,
            magnitude=None if lengths is None else lengths.reshape(-1).to(device),
            by_row=by_row,
            covered=None if covered is None else covered.to(device),
        )

    def _magnitude(self) -> torch.Tensor | None:
        if self.module not in self.adapter.magnitudes:
            return None
        lengths = self.adapter.load_magnitude(self.module).double()
        self._check_finite(lengths, self.adapter.magnitudes[self.module])
        return lengths

    def _check_finite(self, values: torch.Tensor, tensor: str) -> None:
        if not values.sum().isfinite() and not values.isfinite().all():  # the sum alone takes a tenth of the time
            told = "holds NaN or Inf: the adapter is broken"
            raise FormatError(told, file=self.adapter.tensor_file, tensor=tensor)


def _turns(step: Transform) -> bool:
    """Whether what a transform leads to is stored turned over, which it doesn't do to pairs."""
    return isinstance(step, StoredTransposed) or (isinstance(step, OneHead) and step.part == "key")


def in_layout_of(model: Model, adapter: LoraAdapter) -> LoraAdapter:
    """The adapter in the layout of a GGUF model; as it is for a checkpoint, where `placed_pairs` sees to it.

    Raises:
        UnsupportedError: the architecture has no table, or no place for a module. FormatError: unknown heads.
        MismatchError: experts that the model hasn't, or another architecture.
    """
    _check_architecture(model, adapter)
    if model.layout != "gguf" or adapter.layout == "gguf":
        return adapter
    remedy = f"Convert {adapter.path} with llama.cpp's convert_lora_to_gguf.py, and merge the result"
    return ConvertedAdapter(adapter, Bridge.of(table_of(model, remedy), model), may_be_empty=True)


def placed_pairs(model: Model, adapter: LoraAdapter, tables: Tables) -> list[PlacedPair]:
    """Every pair of an adapter at its place in the stored model; headers only. The tables of tokens are not checked,
    since they may grow or part here.

    Args:
        adapter: as `in_layout_of` gives it.

    Raises:
        MismatchError: the adapter is for another model.
        UnsupportedError: weights in a packed form; the architecture has no table and needs one.
        FormatError: the heads can't be told.
    """
    if adapter.layout == model.layout:
        names = within_base(_names(model), [pair.weight for pair in adapter.pairs.values()])
        own = {module for module, pair in adapter.pairs.items() if _is_direct(pair, model, names)}
        found = [*_direct(model, adapter, own, names, tables), *_heads(model, adapter)]
        return found + _through_table(model, adapter, adapter.pairs.keys() - own, tables)
    return _through_table(model, adapter, adapter.pairs.keys(), tables)


def _is_direct(pair: LoraPair, model: Model, names: Mapping[str, str]) -> bool:
    """Whether the pair's own name and form are the stored tensor's, in a checkpoint also whether it may be another's:
    a stack of experts has several forms there."""
    return model.layout == "gguf" or (pair.expert is None and pair.weight in names)


def _direct(
    model: Model, adapter: LoraAdapter, modules: Collection[str], names: Mapping[str, str], tables: Tables
) -> list[PlacedPair]:
    fused = _fused(model, adapter, modules)
    plain = {module for module in modules if module not in fused and not tables.has(adapter.pairs[module].weight)}
    turned = {module for module in plain if is_conv1d(model, adapter.pairs[module].weight)}
    check_adapted(model, adapter, plain - turned)
    found = list(fused.values())
    for module, pair in adapter.pairs.items():
        if module not in modules or module in fused:
            continue
        tensor = tables.tensor_of(pair.weight) or names.get(pair.weight)
        if tensor is None:
            raise UnsupportedError(
                f"stores {pair.weight} in a packed form, to which nothing can be added; take a float file of the model",
                file=model.path,
            )
        if module in turned:
            _check_turned(model, adapter, pair, tensor)
        found.append(PlacedPair(adapter, module, tensor, pair.expert or 0, turned=module in turned))
    return found


def _check_turned(model: Model, adapter: LoraAdapter, pair: LoraPair, tensor: str) -> None:
    """That a pair fits a weight that is stored as (in, out)."""
    if model.infos[tensor].shape != pair.shape[::-1]:
        raise MismatchError(
            f"is a pair for a weight of {list(pair.shape[::-1])} (in, out); {model.path} has "
            f"{list(model.infos[tensor].shape)}. The adapter is for another model",
            file=adapter.tensor_file,
            tensor=pair.tensors[0],
        )


def _heads(model: Model, adapter: LoraAdapter) -> list[PlacedPair]:
    """The pairs that the way to GGUF leaves out, where they can be merged head by head."""
    if not isinstance(adapter, ConvertedAdapter):
        return []
    source, kept = adapter.source, adapter.origins()
    return [
        PlacedPair(source, module, tensor, number, rule, model.heads())
        for module, pair in source.pairs.items()
        if module not in kept
        for tensor, number, rule in head_places(model, source, pair)
    ]


def left_out(model: Model, adapter: LoraAdapter) -> tuple[str, ...]:
    """What of an adapter's pairs the way to GGUF leaves out and merging doesn't bring over, a sentence each."""
    if not isinstance(adapter, ConvertedAdapter):
        return ()
    source, kept, table = adapter.source, adapter.origins(), adapter.bridge.architecture
    gone: dict[str, list[str]] = {}
    for module, pair in source.pairs.items():
        if module not in kept and not head_places(model, source, pair):
            gone.setdefault(str(table.no_pairs_because(pair.weight)), []).append(pair.key)
    return tuple(f"{len(keys)} of {len(source.pairs)} pairs are left out, since {reason}: {named(keys)}"
                 for reason, keys in gone.items())  # fmt: skip


def _fused(model: Model, adapter: LoraAdapter, modules: Collection[str]) -> Mapping[str, PlacedPair]:
    """The pairs for parts of what a GGUF model has in one."""
    if model.layout != "gguf":
        return {}
    places = {module: fused_place(model, adapter, adapter.pairs[module]) for module in modules}
    return {
        module: PlacedPair(adapter, module, place[0], adapter.pairs[module].expert or 0, place[1], NO_HEADS)
        for module, place in places.items()
        if place is not None
    }


def _through_table(model: Model, adapter: LoraAdapter, modules: Collection[str], tables: Tables) -> list[PlacedPair]:
    """Pairs that a checkpoint has under other names or in another form: to GGUF's layout, and back from there."""
    heads = {module: None for module in modules if tables.has(adapter.pairs[module].weight)}
    found = [PlacedPair(adapter, module, tables.needed(adapter.pairs[module].weight)) for module in heads]
    rest = {module for module in modules if module not in heads}
    if not rest:
        return found
    table = find_table(model)
    if table is None and all(adapter.pairs[module].expert is None for module in rest) and adapter.layout != "gguf":
        check_adapted(model, adapter, rest)  # none of them is there
    table = table or table_of(model, _REMEDY)
    bridge = Bridge.of(table, model)
    view, ours = _in_gguf(model, adapter, rest, bridge)
    check_adapted(ConvertedModel(model, bridge), view, ours)
    return found + _brought_back(model, view, ours, table)


def _in_gguf(
    model: Model, adapter: LoraAdapter, modules: Collection[str], bridge: Bridge
) -> tuple[LoraAdapter, Collection[str]]:
    """The adapter in GGUF's layout, and what some of its modules are there."""
    if adapter.layout == "gguf":
        return adapter, modules
    unknown = [module for module in modules if not bridge.architecture.to_gguf(adapter.pairs[module].weight)]
    if unknown:
        check_adapted(model, adapter, set(unknown))
        places_in_gguf(bridge.architecture, adapter.pairs[unknown[0]], adapter.path)
    view = ConvertedAdapter(adapter, bridge)
    return view, {name: None for own, parts in view.origins().items() if own in modules for name, _ in parts}


def _brought_back(model: Model, view: LoraAdapter, modules: Collection[str], table: Architecture) -> list[PlacedPair]:
    origins, heads = origins_in(model, table), model.heads()
    found: list[PlacedPair] = []
    for module in modules:
        pair = view.pairs[module]
        before = len(found)
        for origin in origins.get(f"{pair.weight}{_WEIGHT}", ()):
            number = origin.number(pair.expert)
            reason = table.no_pairs_because(canonical(origin.own).removesuffix(_WEIGHT))
            if reason is not None:
                told = f"can't be brought to {origin.own} of {model.path} ({reason}); take both in one format"
                raise UnsupportedError(told, file=view.tensor_file, tensor=pair.tensors[0])
            if number is not None:
                found.append(PlacedPair(view, module, origin.own, number, origin.rule.inverse(), heads))
        if len(found) == before:
            told = f"stores {pair.weight} in a packed form, to which nothing can be added; take a float file of it"
            raise UnsupportedError(told, file=model.path)
    return found


def _names(model: Model) -> Mapping[str, str]:
    """Stored names by canonical module, of weights and of parameters without such an ending."""
    return {canonical(name).removesuffix(_WEIGHT): name for name in model.infos}


def _check_architecture(model: Model, adapter: LoraAdapter) -> None:
    if adapter.architecture is None:
        return
    table = find_table(model)
    known = table.name if table else model.architecture
    if adapter.architecture != known and (table or model.layout == "gguf"):
        raise MismatchError(
            f"is an adapter for the architecture {adapter.architecture}, and {model.path} is {known}: the adapter is "
            f"for another model",
            file=adapter.path,
        )

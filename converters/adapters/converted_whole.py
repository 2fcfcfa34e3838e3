"""What an adapter holds beside its pairs, seen through an architecture's table as GGUF: tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from converters.adapters.lora import LoraAdapter
from converters.adapters.whole import WholeTensor
from converters.architectures import Destination, HeadCounts, Rule
from converters.architectures.transforms import AddOne
from converters.bridge import Bridge
from converters.errors import InputError, MismatchError, UnsupportedError

if TYPE_CHECKING:
    import torch

_HEAD = "lm_head"
_EMBEDDING = "token_embd"
_FIRST = "merge the adapter into the model in safetensors first"


@dataclass(frozen=True)
class PlacedWhole:
    """A tensor, or a part of one, on its way into GGUF.

    Attributes:
        tensor: as it is there.
        source: what the adapter calls it.
        rule: brings it, or each matrix of a stack, into GGUF's layout.
        stacked: whether it is a stack.
    """

    tensor: WholeTensor
    source: str
    rule: Rule
    stacked: bool

    def bring(self, loaded: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        """The source's tensor in GGUF's layout."""
        import torch

        if not self.stacked:
            return self.rule.weight(loaded, heads).reshape(self.tensor.shape)
        return torch.stack([self.rule.weight(matrix, heads) for matrix in loaded])


def whole_in_gguf(adapter: LoraAdapter, bridge: Bridge) -> dict[str, PlacedWhole]:
    """All of an adapter's whole tensors by their names in its file; of one that the table splits, every part.

    Raises:
        UnsupportedError: the table has no place for one, or GGUF has its rows in another order.
        MismatchError: an expert that the model hasn't. FormatError: heads that don't divide the rows.
    """
    found: dict[str, PlacedWhole] = {}
    for key, tensor in adapter.whole.items():
        places = list(bridge.architecture.tensors_in_gguf(tensor.target))
        if not places and not _is_the_embedding(key, tensor, adapter, bridge):
            raise _no_place(tensor, adapter, bridge)
        for number, (name, place) in enumerate(places, 1):
            own = key if len(places) == 1 else f"{key} ({number} of {len(places)})"
            try:
                found[own] = _placed(replace(tensor, target=name), key, place, bridge)
            except InputError as error:
                raise type(error)(error.message, file=adapter.tensor_file, tensor=tensor.key) from None
    return found


def _placed(tensor: WholeTensor, source: str, place: Destination, bridge: Bridge) -> PlacedWhole:
    rule = place.rule
    if tensor.kind == "adds":  # what is added to a norm's weight is the same in both layouts
        rule = replace(rule, transforms=tuple(each for each in rule.transforms if not isinstance(each, AddOne)))
    if tensor.kind == "rows" and rule.transforms:
        raise UnsupportedError(f"replaces single rows of a tensor that GGUF has in another form: {_FIRST}")
    stacked = rule.stacked and len(tensor.shape) > 1
    outer, matrix = (tensor.shape[:1], tensor.shape[1:]) if stacked else ((), tensor.shape)
    placed = replace(tensor, shape=outer + rule.weight_shape(matrix, bridge.heads))
    if place.expert is not None:
        placed = _in_stack(placed, place.expert, bridge)
    return PlacedWhole(placed, source, rule, stacked)


def _in_stack(tensor: WholeTensor, expert: int, bridge: Bridge) -> WholeTensor:
    """One expert's weight: rows of the stack, which GGUF has as one tensor."""
    if expert >= bridge.experts:
        raise MismatchError(
            f"is for the expert {expert}, and its model has {bridge.experts}: the adapter is for another model"
        )
    if tensor.kind != "replaces":
        raise UnsupportedError(f"changes a part of an expert's tensor, which GGUF has in a stack of all: {_FIRST}")
    height, columns = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
    rows = tuple(range(expert * height, (expert + 1) * height))
    return replace(tensor, shape=(height, columns), kind="rows", rows=rows)


def _is_the_embedding(key: str, tensor: WholeTensor, adapter: LoraAdapter, bridge: Bridge) -> bool:
    """Whether it is a head that the architecture hasn't, and the same as what is done to the embedding."""
    import torch

    if tensor.target != f"{_HEAD}.weight" or bridge.architecture.to_gguf(_HEAD):
        return False
    table = bridge.architecture.to_hugging_face(_EMBEDDING)
    return table is not None and any(
        other.target == f"{table.name}.weight"
        and (other.kind, other.rows, other.shape) == (tensor.kind, tensor.rows, tensor.shape)
        and torch.equal(adapter.load_whole(own), adapter.load_whole(key))
        for own, other in adapter.whole.items()
    )


def _no_place(tensor: WholeTensor, adapter: LoraAdapter, bridge: Bridge) -> UnsupportedError:
    module = tensor.target.rpartition(".")[0]
    why = bridge.architecture.no_pairs_because(module) or (
        "its input and output are one tensor there" if module == _HEAD else "the table of the architecture lacks it"
    )
    told = f"has no place in a GGUF model of {bridge.architecture.name}, since {why}: {_FIRST}"
    return UnsupportedError(told, file=adapter.tensor_file, tensor=tensor.key)

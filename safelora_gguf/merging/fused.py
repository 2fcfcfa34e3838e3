"""Weights that are cut otherwise in a GGUF model than in an adapter, so that no adapter can be applied to it.

llama.cpp's converter can put several into one (--fuse-qkv, --fuse-gate-up-exps): the pair of a part becomes one of the
whole, with zeros in the rows of the others. DeepSeek's kv_b_proj is two stacks of heads there, the keys' transposed:
its pair becomes one for every head of each, with the same A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from converters.adapters.lora import LoraAdapter, LoraPair
from converters.architectures import HeadCounts, Rule
from converters.architectures.transforms import HeadParts
from converters.errors import FormatError, MismatchError
from converters.layouts import find_table
from converters.models import Model

if TYPE_CHECKING:
    import torch

_ATTENTION = ("attn_q", "attn_k", "attn_v")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps")


@dataclass(frozen=True)
class RowsOfWhole:
    """A part's rows among those of the whole, the others zero (a `Transform`).

    Attributes:
        first: of the part's.
        count: of the whole's.
    """

    first: int
    count: int

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        whole = weight.new_zeros((self.count, *weight.shape[1:]))
        whole[self.first : self.first + len(weight)] = weight
        return whole

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        return a, self.weight(b, heads)

    def inverse(self) -> RowsOfWhole:
        raise NotImplementedError("pairs go into the whole, and none comes back")


@dataclass(frozen=True)
class OneHead:
    """The keys' or the values' rows of one head of kv_b_proj (a `Transform`); see `transforms.HeadParts`."""

    part: Literal["key", "value"]
    head: int

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        rows = weight.reshape(heads.query, -1, *weight.shape[1:])[self.head]
        return rows[: heads.latent_key] if self.part == "key" else rows[heads.latent_key :]

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        return a, self.weight(b, heads)

    def inverse(self) -> OneHead:
        raise NotImplementedError("pairs of heads are merged, and none comes back")


def head_places(model: Model, adapter: LoraAdapter, pair: LoraPair) -> list[tuple[str, int, Rule]]:
    """The heads' matrices that a pair of Hugging Face's layout is for in a GGUF model, tensor, number and way; none
    where its module is not cut into heads.

    Raises:
        MismatchError: they have other sizes. FormatError: the heads can't be told.
    """
    table = find_table(model)
    found: list[tuple[str, int, Rule]] = []
    for place in table.to_gguf(pair.weight) if table is not None else ():
        parts = [step.part for step in place.rule.transforms if isinstance(step, HeadParts)]
        tensor = f"{place.name}.weight"
        if not parts or tensor not in model.infos:
            continue
        heads = model.heads()
        try:
            expected = place.rule.weight_shape(pair.shape, heads)
        except FormatError as error:
            raise MismatchError(error.message, file=adapter.tensor_file, tensor=pair.tensors[0]) from None
        if model.infos[tensor].shape != expected:
            told = f"is a pair for {tensor} of {list(expected)}, and {model.path} has "
            told += f"{list(model.infos[tensor].shape)}: the adapter is for another model"
            raise MismatchError(told, file=adapter.tensor_file, tensor=pair.tensors[0])
        found += [(tensor, head, Rule(pair.weight, tensor, (OneHead(parts[0], head),))) for head in range(heads.query)]
    return found


def fused_place(model: Model, adapter: LoraAdapter, pair: LoraPair) -> tuple[str, Rule] | None:
    """The tensor that a pair's weight is a part of in a GGUF model, and the way into it; None where it stands alone.

    Raises:
        MismatchError: the whole has not the parts' size. FormatError: the heads can't be told.
    """
    block, _, kind = pair.weight.rpartition(".")
    whole = "attn_qkv" if kind in _ATTENTION else "ffn_gate_up_exps" if kind in _EXPERTS else None
    tensor = f"{block}.{whole}.weight"
    if whole is None or tensor not in model.infos or f"{pair.weight}.weight" in model.infos:
        return None
    rows, columns = model.infos[tensor].shape[-2:]
    if kind in _EXPERTS:
        first, expected = pair.shape[0] * _EXPERTS.index(kind), 2 * pair.shape[0]
    else:
        heads = model.heads()
        size = pair.shape[0] // (heads.query if kind == "attn_q" else heads.key_value)
        first = size * (0, heads.query, heads.query + heads.key_value)[_ATTENTION.index(kind)]
        expected = size * (heads.query + 2 * heads.key_value)
    if (rows, columns) != (expected, pair.shape[1]):
        raise MismatchError(
            f"is a pair for {list(pair.shape)} as a part of {tensor}, and {model.path} has {[rows, columns]} there: "
            f"the adapter is for another model",
            file=adapter.tensor_file,
            tensor=pair.tensors[0],
        )
    return tensor, Rule(pair.weight, tensor, (RowsOfWhole(first, rows),))

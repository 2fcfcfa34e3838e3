"""What happens to a tensor's values between the two layouts, the same for weights and for LoRA pairs.

A LoRA pair stands for the delta B @ A of a weight (out, in), A (r, in), B (out, r). Whatever moves the rows of
the weight moves the rows of B and leaves A alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard

from converters.errors import FormatError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HeadCounts:
    """The attention heads of one model, which head-wise transforms depend on."""

    query: int
    key_value: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HeadCounts:
        """From config.json; composite models keep theirs in `text_config`.

        Raises:
            FormatError: the counts are missing or no positive numbers.
        """
        inner = config.get("text_config")
        table = inner if isinstance(inner, dict) and "num_attention_heads" in inner else config
        query = table.get("num_attention_heads")
        key_value = table.get("num_key_value_heads")
        if key_value is None:
            key_value = query
        if not _is_count(query) or not _is_count(key_value):
            raise FormatError(f"config.json gives {query!r} attention heads and {key_value!r} key-value heads")
        return cls(query, key_value)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 1 << 20


class Transform(Protocol):
    """A change of layout that can be undone."""

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        """A weight (out, in) or a bias (out,) in the other layout."""

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r) whose product is the transformed delta."""

    def inverse(self) -> Transform:
        """The transform that undoes this one."""


@dataclass(frozen=True)
class PermuteHeads:
    """The order of rows within each head: Hugging Face rotates halves, llama.cpp's llama rotates neighbours.

    A head's rows (x_0..x_{d/2-1}, y_0..y_{d/2-1}) become (x_0, y_0, x_1, y_1, ...); inverted, the reverse.
    """

    heads: Literal["query", "key_value"]
    inverted: bool = False

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        count = heads.query if self.heads == "query" else heads.key_value
        rows, rest = weight.shape[0], weight.shape[1:]
        if rows % (2 * count):
            raise FormatError(f"{rows} rows can't be {count} heads of an even size; is this the right config.json?")
        half = rows // count // 2
        split = (count, half, 2) if self.inverted else (count, 2, half)
        return weight.reshape(*split, *rest).swapaxes(1, 2).reshape(rows, *rest)

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        return a, self.weight(b, heads)

    def inverse(self) -> PermuteHeads:
        return PermuteHeads(self.heads, not self.inverted)

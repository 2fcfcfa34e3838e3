"""What happens to a tensor's values between the two layouts, the same for weights and for LoRA pairs.

A LoRA pair stands for the delta B @ A of a weight (out, in), A (r, in), B (out, r). Whatever moves the rows of
the weight moves the rows of B and leaves A alone. Of a stack of experts every matrix is transformed by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from converters.architectures.heads import HeadCounts
from converters.errors import FormatError

if TYPE_CHECKING:
    import torch


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


@dataclass(frozen=True)
class UngroupHeads:
    """The order of heads in a fused matrix of queries, keys and values.

    Falcon's rows are groups, one for each key-value head: the queries that share it, its key, its value. llama.cpp
    has all queries, then all keys, then all values.
    """

    inverted: bool = False

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        import torch

        rows, rest = weight.shape[0], weight.shape[1:]
        groups, shared = heads.key_value, heads.query // heads.key_value
        if heads.query % groups or rows % (heads.query + 2 * groups):
            raise FormatError(
                f"{rows} rows can't be {heads.query} queries, {groups} keys and {groups} values of one size; is this "
                f"the right config.json?"
            )
        size = rows // (heads.query + 2 * groups)
        if self.inverted:
            parts = torch.split(weight, [heads.query * size, groups * size, groups * size])
            grouped = [part.reshape(groups, -1, *rest) for part in parts]
            return torch.cat(grouped, dim=1).reshape(weight.shape)
        whole = weight.reshape(groups, (shared + 2) * size, *rest)
        parts = torch.split(whole, [shared * size, size, size], dim=1)
        return torch.cat([part.reshape(-1, *rest) for part in parts])

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        return a, self.weight(b, heads)

    def inverse(self) -> UngroupHeads:
        return UngroupHeads(not self.inverted)


@dataclass(frozen=True)
class AddOne:
    """The weight of a norm: Gemma's multiply by 1 + weight, llama.cpp's by what is stored.

    Weights become float32, the type of all norms in GGUF, in which 1 + weight keeps what a 16-bit weight had down to
    2^-24. A delta is the same in both layouts.
    """

    inverted: bool = False

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        return weight.float() + (-1 if self.inverted else 1)

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        return a, b

    def inverse(self) -> AddOne:
        return AddOne(not self.inverted)


@dataclass(frozen=True)
class TakeRows:
    """A part of the rows: what one matrix in a checkpoint and several in GGUF hold, gate and up say.

    Undone, the rows go back to their places and the others are zero, so that the deltas of all parts add up.

    Attributes:
        part: `first` and `second` half, or `even` and `odd` rows.
    """

    part: Literal["first", "second", "even", "odd"]
    inverted: bool = False

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        if self.inverted:
            whole = weight.new_zeros((2 * len(weight), *weight.shape[1:]))
            whole[self._rows(len(whole))] = weight
            return whole
        if len(weight) % 2:
            raise FormatError(f"{len(weight)} rows can't be two parts of one size; is this the right config.json?")
        return weight[self._rows(len(weight))]

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        return a, self.weight(b, heads)

    def inverse(self) -> TakeRows:
        return TakeRows(self.part, not self.inverted)

    def _rows(self, count: int) -> slice:
        if self.part in ("first", "second"):
            return slice(count // 2) if self.part == "first" else slice(count // 2, count)
        return slice(int(self.part == "odd"), count, 2)


@dataclass(frozen=True)
class HeadParts:
    """The keys' or the values' part of every head, as a stack of heads.

    DeepSeek's kv_b_proj (heads * (key + value), latent) has one block of rows for each head. llama.cpp has the values
    as (heads, value, latent) and the keys, which it multiplies from the other side, as (heads, latent, key).
    """

    part: Literal["key", "value"]

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        rows, key = weight.shape[0], heads.latent_key
        if rows % heads.query or not 0 < key < rows // heads.query:
            raise FormatError(
                f"{rows} rows can't be {heads.query} heads with {key} rows of a key each; is this the right "
                f"config.json?"
            )
        split = weight.reshape(heads.query, rows // heads.query, *weight.shape[1:])
        return split[:, :key].transpose(1, 2) if self.part == "key" else split[:, key:]

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("one pair would become one for each head; tables have such modules in without_pairs")

    def inverse(self) -> HeadParts:
        return self  # only pairs are ever brought back


@dataclass(frozen=True)
class StoredTransposed:
    """A weight that a checkpoint stores as (in, out). Pairs are not: they say what is multiplied first."""

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        return weight.T if weight.ndim == 2 else weight

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        return a, b

    def inverse(self) -> StoredTransposed:
        return self


@dataclass(frozen=True)
class SwapFactors:
    """A pair of the transposed delta: (B A).T = A.T B.T. Weights are as they should be."""

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        return weight

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        return b.T, a.T

    def inverse(self) -> SwapFactors:
        return self

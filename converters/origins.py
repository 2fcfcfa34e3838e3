"""The way back from GGUF's layout: which tensors of a checkpoint a GGUF tensor, or one matrix of it, comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.architectures import Architecture, Rule
from converters.names import canonical
from converters.tensors import TensorSource

_MATRIX = 2  # dimensions; a stack of matrices has one more, a vector one less


@dataclass(frozen=True)
class Origin:
    """One tensor of a checkpoint that a GGUF tensor comes from.

    Attributes:
        own: the checkpoint's tensor.
        rule: leads from it, or from each of its matrices, to GGUF.
        expert: which matrix of GGUF's stack it is; None where it is all of the tensor.
        stacked: whether it holds a matrix for every expert itself.
    """

    own: str
    rule: Rule
    expert: int | None
    stacked: bool

    def number(self, expert: int | None) -> int | None:
        """Where a matrix of GGUF's tensor is among the checkpoint's; None if it isn't there."""
        if self.expert not in (None, expert):
            return None
        return (expert or 0) if self.stacked else 0


def origins_in(checkpoint: TensorSource, table: Architecture) -> Mapping[str, list[Origin]]:
    """By GGUF tensor, in the order of the checkpoint's; tensors that GGUF has no place for are in none of them."""
    found: dict[str, list[Origin]] = {}
    for own, info in checkpoint.infos.items():
        for tensor, target in table.tensors_in_gguf(canonical(own)):
            stacked = target.rule.stacked and len(info.shape) > _MATRIX
            found.setdefault(tensor, []).append(Origin(own, target.rule, target.expert, stacked))
    return found

"""What a LoRA adapter is, whatever file it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoraPair:
    """One adapted weight, as headers and configuration describe it.

    The delta of a weight W (out, in) is scaling * B @ A with A (r, in) and B (out, r). For an embedding
    table W (vocabulary, width) it is scaling * (B @ A).T, with A (r, vocabulary) and B (width, r).

    Attributes:
        module: the adapted module's name in the checkpoint's layout, without `.weight`.
        key: the module's name in the adapter's own file.
        tensors: the names of A and B in the adapter's own file.
        rank: r, from the tensors.
        scaling: the true factor of this module, patterns and rsLoRA included.
        shape: the weight's shape (out, in), or (vocabulary, width).
        embedding: whether the weight is an embedding table.
    """

    module: str
    key: str
    tensors: tuple[str, str]
    rank: int
    scaling: float
    shape: tuple[int, int]
    embedding: bool = False


class LoraAdapter(Protocol):
    """An adapter on disk: pairs known from headers, tensors read one pair at a time."""

    @property
    def path(self) -> Path: ...

    @property
    def tensor_file(self) -> Path:
        """The file that holds its tensors, for messages."""

    @property
    def format(self) -> str: ...

    @property
    def nbytes(self) -> int:
        """The size of its tensor file."""

    @property
    def pairs(self) -> Mapping[str, LoraPair]:
        """All pairs by module, in the order of the file's names, numbers counted as numbers."""

    @property
    def lora_alpha(self) -> float:
        """The adapter's global alpha: GGUF keeps one for all pairs."""

    @property
    def base_model_name(self) -> str | None:
        """What the adapter says it was trained on: a repository, a path of its author's, or nothing."""

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        """aLoRA's tokens, empty for an ordinary adapter."""

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r) of one pair, on the CPU, in their stored type."""

    def fingerprint(self) -> str: ...

"""What a LoRA adapter is, whatever file it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from converters.adapters.whole import WholeTensor
from converters.models import Layout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoraPair:
    """One adapted weight, as headers and configuration describe it.

    The delta of a weight W (out, in) is scaling * B @ A with A (r, in) and B (out, r), whichever way round a file
    stores the weight. For an embedding table W (vocabulary, width) it is scaling * (B @ A).T, with A (r, vocabulary)
    and B (width, r).

    Attributes:
        module: the adapted module's name in the adapter's layout, without `.weight`; one expert of a stack is
            named `stack[number]`.
        key: the module's name in the adapter's own file.
        tensors: the names of A and B in the adapter's own file.
        rank: r, from the tensors.
        scaling: the true factor of this module, patterns and rsLoRA included.
        shape: the weight's shape (out, in), or (vocabulary, width).
        embedding: whether the weight is an embedding table.
        expert: which matrix of a stack (experts, out, in) this is about; None for an ordinary weight.
    """

    module: str
    key: str
    tensors: tuple[str, str]
    rank: int
    scaling: float
    shape: tuple[int, int]
    embedding: bool = False
    expert: int | None = None

    @property
    def weight(self) -> str:
        """The adapted tensor's name without `.weight`: the module, or the stack that it is one of."""
        return self.module if self.expert is None else self.module.rpartition("[")[0]


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
    def layout(self) -> Layout:
        """Whose names and row order its pairs have."""

    @property
    def architecture(self) -> str | None:
        """GGUF's name of the architecture it is for; None where its format doesn't say."""

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

    @property
    def peft_config(self) -> bytes | None:
        """The adapter's own adapter_config.json; None where its format has none."""

    @property
    def frozen_tables(self) -> Mapping[str, str]:
        """Tensor names of base weights that were saved along unchanged, by module."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What it holds beside the pairs, and what becomes of that; a sentence each."""

    @property
    def losses(self) -> tuple[str, ...]:
        """What belongs to its update and is not, or not exactly, in its pairs; a sentence each, with the way out."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of the `losses` that are in none of `pairs`, `magnitudes` and `whole`: merging loses them, too."""

    @property
    def whole(self) -> Mapping[str, WholeTensor]:
        """What it holds beside the pairs, by the names that `load_whole` takes: those of its file, and where a table
        makes several tensors of one, of every part.

        Raises:
            FormatError: the first time, where a tensor contradicts the others or the configuration.
            UnsupportedError: likewise, where one is of no type or has no place that is known.
        """

    @property
    def magnitudes(self) -> Mapping[str, str]:
        """DoRA's row lengths, tensor names by module: its pairs alone are not its update. Empty for others."""

    def load_magnitude(self, module: str) -> torch.Tensor:
        """DoRA's lengths for one module: (out,) of the rows of B @ A's weight, or (1, in) of its columns.

        PEFT has one for every column of an embedding table, MLX one for every token; B @ A is the table's transpose.
        """

    def load_whole(self, key: str) -> torch.Tensor:
        """One of `whole`, in the stored type or float32.

        Raises:
            FormatError: values that are not finite.
        """

    def load_frozen_table(self, module: str) -> torch.Tensor:
        """One of `frozen_tables`."""

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r) of one pair, on the CPU, in their stored type."""

    def fingerprint(self) -> str: ...

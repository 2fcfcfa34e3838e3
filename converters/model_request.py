"""What is asked of a model's output, and what every output can tell, whatever form it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from converters.gguf_rounding import StoredError
from converters.model_card import Fact

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, next tensor)."""

KEEP = "keep"


@dataclass(frozen=True)
class ModelRequest:
    """Where a model goes, and how it is stored.

    Attributes:
        out: a file ending in .gguf, or a directory of safetensors.
        outtype: f32, f16, bf16, for GGUF also q8_0 and every quantization that llama.cpp's quantizer knows; None or
            "keep": each tensor keeps its type.
        imatrix: an importance matrix (`converters.imatrix`) for quantizing.
        vocab_from: a GGUF model whose vocabulary is taken as it is.
        split_max_size: bytes that a file may have; larger models are split.
        allow_requantize: whether quantized tensors may be quantized again.
        threads: of the quantizer.
        force: replace what is there.
    """

    out: Path
    outtype: str | None = None
    imatrix: Path | None = None
    vocab_from: Path | None = None
    split_max_size: int | None = None
    allow_requantize: bool = False
    threads: int = 2
    force: bool = False

    @property
    def keeps(self) -> bool:
        """Whether each tensor keeps its type."""
        return self.outtype is None or self.outtype.lower() == KEEP

    @property
    def is_gguf(self) -> bool:
        """Whether GGUF is asked for."""
        return self.out.suffix.lower() == ".gguf"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output.

    Attributes:
        dtype: the type that it will have, or has; of a quantizer's mixture it is known once it is written.
        source_dtype: the type that it is stored in now; None where it is computed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    source_dtype: str | None


class ModelOutput(Protocol):
    """A model that has passed every check that headers allow, and its way into files.

    Attributes:
        target: the file or directory that was asked for.
    """

    target: Path

    @property
    def outtype(self) -> str:
        """What was asked for; "keep" where each tensor keeps its type."""

    @property
    def quantizes(self) -> bool:
        """Whether llama.cpp's quantizer makes it, which does not tell what rounding cost."""

    @property
    def files(self) -> Sequence[Path]:
        """The files of tensors that will be, or were, written; of a split model all shards once it is written."""

    @property
    def tensor_file(self) -> Path:
        """The first of them, by which the model is named."""

    @property
    def tensors(self) -> Sequence[PlannedTensor]:
        """What is written, in order."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a careful reader should know, a sentence each; more of them once it is written."""

    @property
    def losses(self) -> tuple[str, ...]:
        """What of the model is not in the output."""

    def planned_bytes(self) -> int:
        """The size of the output, or somewhat more where only the quantizer knows."""

    def write(
        self, facts: Mapping[str, Fact], *, card: str | None = None, progress: Progress | None = None
    ) -> Mapping[str, StoredError]:
        """Writes the model, whole or not at all.

        Args:
            facts: keys and values that are put into its metadata.
            card: a directory's README.md.

        Returns:
            What rounding cost every tensor that was stored again, by its name in the output; the quantizer doesn't
            tell.

        Raises:
            WriteError: no room. See also `converters.gguf_stream`, `converters.checkpoint_output` and
                `converters.quantizer`.
        """

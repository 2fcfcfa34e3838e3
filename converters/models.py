"""What a model is, whatever files it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from converters.tensors import TensorSource

if TYPE_CHECKING:
    import torch

    from converters.architectures import HeadCounts

Layout = Literal["hugging_face", "gguf"]
"""Whose tensor names and row order a file has."""


@dataclass(frozen=True)
class ModelSizes:
    """What a model says of the sides of its matrices; None where it doesn't, or not in one number.

    Attributes:
        layers: how many.
        width: of the hidden states.
        feed_forward: of the states inside a dense feed-forward network.
        expert: of those inside one expert of a mixture.
        key, value: of a head's queries and keys, and of its values; unknown where both come from one latent vector.
    """

    layers: int | None = None
    width: int | None = None
    feed_forward: int | None = None
    expert: int | None = None
    key: int | None = None
    value: int | None = None


class ModelDescription(Protocol):
    """What an adapter's conversion must know of the model that it is for; no tensors."""

    @property
    def path(self) -> Path:
        """The file or directory that the user named."""

    @property
    def layout(self) -> Layout: ...

    @property
    def architecture(self) -> str:
        """The class that config.json names, or GGUF's `general.architecture`.

        Raises:
            FormatError: it names none.
        """

    @property
    def model_class(self) -> str | None:
        """The class that config.json names, whatever the layout; None where there is no config.json."""

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output matrix is the embedding matrix, so that no tensor of its own exists."""

    @property
    def ties_assumed(self) -> str | None:
        """Why `tied_embeddings` is no more than assumed, and what would tell; None where it is known."""

    @property
    def described_by(self) -> Path:
        """The file that says what the model is: config.json, or the GGUF file itself."""

    @property
    def sources(self) -> tuple[Path, ...]:
        """Every file that it is read from."""

    @property
    def repositories(self) -> tuple[str, ...]:
        """What it says it was published as; unchecked text."""

    @property
    def experts(self) -> int:
        """How many matrices each of its stacks of experts has; 0 where it is dense or doesn't say."""

    @property
    def width(self) -> int | None:
        """The size of its hidden states, where it says."""

    def sizes(self) -> ModelSizes:
        """The sides of its matrices, as far as its configuration or header says."""

    def heads(self) -> HeadCounts:
        """Its attention heads.

        Raises:
            FormatError: it doesn't say, or not in one number.
        """


class Model(ModelDescription, TensorSource, Protocol):
    """A model on disk: headers known, tensors read one at a time, or some of their rows."""

    @property
    def format(self) -> str: ...

    @property
    def nbytes(self) -> int:
        """The size of all its tensor files."""

    def check_type(self, name: str) -> None:
        """Raises UnsupportedError, from the header, for a tensor that can't be read or whose rounding isn't known."""

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, for messages."""

    def stored_name(self, name: str) -> str:
        """What that file calls the tensor, for messages."""

    def fingerprint(self) -> str:
        """See `converters.fingerprint`."""

    def rounding(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, int] | None:
        """Variances of the rounding errors in rows [start, stop) of a quantized tensor: float32 (rows, columns / run)
        and the run of neighbours that each stands for. None where the stored values are the model's own.

        Raises:
            UnsupportedError: a type whose rounding is not known.
        """

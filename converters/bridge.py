"""The way from Hugging Face's layout to GGUF's for one model: an architecture's table and the sizes it depends on."""

from __future__ import annotations

from dataclasses import dataclass

from converters.architectures import Architecture, HeadCounts
from converters.models import ModelDescription


@dataclass(frozen=True)
class Bridge:
    """What `converters.converted_model` and `converters.adapters.converted` cross.

    Attributes:
        heads: of the model, which head-wise transforms depend on.
        experts: matrices in each of its stacks; 0 where the model is dense or doesn't say.
        width: of its hidden states, where it says.
    """

    architecture: Architecture
    heads: HeadCounts
    experts: int
    width: int | None

    @classmethod
    def of(cls, architecture: Architecture, model: ModelDescription) -> Bridge:
        """The way for a model of the architecture.

        Raises:
            FormatError, UnsupportedError: its heads can't be told.
        """
        return cls(architecture, model.heads(), model.experts, model.width)

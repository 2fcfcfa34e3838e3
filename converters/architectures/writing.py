"""What it takes to write a family's models as GGUF, beside its tensors: hyperparameters, generated tensors, vocabulary.

The keys are those of llama.cpp's convert_hf_to_gguf.py, which reads config.json through transformers and so finds what
the file leaves out; the defaults here are transformers' (see `ModelType`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from converters.config_reader import ConfigReader
from converters.gguf_types import Kind

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hyperparameter:
    """One key of a model, without the architecture's name in front.

    Attributes:
        kind: of the value, or of each of its items where it is a tuple.
    """

    key: str
    kind: Kind
    value: int | float | bool | str | tuple[bool, ...]


Keys = Callable[[ConfigReader], Iterable[Hyperparameter]]
Generated = Callable[[ConfigReader], "Mapping[str, torch.Tensor]"]
Losses = Callable[[ConfigReader], Iterable[str]]


def nothing(_: ConfigReader) -> Mapping[str, torch.Tensor]:
    """No generated tensors."""
    return {}


def nothing_lost(_: ConfigReader) -> Iterable[str]:
    """No setting that is left out."""
    return ()


@dataclass(frozen=True)
class ModelType:
    """One `model_type` of config.json.

    Attributes:
        name: as config.json has it.
        classes: those that are of this type, where config.json leaves the type out.
        keys: of a model.
        defaults: what transformers takes for settings that config.json leaves out. Sizes that every file gives have
            none.
        fixed: settings for which llama.cpp has no key, each with the values that it computes with.
        generated: tensors that follow from the settings, float32, by their names in GGUF.
        losses: settings that a model may have and llama.cpp leaves out, a sentence each.
    """

    name: str
    classes: tuple[str, ...]
    keys: Keys
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    generated: Generated = nothing
    losses: Losses = nothing_lost


@dataclass(frozen=True)
class ModelWriting:
    """How an architecture's models are written.

    Attributes:
        types: every `model_type` of its classes.
        vocabularies: which kinds there are, in the order in which they are looked for.
        space_prefix: whether a SentencePiece vocabulary puts a space in front of a text; None: as tokenizer_config.json
            says.
    """

    types: tuple[ModelType, ...]
    vocabularies: tuple[Literal["sentencepiece", "bpe"], ...]
    space_prefix: bool | None = None


def count(key: str, value: int) -> Hyperparameter:
    return Hyperparameter(key, Kind.UINT32, value)


def number(key: str, value: float) -> Hyperparameter:
    return Hyperparameter(key, Kind.FLOAT32, value)

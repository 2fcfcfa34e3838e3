"""A model's hyperparameters and generated tensors for GGUF, by its config.json and its family's entry.

`general.*` and `tokenizer.*` come from elsewhere; here are the keys that begin with the architecture's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.architectures import KNOWN, Architecture
from converters.architectures.hyperparameters import not_expressible
from converters.architectures.writing import Hyperparameter, ModelType, ModelWriting
from converters.config_reader import ConfigReader
from converters.errors import UnsupportedError
from converters.gguf_types import Kind
from converters.model_config import class_of

if TYPE_CHECKING:
    import torch

    from converters.gguf_file import Value


def writing_of(table: Architecture, config: Mapping[str, Any], file: Path) -> ModelWriting:
    """How a model of this configuration is written as GGUF.

    Raises:
        FormatError: config.json names no class.
        UnsupportedError: its family is only known for adapters.
    """
    if table.writing is not None:
        return table.writing
    raise not_converted(class_of(config, file), file)


def not_converted(name: str, file: Path) -> UnsupportedError:
    """The error for models of a class that is not converted here."""
    known = sorted({name for entry in KNOWN if entry.writing is not None for name in entry.classes})
    return UnsupportedError(
        f"models of the class {name} are not converted here yet ({', '.join(known)} are); take llama.cpp's "
        f"convert_hf_to_gguf.py for this first step: everything after it works from its GGUF file",
        file=file,
    )


def model_keys(config: Mapping[str, Any], file: Path, table: Architecture) -> list[tuple[str, Value]]:
    """The keys that begin with the architecture's name, with the types and values of llama.cpp's converter.

    Args:
        config: what config.json holds.
        file: config.json, for messages.

    Raises:
        FormatError: a setting is missing, of a wrong type or out of bounds.
        UnsupportedError: the family is only known for adapters, or the model needs something that GGUF has no key for.
    """
    kind, reader = _reader(config, file, table)
    _expect_fixed(kind, reader)
    return [(f"{table.name}.{key.key}", _value(key)) for key in kind.keys(reader)]


def generated_tensors(config: Mapping[str, Any], file: Path, table: Architecture) -> Mapping[str, torch.Tensor]:
    """Tensors that a GGUF model has and its checkpoint lacks, float32: factors for the frequencies of rotations.

    Raises:
        FormatError, UnsupportedError: as for `model_keys`.
    """
    kind, reader = _reader(config, file, table)
    return kind.generated(reader)


def settings_left_out(config: Mapping[str, Any], file: Path, table: Architecture) -> tuple[str, ...]:
    """What llama.cpp does not compute with though config.json says it, a sentence each.

    Raises:
        FormatError, UnsupportedError: as for `model_keys`.
    """
    kind, reader = _reader(config, file, table)
    return tuple(kind.losses(reader))


def _reader(config: Mapping[str, Any], file: Path, table: Architecture) -> tuple[ModelType, ConfigReader]:
    kind = _type_of(writing_of(table, config, file), config, class_of(config, file))
    return kind, ConfigReader(config, file, kind.defaults)


def _type_of(writing: ModelWriting, config: Mapping[str, Any], named: str) -> ModelType:
    """By `model_type`, as transformers goes; by the class where there is none or one that nobody knows."""
    text = config.get("text_config")
    for name in (table.get("model_type") for table in (text, config) if isinstance(table, dict)):
        for kind in writing.types:
            if kind.name == name:
                return kind
    return next((kind for kind in writing.types if named in kind.classes), writing.types[0])


def _expect_fixed(kind: ModelType, config: ConfigReader) -> None:
    for key, values in kind.fixed.items():
        if config.has(key) and config.find(key) not in values:
            raise not_expressible(config, key, " or ".join(map(repr, values)))


def _value(key: Hyperparameter) -> Value:
    from converters.gguf_file import Value

    if isinstance(key.value, tuple):
        return Value(Kind.ARRAY, key.value, key.kind)
    return Value(key.kind, key.value)

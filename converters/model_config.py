"""What a model's config.json says of it, as far as adapters and layouts depend on that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.architectures import HeadCounts
from converters.errors import FormatError

_LONGEST_CLASS = 200
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_WIDTH = ("hidden_size", "n_embd", "d_model")


def class_of(config: Mapping[str, Any], file: Path) -> str:
    """The class named in config.json, such as LlamaForCausalLM.

    Raises:
        FormatError: config.json names none.
    """
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_CLASS:
        raise FormatError(
            'has no "architectures": ["..."], so nobody can tell how its tensors are laid out; '
            "take config.json from the model's original repository",
            file=file,
        )
    return name


def heads_of(config: Mapping[str, Any], file: Path) -> HeadCounts:
    """The attention heads.

    Raises:
        FormatError: config.json doesn't say.
    """
    try:
        return HeadCounts.from_config(config)
    except FormatError as error:
        raise FormatError(error.message, file=file) from None


def experts_of(config: Mapping[str, Any]) -> int:
    """How many experts each mixture has; 0 where config.json names none, or no sensible number."""
    return _first_count(config, _EXPERTS) or 0


def width_of(config: Mapping[str, Any]) -> int | None:
    """The size of the hidden states; None where config.json doesn't say."""
    return _first_count(config, _WIDTH)


def _first_count(config: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    inner = config.get("text_config")
    for table in (inner, config) if isinstance(inner, dict) else (config,):
        for key in keys:
            value = table.get(key)
            if type(value) is int and 0 < value < 1 << 24:
                return value
    return None


def repositories_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the model was loaded from when it was saved; unchecked text."""
    own = config.get("_name_or_path")
    return (own,) if isinstance(own, str) else ()

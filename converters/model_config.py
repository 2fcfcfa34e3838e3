"""What a model's config.json says of it, as far as adapters and layouts depend on that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.architectures import HeadCounts
from converters.errors import FormatError
from converters.models import ModelSizes

_LONGEST_CLASS = 200
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_MOST_EXPERTS = 4096  # more than any model has
_WIDTH = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_FEED_FORWARD = ("intermediate_size", "ffn_hidden_size")  # the second is Falcon's

# What transformers takes for head_dim where config.json has none, if that is not hidden / heads. Gemma 3's text_config
# leaves it out.
_HEAD_SIZES: Mapping[str, int] = {
    "gemma": 256,
    "gemma2": 256,
    "gemma3_text": 256,
    "glm4": 128,
    "gpt_oss": 64,
    "ministral3": 128,
    "qwen3": 128,
}

# By model_type: what transformers takes for tie_word_embeddings where config.json has none. The outer and the inner
# configuration of Mistral 3 differ in it.
_TIED = frozenset({
    "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "refinedweb", "refinedwebmodel",
    "smollm3",
})  # fmt: skip
_UNTIED = frozenset({
    "deepseek_v2", "deepseek_v3", "glm4", "gpt_oss", "granite", "granitemoe", "granitemoeshared", "llama",
    "ministral3", "mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "stablelm",
})  # fmt: skip


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
    count = _first_count(config, _EXPERTS) or 0
    return count if count <= _MOST_EXPERTS else 0


def width_of(config: Mapping[str, Any]) -> int | None:
    """The size of the hidden states; None where config.json doesn't say."""
    return _first_count(config, _WIDTH)


def sizes_of(config: Mapping[str, Any]) -> ModelSizes:
    """The sides of its matrices, in the names that transformers gives them."""
    head = _head_size(config)
    inner = _first_count(config, _FEED_FORWARD)
    # Classes that count "local" experts have no dense network; the others give their experts' size a name of its own.
    mixture = _first_count(config, ("num_local_experts",)) is not None
    return ModelSizes(
        layers=_first_count(config, _LAYERS),
        width=width_of(config),
        feed_forward=inner,
        expert=_first_count(config, ("moe_intermediate_size",)) or (inner if mixture else None),
        key=head,
        value=head,
    )


def _head_size(config: Mapping[str, Any]) -> int | None:
    """One attention head's; None where queries, keys and values have others, or nothing says."""
    if _first_count(config, ("kv_lora_rank",)) is not None:
        return None
    inner = config.get("text_config")
    kind = (inner if isinstance(inner, dict) else config).get("model_type")
    given = _first_count(config, ("head_dim",)) or _HEAD_SIZES.get(str(kind))
    width = width_of(config)
    if given is not None or width is None:
        return given
    try:
        query = HeadCounts.from_config(config).query
    except FormatError:
        return None
    return None if width % query else width // query


def ties_of(config: Mapping[str, Any]) -> bool | None:
    """Whether the output matrix is the embedding matrix: as config.json says, or as its model_type has it where it says
    nothing; None where nobody knows."""
    inner = config.get("text_config")
    table = inner if isinstance(inner, dict) and inner.get("tie_word_embeddings") is not None else config
    if table.get("tie_word_embeddings") is not None:
        return table["tie_word_embeddings"] is not False
    kind = str(config.get("model_type")).lower()
    return True if kind in _TIED else False if kind in _UNTIED else None


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """How many rows its tables of tokens have; None where config.json doesn't say."""
    return _first_count(config, ("vocab_size",))


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

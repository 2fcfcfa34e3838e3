"""The hyperparameters that families share, by what config.json says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from converters.architectures.writing import Hyperparameter, count, number
from converters.config_reader import ConfigReader, shown
from converters.errors import FormatError, UnsupportedError
from converters.gguf_types import Kind

_MOST_LAYERS = 1 << 12
_MOST_HEADS = 1 << 16
_MOST_EXPERTS = 1 << 12
MOST_HEAD_SIZE = 1 << 16
MOST_POSITIONS = (1 << 31) - 1


def sizes(config: ConfigReader) -> Iterator[Hyperparameter]:
    """What every family writes: counts, widths, and the norms' epsilon."""
    yield count("block_count", layers(config))
    yield count("context_length", config.count("max_position_embeddings", most=MOST_POSITIONS))
    yield count("embedding_length", config.count("hidden_size"))
    yield count("feed_forward_length", config.count("intermediate_size"))
    yield count("attention.head_count", heads(config))
    yield count("attention.head_count_kv", key_value_heads(config))
    yield number("attention.layer_norm_rms_epsilon", config.number("rms_norm_eps", least=0))


def direction(config: ConfigReader) -> Iterator[Hyperparameter]:
    """Whether tokens see those after them, for families whose key upstream writes."""
    if not config.flag("is_causal", default=True):
        yield Hyperparameter("attention.causal", Kind.BOOL, False)


def head_sizes(config: ConfigReader) -> Iterator[Hyperparameter]:
    """The size of keys and values."""
    yield count("attention.key_length", head_size(config))
    yield count("attention.value_length", head_size(config))


def given_head_sizes(config: ConfigReader) -> Iterator[Hyperparameter]:
    """The same, but nothing without head_dim: where transformers' class has no such field."""
    if config.has("head_dim"):
        yield from head_sizes(config)


def vocabulary_size(config: ConfigReader) -> Iterator[Hyperparameter]:
    yield count("vocab_size", config.count("vocab_size"))


def experts(config: ConfigReader, name: str) -> Iterator[Hyperparameter]:
    """How many experts there are, and how many a token uses.

    Args:
        name: the setting that counts them; transformers knows it as num_experts or num_local_experts.
    """
    other = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}[name]
    text = config.config.get("text_config")
    given = text if isinstance(text, dict) else config.config
    number_of_experts = config.count(name if name in given or other not in given else other, most=_MOST_EXPERTS)
    yield count("expert_count", number_of_experts)
    yield count("expert_used_count", config.count("num_experts_per_tok", most=number_of_experts))


def layers(config: ConfigReader) -> int:
    return config.count("num_hidden_layers", most=_MOST_LAYERS)


def heads(config: ConfigReader) -> int:
    return config.count("num_attention_heads", most=_MOST_HEADS)


def key_value_heads(config: ConfigReader) -> int:
    """As many as query heads, where nothing says otherwise."""
    return config.count("num_key_value_heads", most=_MOST_HEADS) if config.has("num_key_value_heads") else heads(config)


def head_size(config: ConfigReader) -> int:
    """Of one attention head: as given, else the width by the heads.

    Raises:
        FormatError: neither says.
    """
    return config.count("head_dim", most=MOST_HEAD_SIZE) if config.has("head_dim") else _divided(config)


def expect_divided_width(config: ConfigReader) -> None:
    """Where llama.cpp takes the width by the heads for the size of a head.

    Raises:
        UnsupportedError: head_dim is another.
    """
    if config.has("head_dim") and config.count("head_dim") != _divided(config):
        raise not_expressible(config, "head_dim", f"hidden_size / num_attention_heads = {_divided(config)}")


def _divided(config: ConfigReader) -> int:
    width, parts = config.count("hidden_size"), heads(config)
    size = width // parts
    if not 0 < size <= MOST_HEAD_SIZE:
        raise FormatError(
            f"hidden_size {width} and {parts} attention heads make heads of {size}, expected 1 to {MOST_HEAD_SIZE}; "
            f"take config.json from the model's original repository",
            file=config.file,
        )
    return size


def expect_list(config: ConfigReader, key: str, expected: Sequence[Any]) -> None:
    """For a list, one item for each layer, that llama.cpp has built in.

    Raises:
        UnsupportedError: config.json has another.
    """
    found = config.find(key)
    if found is None or found == list(expected):
        return
    told = ", ".join(map(str, expected[:8])) + (", ..." if len(expected) > 8 else "")
    raise not_expressible(config, key, f"[{told}] for {len(expected)} layers")


def layer_kinds(config: ConfigReader, period: int) -> list[str]:
    """All layers with a sliding window but every `period`-th, in config.json's words."""
    return ["full_attention" if layer % period == 0 else "sliding_attention" for layer in range(1, layers(config) + 1)]


def not_expressible(config: ConfigReader, key: str, expected: str) -> UnsupportedError:
    """The error for a setting that llama.cpp has no key for."""
    return UnsupportedError(
        f"{config.where}{key} is {shown(config.find(key))}; for this architecture llama.cpp can only compute with "
        f"{expected}, so its output would be another model's. Such a model has to stay in Hugging Face's format",
        file=config.file,
    )

"""OLMo 2 and 3: norms after attention and feed-forward network, and of queries and keys as a whole."""

from collections.abc import Iterator

from converters.architectures.decoder import HEAD_NORMS, POST_NORMS, attention, embeddings, feed_forward, norms
from converters.architectures.hyperparameters import (
    direction,
    expect_divided_width,
    given_head_sizes,
    layer_kinds,
    layers,
    sizes,
)
from converters.architectures.rope import rope_keys, rope_keys_by_layer
from converters.architectures.table import Architecture
from converters.architectures.writing import Hyperparameter, ModelType, ModelWriting, count
from converters.config_reader import ConfigReader
from converters.gguf_types import Kind

_DEFAULTS = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
_SILU = {"hidden_act": ("silu", "swish")}
_KINDS = {"full_attention": False, "sliding_attention": True}


def _shared_keys(config: ConfigReader) -> Iterator[Hyperparameter]:
    expect_divided_width(config)
    yield from sizes(config)
    yield from direction(config)
    yield from given_head_sizes(config)


def _keys2(config: ConfigReader) -> Iterator[Hyperparameter]:
    yield from _shared_keys(config)
    yield from rope_keys(config)


def _keys3(config: ConfigReader) -> Iterator[Hyperparameter]:
    yield from _shared_keys(config)
    yield from rope_keys_by_layer(config, None)
    yield count("attention.sliding_window", config.count("sliding_window"))
    yield Hyperparameter("attention.sliding_window_pattern", Kind.BOOL, _slides(config))


def _slides(config: ConfigReader) -> tuple[bool, ...]:
    """Whether each layer has a sliding window.

    Raises:
        FormatError: layer_types does not say it of every layer.
    """
    kinds = config.find("layer_types")
    if kinds is None:
        kinds = layer_kinds(config, 4)
    number = layers(config)
    if not isinstance(kinds, list) or len(kinds) != number or not all(isinstance(kind, str) for kind in kinds):
        raise config.wrong("layer_types", f"a list of {number} words")
    if not set(kinds) <= _KINDS.keys():
        raise config.wrong("layer_types", f"{' and '.join(_KINDS)} alone")
    return tuple(_KINDS[kind] for kind in kinds)


OLMO2 = Architecture(
    name="olmo2",
    classes=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    rules=(*embeddings(), *attention(), *feed_forward(), *norms({**POST_NORMS, **HEAD_NORMS})),
    writing=ModelWriting(
        types=(
            ModelType("olmo2", ("Olmo2ForCausalLM",), _keys2, _DEFAULTS, _SILU),
            ModelType(
                "olmo3",
                ("Olmo3ForCausalLM",),
                _keys3,
                {**_DEFAULTS, "rope_theta": 500000.0, "sliding_window": 4096},
                _SILU,
            ),
        ),
        vocabularies=("bpe",),
    ),
)

"""Gemma: norms that multiply by 1 + weight, where llama.cpp's multiply by the weight.

Gemma 1 and 2 have no output matrix but the embedding, and llama.cpp has no place for one.
"""

from collections.abc import Iterator

from converters.architectures.decoder import (
    BOTH_NORMS,
    HEAD_NORMS,
    PRE_NORMS,
    attention,
    embeddings,
    feed_forward,
    norms,
)
from converters.architectures.hyperparameters import (
    direction,
    expect_list,
    head_size,
    head_sizes,
    heads,
    layer_kinds,
    layers,
    not_expressible,
    sizes,
)
from converters.architectures.rope import expect_whole_heads, rope, rope_keys_by_layer, scaling_keys
from converters.architectures.table import Architecture
from converters.architectures.transforms import AddOne
from converters.architectures.writing import Hyperparameter, ModelType, ModelWriting, count, number
from converters.config_reader import ConfigReader

_LINEAR = (*attention(), *feed_forward())

_THETA = 10000.0
_DEFAULTS = {"head_dim": 256, "rms_norm_eps": 1e-6}
_DEFAULTS2 = {
    **_DEFAULTS,
    "rope_theta": _THETA,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_DEFAULTS3 = {
    **_DEFAULTS,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GELU = ("gelu", "gelu_pytorch_tanh")  # in its first releases the one meant the other
_FIXED3 = {"hidden_act": _GELU, "hidden_activation": _GELU, "use_bidirectional_attention": (False,)}
_FIXED = {**_FIXED3, "is_causal": (True,)}


def _keys(config: ConfigReader) -> Iterator[Hyperparameter]:
    """Gemma 1's, and those of 2 that are the same."""
    yield from sizes(config)
    yield from head_sizes(config)
    found = rope(config)
    expect_whole_heads(config, found)
    yield from scaling_keys(config, found)
    if found.theta != _THETA:  # which is llama.cpp's default, and upstream writes nothing
        yield number("rope.freq_base", found.theta)


def _keys2(config: ConfigReader) -> Iterator[Hyperparameter]:
    _expect_scalar(config, layers_of_largest=46)
    expect_list(config, "layer_types", layer_kinds(config, 2))
    yield from _keys(config)
    yield number("attn_logit_softcapping", config.number("attn_logit_softcapping"))
    yield number("final_logit_softcapping", config.number("final_logit_softcapping"))
    yield count("attention.sliding_window", config.count("sliding_window"))


def _keys3(config: ConfigReader) -> Iterator[Hyperparameter]:
    _expect_scalar(config, layers_of_largest=62)
    period = config.count("sliding_window_pattern", most=1 << 12) if config.has("sliding_window_pattern") else 6
    expect_list(config, "layer_types", layer_kinds(config, period))
    if config.has("attn_logit_softcapping"):
        raise not_expressible(config, "attn_logit_softcapping", "none")
    yield from sizes(config)
    yield from direction(config)
    yield from head_sizes(config)
    yield from rope_keys_by_layer(config, "rope_local_base_freq")
    if config.find("final_logit_softcapping"):
        yield number("final_logit_softcapping", config.number("final_logit_softcapping"))
    if period == 1:  # no layer has a window
        return
    if period != 6:
        raise not_expressible(config, "sliding_window_pattern", "6 or 1")
    yield count("attention.sliding_window", config.count("sliding_window"))


def _expect_scalar(config: ConfigReader, layers_of_largest: int) -> None:
    """llama.cpp scales attention by the size of a head, and in the largest model by the width for each head."""
    scaled = config.count("hidden_size") // heads(config) if layers(config) == layers_of_largest else head_size(config)
    if config.number("query_pre_attn_scalar") != scaled:
        raise not_expressible(config, "query_pre_attn_scalar", f"{scaled}, by the sizes that it finds")


GEMMA = Architecture(
    name="gemma",
    classes=("GemmaForCausalLM",),
    rules=(*embeddings(head=False), *_LINEAR, *norms(PRE_NORMS, AddOne())),
    writing=ModelWriting(
        types=(
            ModelType(
                "gemma",
                ("GemmaForCausalLM",),
                _keys,
                {**_DEFAULTS, "rope_theta": _THETA, "max_position_embeddings": 8192, "num_key_value_heads": 16},
                _FIXED,
            ),
        ),
        vocabularies=("sentencepiece",),
        space_prefix=False,
    ),
)

GEMMA2 = Architecture(
    name="gemma2",
    classes=("Gemma2ForCausalLM",),
    rules=(*embeddings(head=False), *_LINEAR, *norms(BOTH_NORMS, AddOne())),
    writing=ModelWriting(
        types=(ModelType("gemma2", ("Gemma2ForCausalLM",), _keys2, _DEFAULTS2, _FIXED),),
        vocabularies=("sentencepiece",),
        space_prefix=False,
    ),
)

GEMMA3 = Architecture(
    name="gemma3",
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    rules=(*embeddings(), *_LINEAR, *norms({**BOTH_NORMS, **HEAD_NORMS}, AddOne())),
    composites=("Gemma3ForConditionalGeneration",),
    writing=ModelWriting(
        types=(
            ModelType(
                "gemma3_text",
                ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
                _keys3,
                _DEFAULTS3,
                _FIXED3,
            ),
        ),
        vocabularies=("sentencepiece", "bpe"),
        space_prefix=False,
    ),
)

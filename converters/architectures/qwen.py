"""Qwen 2 (2.5 included) and Qwen 3: Llama's modules in their own row order; Qwen 3 norms queries and keys."""

from collections.abc import Iterator

from converters.architectures.decoder import (
    HEAD_NORMS,
    PRE_NORMS,
    attention,
    embeddings,
    experts,
    feed_forward,
    norms,
    router,
    shared_expert,
)
from converters.architectures.hyperparameters import direction, given_head_sizes, sizes
from converters.architectures.hyperparameters import experts as expert_counts
from converters.architectures.rope import rope_keys
from converters.architectures.table import Architecture, Rule
from converters.architectures.windows import (
    in_every_other_layer,
    in_later_layers,
    window_in_all_where_used,
    window_where_used,
)
from converters.architectures.writing import Hyperparameter, ModelType, ModelWriting, count
from converters.config_reader import ConfigReader

_AROUND = (*embeddings(), *attention(), *norms(PRE_NORMS))
_RULES = (*_AROUND, *feed_forward())
_MLP = "model.layers.{i}.mlp"
# llama.cpp has no dense layers among them, as these models could.
_MIXTURE = (*_AROUND, *experts(_MLP), router(f"{_MLP}.gate"))

_DEFAULTS = {
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_WINDOW_LAYERS = {"max_window_layers": 28}
_SILU = {"hidden_act": ("silu", "swish")}
_ALL_MIXTURES = {**_SILU, "decoder_sparse_step": (1,), "mlp_only_layers": ([],)}


def _keys(config: ConfigReader) -> Iterator[Hyperparameter]:
    yield from sizes(config)
    yield from direction(config)
    yield from given_head_sizes(config)
    yield from rope_keys(config)


def _mixture_keys(config: ConfigReader) -> Iterator[Hyperparameter]:
    yield from _keys(config)
    yield from expert_counts(config, "num_experts")
    yield count("expert_feed_forward_length", config.count("moe_intermediate_size"))
    if config.has("shared_expert_intermediate_size"):
        # Some of Qwen 3's files say 0.
        yield count("expert_shared_feed_forward_length", config.count("shared_expert_intermediate_size", least=0))


def _writing(kind: ModelType) -> ModelWriting:
    return ModelWriting(types=(kind,), vocabularies=("sentencepiece", "bpe"))


QWEN2 = Architecture(
    name="qwen2",
    classes=("Qwen2ForCausalLM",),
    rules=_RULES,
    writing=_writing(
        ModelType(
            "qwen2",
            ("Qwen2ForCausalLM",),
            _keys,
            {**_DEFAULTS, **_WINDOW_LAYERS, "num_key_value_heads": 32},
            _SILU,
            losses=window_where_used(in_later_layers),
        )
    ),
)

QWEN3 = Architecture(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    rules=(*_RULES, *norms(HEAD_NORMS)),
    writing=_writing(
        ModelType(
            "qwen3",
            ("Qwen3ForCausalLM",),
            _keys,
            {**_DEFAULTS, **_WINDOW_LAYERS, "num_key_value_heads": 32, "head_dim": 128},
            _SILU,
            losses=window_where_used(in_later_layers),
        )
    ),
)

QWEN2_MOE = Architecture(
    name="qwen2moe",
    classes=("Qwen2MoeForCausalLM",),
    rules=(
        *_MIXTURE,
        *shared_expert(f"{_MLP}.shared_expert"),
        Rule(f"{_MLP}.shared_expert_gate", "blk.{i}.ffn_gate_inp_shexp"),
    ),
    writing=_writing(
        ModelType(
            "qwen2_moe",
            ("Qwen2MoeForCausalLM",),
            _mixture_keys,
            {
                **_DEFAULTS,
                **_WINDOW_LAYERS,
                "num_key_value_heads": 16,
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "norm_topk_prob": False,
            },
            {**_ALL_MIXTURES, "norm_topk_prob": (False,)},
            losses=window_where_used(in_every_other_layer),
        )
    ),
)

QWEN3_MOE = Architecture(
    name="qwen3moe",
    classes=("Qwen3MoeForCausalLM",),
    rules=(*_MIXTURE, *norms(HEAD_NORMS)),
    writing=_writing(
        ModelType(
            "qwen3_moe",
            ("Qwen3MoeForCausalLM",),
            _mixture_keys,
            {
                **_DEFAULTS,
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
            },
            {**_ALL_MIXTURES, "norm_topk_prob": (True,)},
            losses=window_in_all_where_used,
        )
    ),
)

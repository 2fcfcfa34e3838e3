"""Llama and what kept its modules and its way of rotating heads: Mistral, SmolLM, Granite, most community models."""

from collections.abc import Iterator

from converters.architectures.decoder import (
    PRE_NORMS,
    attention,
    embeddings,
    experts,
    feed_forward,
    norms,
    router,
)
from converters.architectures.hyperparameters import (
    direction,
    expect_divided_width,
    expect_list,
    given_head_sizes,
    head_size,
    head_sizes,
    layers,
    sizes,
    vocabulary_size,
)
from converters.architectures.hyperparameters import experts as expert_counts
from converters.architectures.rope import llama3_factors, rope_keys
from converters.architectures.table import Architecture, Rule
from converters.architectures.transforms import TakeRows
from converters.architectures.windows import in_every_fourth_layer, window_in_all, window_where_used
from converters.architectures.writing import Hyperparameter, ModelType, ModelWriting, count, number
from converters.config_reader import ConfigReader

_AROUND = (*embeddings(), *attention(permuted=True), *norms(PRE_NORMS))
_RULES = (*_AROUND, *feed_forward())
_MOE = "model.layers.{i}.block_sparse_moe"

# transformers 5 calls the mixture mlp in memory, where an adapter's parameters get their names.
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}

_LEAST_SCALE = 1e-9  # llama.cpp takes 0 for "no scale"
_SILU = {"hidden_act": ("silu", "swish")}
_PLAIN = {"vocab_size": 32000, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}


def _keys(config: ConfigReader, *, llama3: bool = False) -> Iterator[Hyperparameter]:
    """What these families share."""
    yield from sizes(config)
    yield from direction(config)
    yield from rope_keys(config, llama3=llama3)
    yield from vocabulary_size(config)
    yield count("rope.dimension_count", head_size(config))


def _llama_keys(config: ConfigReader) -> Iterator[Hyperparameter]:
    yield from _keys(config, llama3=True)
    yield from head_sizes(config)


def _mixtral_keys(config: ConfigReader) -> Iterator[Hyperparameter]:
    yield from _keys(config, llama3=True)
    yield from given_head_sizes(config)
    yield from expert_counts(config, "num_local_experts")


def _smollm3_keys(config: ConfigReader) -> Iterator[Hyperparameter]:
    expect_list(config, "no_rope_layers", [int(layer % 4 != 0) for layer in range(1, layers(config) + 1)])
    yield from _keys(config)
    yield from given_head_sizes(config)


def _granite_keys(config: ConfigReader) -> Iterator[Hyperparameter]:
    expect_divided_width(config)
    yield from _keys(config)
    for name, key in (
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
    ):
        yield number(key, config.number(name, least=_LEAST_SCALE))


LLAMA = Architecture(
    name="llama",
    classes=("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
    rules=(
        *_RULES,
        *experts("model.layers.{i}.mlp", **_MIXTRAL),
        *(rule.only_there() for rule in experts(_MOE, **_MIXTRAL)),
        router("model.layers.{i}.mlp.gate"),
        router(f"{_MOE}.gate", one_way=True),
    ),
    writing=ModelWriting(
        types=(
            ModelType(
                "llama",
                ("LlamaForCausalLM",),
                _llama_keys,
                {**_PLAIN, "max_position_embeddings": 2048},
                _SILU,
                llama3_factors,
            ),
            ModelType(
                "mistral",
                ("MistralForCausalLM",),
                _llama_keys,
                {**_PLAIN, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
                _SILU,
                llama3_factors,
                window_in_all,
            ),
            ModelType(
                "mixtral",
                ("MixtralForCausalLM",),
                _mixtral_keys,
                {
                    **_PLAIN,
                    "rope_theta": 1e6,
                    "rms_norm_eps": 1e-5,
                    "max_position_embeddings": 131072,
                    "num_key_value_heads": 8,
                    "num_local_experts": 8,
                    "num_experts_per_tok": 2,
                },
                _SILU,
                llama3_factors,
                window_in_all,
            ),
        ),
        vocabularies=("sentencepiece", "bpe"),
    ),
)

MISTRAL3 = Architecture(
    name="mistral3",
    classes=("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"),
    rules=_RULES,
    composites=("Mistral3ForConditionalGeneration",),
)

SMOLLM3 = Architecture(
    name="smollm3",
    classes=("SmolLM3ForCausalLM",),
    rules=_RULES,
    writing=ModelWriting(
        types=(
            ModelType(
                "smollm3",
                ("SmolLM3ForCausalLM",),
                _smollm3_keys,
                {
                    "vocab_size": 128256,
                    "rope_theta": 2e6,
                    "rms_norm_eps": 1e-6,
                    "max_position_embeddings": 32768,
                    "num_key_value_heads": 4,
                },
                {**_SILU, "no_rope_layer_interval": (4,)},
                losses=window_where_used(in_every_fourth_layer),
            ),
        ),
        vocabularies=("sentencepiece", "bpe"),
    ),
)

GRANITE = Architecture(
    name="granite",
    classes=("GraniteForCausalLM",),
    rules=_RULES,
    writing=ModelWriting(
        types=(
            ModelType(
                "granite",
                ("GraniteForCausalLM",),
                _granite_keys,
                {
                    **_PLAIN,
                    "max_position_embeddings": 2048,
                    "attention_multiplier": 1.0,
                    "embedding_multiplier": 1.0,
                    "residual_multiplier": 1.0,
                    "logits_scaling": 1.0,
                },
                _SILU,
            ),
        ),
        vocabularies=("sentencepiece", "bpe"),
    ),
)

_SHARED = "model.layers.{i}.shared_mlp"


def _halves(source: str, gate: str, up: str, *, stacked: bool) -> tuple[Rule, ...]:
    """Gate and up of one matrix."""
    return (
        Rule(source, gate, (TakeRows("first"),), one_way=stacked, stacked=stacked),
        Rule(source, up, (TakeRows("second"),), one_way=stacked, stacked=stacked),
    )


GRANITE_MOE = Architecture(
    name="granitemoe",
    classes=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    rules=(
        *_AROUND,
        *experts(_MOE),
        # As checkpoints have them, and as transformers 4 did in memory.
        *_halves(f"{_MOE}.input_linear", "blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps", stacked=True),
        Rule(f"{_MOE}.output_linear", "blk.{i}.ffn_down_exps", one_way=True, stacked=True),
        router(f"{_MOE}.router"),
        router(f"{_MOE}.router.layer", one_way=True),
        *_halves(f"{_SHARED}.input_linear", "blk.{i}.ffn_gate_shexp", "blk.{i}.ffn_up_shexp", stacked=False),
        Rule(f"{_SHARED}.output_linear", "blk.{i}.ffn_down_shexp"),
    ),
)

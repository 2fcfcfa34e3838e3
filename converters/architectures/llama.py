"""Llama and what kept its modules and its way of rotating heads: Mistral, SmolLM, Granite, most community models."""

from converters.architectures.decoder import (
    PRE_NORMS,
    attention,
    embeddings,
    experts,
    feed_forward,
    norms,
    router,
)
from converters.architectures.table import Architecture, Rule
from converters.architectures.transforms import TakeRows

_AROUND = (*embeddings(), *attention(permuted=True), *norms(PRE_NORMS))
_RULES = (*_AROUND, *feed_forward())
_MOE = "model.layers.{i}.block_sparse_moe"

# transformers 5 calls the mixture mlp in memory, where an adapter's parameters get their names.
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}

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
)

MISTRAL3 = Architecture(
    name="mistral3",
    classes=("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"),
    rules=_RULES,
    composites=("Mistral3ForConditionalGeneration",),
)

SMOLLM3 = Architecture(name="smollm3", classes=("SmolLM3ForCausalLM",), rules=_RULES)

GRANITE = Architecture(name="granite", classes=("GraniteForCausalLM",), rules=_RULES)

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

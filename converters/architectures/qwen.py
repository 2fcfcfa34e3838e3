"""Qwen 2 (2.5 included) and Qwen 3: Llama's modules in their own row order; Qwen 3 norms queries and keys."""

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
from converters.architectures.table import Architecture, Rule

_AROUND = (*embeddings(), *attention(), *norms(PRE_NORMS))
_RULES = (*_AROUND, *feed_forward())
_MLP = "model.layers.{i}.mlp"
# llama.cpp has no dense layers among them, as these models could.
_MIXTURE = (*_AROUND, *experts(_MLP), router(f"{_MLP}.gate"))

QWEN2 = Architecture(name="qwen2", classes=("Qwen2ForCausalLM",), rules=_RULES)

QWEN3 = Architecture(name="qwen3", classes=("Qwen3ForCausalLM",), rules=(*_RULES, *norms(HEAD_NORMS)))

QWEN2_MOE = Architecture(
    name="qwen2moe",
    classes=("Qwen2MoeForCausalLM",),
    rules=(
        *_MIXTURE,
        *shared_expert(f"{_MLP}.shared_expert"),
        Rule(f"{_MLP}.shared_expert_gate", "blk.{i}.ffn_gate_inp_shexp"),
    ),
)

QWEN3_MOE = Architecture(name="qwen3moe", classes=("Qwen3MoeForCausalLM",), rules=(*_MIXTURE, *norms(HEAD_NORMS)))

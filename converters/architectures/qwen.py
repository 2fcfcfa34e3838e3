"""Qwen 2 (2.5 included) and Qwen 3: Llama's modules in their own row order; Qwen 3 norms queries and keys."""

from converters.architectures.table import Architecture, Rule, decoder_rules

QWEN2 = Architecture(name="qwen2", classes=("Qwen2ForCausalLM",), rules=decoder_rules())

QWEN3 = Architecture(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    rules=decoder_rules(
        (
            Rule("model.layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm"),
            Rule("model.layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm"),
        )
    ),
)

"""Falcon: names of its own, and queries, keys and values in one matrix, which GGUF orders in another way."""

from converters.architectures.table import Architecture, Rule
from converters.architectures.transforms import UngroupHeads

_LAYER = "transformer.h.{i}."

FALCON = Architecture(
    name="falcon",
    classes=("FalconForCausalLM", "RWForCausalLM"),
    rules=(
        Rule("transformer.word_embeddings", "token_embd"),
        Rule("transformer.ln_f", "output_norm"),
        Rule("lm_head", "output"),
        Rule(_LAYER + "self_attention.query_key_value", "blk.{i}.attn_qkv", (UngroupHeads(),)),
        Rule(_LAYER + "self_attention.dense", "blk.{i}.attn_output"),
        Rule(_LAYER + "mlp.dense_h_to_4h", "blk.{i}.ffn_up"),
        Rule(_LAYER + "mlp.dense_4h_to_h", "blk.{i}.ffn_down"),
        Rule(_LAYER + "input_layernorm", "blk.{i}.attn_norm"),
        # 40B and 180B have two norms side by side in the place of the one.
        Rule(_LAYER + "ln_mlp", "blk.{i}.attn_norm", one_way=True),
        Rule(_LAYER + "ln_attn", "blk.{i}.attn_norm_2"),
    ),
)

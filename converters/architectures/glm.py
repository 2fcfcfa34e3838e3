"""GLM 4 (0414): gate and up in one matrix, norms before and after attention and feed-forward network."""

from converters.architectures.decoder import PRE_NORMS, attention, embeddings, fused_feed_forward, norms
from converters.architectures.table import Architecture

GLM4 = Architecture(
    name="glm4",
    classes=("Glm4ForCausalLM",),
    rules=(
        *embeddings(),
        *attention(),
        *fused_feed_forward(),
        *norms(
            {
                **PRE_NORMS,
                "model.layers.{i}.post_self_attn_layernorm": "blk.{i}.post_attention_norm",
                "model.layers.{i}.post_mlp_layernorm": "blk.{i}.post_ffw_norm",
            }
        ),
    ),
)

"""Phi 3 and 4: queries, keys and values in one matrix, gate and up in another; GGUF keeps both fused."""

from converters.architectures.decoder import PRE_NORMS, embeddings, fused_attention, fused_feed_forward, norms
from converters.architectures.table import Architecture

PHI3 = Architecture(
    name="phi3",
    classes=("Phi3ForCausalLM",),
    rules=(*embeddings(), *fused_attention(), *fused_feed_forward(), *norms(PRE_NORMS)),
)

"""Command R (Cohere, Aya) and its successor: one norm for attention and feed-forward network, no output matrix but
the embedding. The largest Command R models norm queries and keys."""

from converters.architectures.decoder import HEAD_NORMS, attention, embeddings, feed_forward, norms
from converters.architectures.table import Architecture

_RULES = (
    *embeddings(head=False),
    *attention(),
    *feed_forward(),
    *norms({"model.norm": "output_norm", "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm"}),
)

COMMAND_R = Architecture(name="command-r", classes=("CohereForCausalLM",), rules=(*_RULES, *norms(HEAD_NORMS)))

COHERE2 = Architecture(name="cohere2", classes=("Cohere2ForCausalLM",), rules=_RULES)

"""StableLM: Llama's modules in their own row order.

The norms of queries and keys that some models have get no rule: each head's is a tensor, which GGUF stacks into one.
"""

from converters.architectures.decoder import PRE_NORMS, attention, embeddings, feed_forward, norms
from converters.architectures.table import Architecture

STABLELM = Architecture(
    name="stablelm",
    classes=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    rules=(*embeddings(), *attention(), *feed_forward(), *norms(PRE_NORMS)),
)

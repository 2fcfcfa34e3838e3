"""OLMo 2 and 3: norms after attention and feed-forward network, and of queries and keys as a whole."""

from converters.architectures.decoder import HEAD_NORMS, POST_NORMS, attention, embeddings, feed_forward, norms
from converters.architectures.table import Architecture

OLMO2 = Architecture(
    name="olmo2",
    classes=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    rules=(*embeddings(), *attention(), *feed_forward(), *norms({**POST_NORMS, **HEAD_NORMS})),
)

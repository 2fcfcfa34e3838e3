"""Llama and what kept its modules and its way of rotating heads: Mistral, SmolLM, Granite, most community models."""

from converters.architectures.decoder import PRE_NORMS, attention, embeddings, feed_forward, norms
from converters.architectures.table import Architecture

_RULES = (*embeddings(), *attention(permuted=True), *feed_forward(), *norms(PRE_NORMS))

LLAMA = Architecture(name="llama", classes=("LlamaForCausalLM", "MistralForCausalLM"), rules=_RULES)

MISTRAL3 = Architecture(
    name="mistral3",
    classes=("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"),
    rules=_RULES,
    composites=("Mistral3ForConditionalGeneration",),
)

SMOLLM3 = Architecture(name="smollm3", classes=("SmolLM3ForCausalLM",), rules=_RULES)

GRANITE = Architecture(name="granite", classes=("GraniteForCausalLM",), rules=_RULES)

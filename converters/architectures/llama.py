"""Llama and what kept its form: Mistral 7B, SmolLM and most community models of that shape."""

from converters.architectures.table import Architecture, decoder_rules
from converters.architectures.transforms import PermuteHeads

LLAMA = Architecture(
    name="llama",
    classes=("LlamaForCausalLM", "MistralForCausalLM"),
    rules=decoder_rules(query=(PermuteHeads("query"),), key=(PermuteHeads("key_value"),)),
)

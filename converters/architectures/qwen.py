"""Qwen 2 (2.5 included) and Qwen 3: Llama's modules in their own row order; Qwen 3 norms queries and keys."""

from converters.architectures.decoder import HEAD_NORMS, PRE_NORMS, attention, embeddings, feed_forward, norms
from converters.architectures.table import Architecture

_RULES = (*embeddings(), *attention(), *feed_forward(), *norms(PRE_NORMS))

QWEN2 = Architecture(name="qwen2", classes=("Qwen2ForCausalLM",), rules=_RULES)

QWEN3 = Architecture(name="qwen3", classes=("Qwen3ForCausalLM",), rules=(*_RULES, *norms(HEAD_NORMS)))

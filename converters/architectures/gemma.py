"""Gemma: norms that multiply by 1 + weight, where llama.cpp's multiply by the weight.

Gemma 1 and 2 have no output matrix but the embedding, and llama.cpp has no place for one.
"""

from converters.architectures.decoder import (
    BOTH_NORMS,
    HEAD_NORMS,
    PRE_NORMS,
    attention,
    embeddings,
    feed_forward,
    norms,
)
from converters.architectures.table import Architecture
from converters.architectures.transforms import AddOne

_LINEAR = (*attention(), *feed_forward())

GEMMA = Architecture(
    name="gemma",
    classes=("GemmaForCausalLM",),
    rules=(*embeddings(head=False), *_LINEAR, *norms(PRE_NORMS, AddOne())),
)

GEMMA2 = Architecture(
    name="gemma2",
    classes=("Gemma2ForCausalLM",),
    rules=(*embeddings(head=False), *_LINEAR, *norms(BOTH_NORMS, AddOne())),
)

GEMMA3 = Architecture(
    name="gemma3",
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    rules=(*embeddings(), *_LINEAR, *norms({**BOTH_NORMS, **HEAD_NORMS}, AddOne())),
    composites=("Gemma3ForConditionalGeneration",),
)

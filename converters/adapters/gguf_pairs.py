"""The tensors of a GGUF adapter sorted into pairs, from its header alone."""

from __future__ import annotations

from converters.errors import FormatError
from converters.gguf_metadata import GgufHeader, GgufTensor

EMBEDDING = "token_embd.weight"
MAX_EXPERTS = 4096
"""More matrices in one stack than any model has; each becomes a pair of its own where pairs are used."""
MAX_PAIRS = 100_000
"""More than the largest models have matrices, every expert counted."""
_SUFFIXES = (".lora_a", ".lora_b")

Pair = tuple[GgufTensor, GgufTensor]


def adapter_pairs(adapter: GgufHeader) -> tuple[dict[str, Pair], list[str]]:
    """A's and B's header entries by weight, and the norms that llama.cpp passes over.

    Raises:
        FormatError: a tensor is neither, or a half is missing.
    """
    pairs, stray, errors = sort_halves(adapter)
    if errors:
        raise errors[0]
    return pairs, stray


def sort_halves(adapter: GgufHeader) -> tuple[dict[str, Pair], list[str], list[FormatError]]:
    """Like `adapter_pairs`, with an error for every tensor that belongs to no pair instead of the first raised."""
    halves: dict[str, dict[str, GgufTensor]] = {}
    stray, errors = [], []
    for name, tensor in adapter.tensors.items():
        weight, suffix = name[:-7], name[-7:]
        if suffix in _SUFFIXES:
            halves.setdefault(weight, {})[suffix] = tensor
        elif name.endswith("_norm.weight"):
            stray.append(name)
        else:
            told = (
                "is neither half of a pair: a LoRA adapter's tensors end in .lora_a or .lora_b; biases and whole "
                "weights can't be applied"
            )
            errors.append(FormatError(told, file=adapter.path, tensor=name))
    for weight, half in halves.items():
        if len(half) != 2:
            there, missing = _SUFFIXES if _SUFFIXES[0] in half else _SUFFIXES[::-1]
            errors.append(FormatError(f"has no {missing} beside it", file=adapter.path, tensor=f"{weight}{there}"))
    whole = {weight: (half[".lora_a"], half[".lora_b"]) for weight, half in halves.items() if len(half) == 2}
    return whole, stray, errors


def four(shape: tuple[int, ...]) -> tuple[int, ...]:
    """ggml knows no fewer dimensions: the missing ones are 1."""
    return (1,) * (4 - len(shape)) + shape

"""What llama.cpp would reject, die of or ignore in a GGUF adapter, told from headers before llama.cpp is asked.

Its loader throws on some defects and aborts or reads past its buffers on others, and a rejection alone ends
llama-cpp-python in a segmentation fault. Read in llama-adapter.cpp and llama-graph.cpp of llama-cpp-python 0.3.36:

    ordinary weight (out, in)            A (r, in)          B (out, r)
    experts         (E, out, in)         A (E, r, in)       B (E, out, r)
    ...token_embd.weight (vocab, dim)    A (vocab, r)       B (dim, r)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

from converters.adapters.gguf_ignored import ignored
from converters.errors import FormatError, MismatchError, UnsupportedError
from converters.gguf_metadata import GgufHeader, GgufTensor
from converters.gguf_types import Kind

# No matrix product on a CPU: I32 and F64 segfault, the Q8 kinds are for intermediate results.
_NOT_MULTIPLIED = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})
_SUFFIXES = (".lora_a", ".lora_b")
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_NOT_MODELS = ("adapter", "mmproj", "imatrix")

Pair = tuple[GgufTensor, GgufTensor]


def check_model(shards: Sequence[GgufHeader]) -> None:
    """What can be told of a model without llama.cpp.

    Raises:
        FormatError: it is no language model, or doesn't say for which architecture. UnsupportedError: its byte
            order is not this machine's.
    """
    first = shards[0]
    for shard in shards:
        _check_byte_order(shard)
    if not first.text("general.architecture"):
        raise FormatError(
            "names no architecture (general.architecture): no model that llama.cpp loads", file=first.path
        )
    kind = first.value("general.type")
    if kind in _NOT_MODELS:
        raise FormatError(f"holds a thing of type {kind!r} (general.type), expected a language model", file=first.path)


def check_adapter(adapter: GgufHeader, model: Sequence[GgufHeader] = ()) -> tuple[str, ...]:
    """Whether llama.cpp can load and run an adapter on a model.

    Args:
        model: the model's header, or those of all its shards; without it only the adapter itself is checked.

    Returns:
        What llama.cpp would load and then ignore, or apply in a way one might not expect; a sentence each.

    Raises:
        FormatError: it is no sound LoRA adapter, or its experts are not the model's, past whose number llama.cpp
            would read. MismatchError: it does not belong to this model, which llama.cpp finds out, too.
        UnsupportedError: sound, but of a kind that llama.cpp would die of.
    """
    _check_byte_order(adapter)
    notes = _check_metadata(adapter)
    pairs, stray = _pairs(adapter)
    for name, pair in pairs.items():
        _check_types(adapter, pair)
        _check_ranks(adapter, name, pair)
    if model:
        _check_architecture(adapter, model[0])
        weights = {name: tensor for shard in model for name, tensor in shard.tensors.items()}
        for name, pair in pairs.items():
            _check_weight(adapter, name, pair, weights)
    return (*notes, *_ignored(adapter, pairs, stray))


def _check_byte_order(header: GgufHeader) -> None:
    if header.byte_order != sys.byteorder:
        found = f"is stored {header.byte_order}-endian and this machine is {sys.byteorder}-endian"
        raise UnsupportedError(f"{found}; llama.cpp needs it converted (gguf-convert-endian)", file=header.path)


def _check_metadata(adapter: GgufHeader) -> list[str]:
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        found = adapter.text(key)
        if found != expected:
            told = "is missing" if found is None else f"is {found[:80]!r}"
            raise FormatError(f"{key} {told}, expected {expected!r}: no LoRA adapter", file=adapter.path)
    if not adapter.text("general.architecture"):
        raise FormatError("names no architecture (general.architecture)", file=adapter.path)
    return _check_alpha(adapter) + _check_invocation(adapter)


def _check_alpha(adapter: GgufHeader) -> list[str]:
    adapter.expect("adapter.lora.alpha", Kind.FLOAT32)
    alpha = adapter.value("adapter.lora.alpha")
    if not alpha:
        told = "missing" if alpha is None else "0"
        return [f"adapter.lora.alpha is {told}: llama.cpp applies the pairs unscaled, not by alpha / rank"]
    if not math.isfinite(alpha):
        raise FormatError(f"adapter.lora.alpha is {alpha}, expected a number", file=adapter.path)
    return []


def _check_invocation(adapter: GgufHeader) -> list[str]:
    key = "adapter.alora.invocation_tokens"
    adapter.expect(key, Kind.ARRAY)
    if key not in adapter.entries:
        return []
    item = adapter.entries[key].item
    if item is not Kind.UINT32:
        found = "nothing" if item is None else item.name
        raise FormatError(f"{key} is an array of {found}, expected UINT32", file=adapter.path)
    return ["is an activated LoRA: llama-server alone honours its invocation tokens, elsewhere it acts on every token"]


def _pairs(adapter: GgufHeader) -> tuple[dict[str, Pair], list[str]]:
    """A and B by weight, and the norms that llama.cpp passes over."""
    halves: dict[str, dict[str, GgufTensor]] = {}
    stray = []
    for name, tensor in adapter.tensors.items():
        weight, suffix = name[:-7], name[-7:]
        if suffix in _SUFFIXES:
            halves.setdefault(weight, {})[suffix] = tensor
        elif name.endswith("_norm.weight"):
            stray.append(name)
        else:
            raise FormatError(
                "is neither half of a pair: a LoRA adapter's tensors end in .lora_a or .lora_b; biases and whole "
                "weights can't be applied",
                file=adapter.path,
                tensor=name,
            )
    for weight, half in halves.items():
        if len(half) != 2:
            there, missing = _SUFFIXES if _SUFFIXES[0] in half else _SUFFIXES[::-1]
            raise FormatError(f"has no {missing} beside it", file=adapter.path, tensor=f"{weight}{there}")
    return {weight: (half[".lora_a"], half[".lora_b"]) for weight, half in halves.items()}, stray


def _check_types(adapter: GgufHeader, pair: Pair) -> None:
    for tensor in pair:
        if not tensor.known or tensor.dtype in _NOT_MULTIPLIED:
            raise UnsupportedError(
                f"is stored as {tensor.dtype}, which llama.cpp can't multiply; convert the adapter to F32, F16 or Q8_0",
                file=adapter.path,
                tensor=tensor.name,
            )


def _check_ranks(adapter: GgufHeader, name: str, pair: Pair) -> None:
    """That A and B fit each other."""
    a, b = (_four(tensor.shape) for tensor in pair)
    rank_a = a[-1] if name.endswith(_EMBEDDING) else a[-2]
    if rank_a != b[-1] or a[:-2] != b[:-2] or 0 in a or 0 in b:
        found = f"A is {list(pair[0].shape)} and B is {list(pair[1].shape)}"
        order = "(vocabulary, r) and (dim, r)" if name.endswith(_EMBEDDING) else "(r, in) and (out, r)"
        raise FormatError(f"{found}; expected {order} of one rank", file=adapter.path, tensor=name)


def _check_architecture(adapter: GgufHeader, model: GgufHeader) -> None:
    own, expected = (header.text("general.architecture") for header in (adapter, model))
    if own != expected:
        found = f"is an adapter for the architecture {_cut(own)}, the model {model.path} is {_cut(expected)}"
        raise MismatchError(f"{found}; use the model that it was made for", file=adapter.path)


def _check_weight(adapter: GgufHeader, name: str, pair: Pair, weights: Mapping[str, GgufTensor]) -> None:
    weight = weights.get(name)
    if weight is None:
        raise MismatchError(
            f"adapts a weight that the model lacks{_hint(name, weights)}", file=adapter.path, tensor=name
        )
    expected_a, expected_b = _expected(name, weight, rank=_four(pair[1].shape)[-1])
    if (_four(pair[0].shape), _four(pair[1].shape)) != (_four(expected_a), _four(expected_b)):
        found = f"A is {list(pair[0].shape)} and B is {list(pair[1].shape)}"
        need = f"the model's weight {list(weight.shape)} needs {list(expected_a)} and {list(expected_b)}"
        plain = all(len(tensor.shape) <= 2 for tensor in (*pair, weight))
        raise (MismatchError if plain else FormatError)(f"{found}; {need}", file=adapter.path, tensor=name)
    if name == _EMBEDDING and _HEAD not in weights and not ignored(adapter.text("general.architecture"), _HEAD):
        raise UnsupportedError(
            "the model uses its embedding as output head too (tied), where llama.cpp aborts on such a pair; merge "
            "the adapter into the model",
            file=adapter.path,
            tensor=name,
        )


def _expected(name: str, weight: GgufTensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    *outer, out, into = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
    if name.endswith(_EMBEDDING):
        return (*outer, out, rank), (*outer, into, rank)
    return (*outer, rank, into), (*outer, out, rank)


def _hint(name: str, weights: Mapping[str, GgufTensor]) -> str:
    if name == _HEAD:
        return ": its output head is the embedding (tied); merge the adapter into the model"
    prefix, _, part = name.rpartition("attn_")
    if part in ("q.weight", "k.weight", "v.weight") and f"{prefix}attn_qkv.weight" in weights:
        return f": it holds {prefix}attn_qkv.weight, q, k and v in one; merge the adapter, or convert the model unfused"
    prefix, _, part = name.rpartition("ffn_")
    if part == "gate.weight" and f"{prefix}ffn_up.weight" in weights:
        return f": {prefix}ffn_up.weight holds gate and up in one; merge the adapter, or convert the model unfused"
    return "; use the model that it was made for"


def _ignored(adapter: GgufHeader, pairs: Mapping[str, Pair], stray: Sequence[str]) -> list[str]:
    architecture = adapter.text("general.architecture")
    names = [*stray, *(name for name in pairs if ignored(architecture, name))]
    notes = []
    if not pairs:
        notes.append("holds no pairs: it changes nothing")
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(f"llama.cpp loads and ignores {', '.join(names[:3])}{more}; merging the adapter applies them")
    return notes


def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
    """ggml knows no fewer dimensions: the missing ones are 1."""
    return (1,) * (4 - len(shape)) + shape


def _cut(text: str | None) -> str:
    return repr((text or "")[:80])

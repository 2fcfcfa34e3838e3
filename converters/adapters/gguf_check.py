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
from collections.abc import Iterable, Iterator, Mapping, Sequence

from converters.adapters.gguf_ignored import ignored
from converters.adapters.gguf_pairs import EMBEDDING, MAX_EXPERTS, MAX_PAIRS, Pair, adapter_pairs, four, sort_halves
from converters.errors import FormatError, InputError, MismatchError, UnsupportedError
from converters.gguf_metadata import GgufHeader, GgufTensor
from converters.gguf_types import Kind

# No matrix product on a CPU: I32 and F64 segfault, the Q8 kinds are for intermediate results.
NOT_MULTIPLIED = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})
_HEAD = "output.weight"
_STACK = "_exps.weight"
ACTIVATED = "is an activated LoRA: llama-server alone honours its invocation tokens, elsewhere it acts on every token"
_NOT_MODELS = ("adapter", "mmproj", "imatrix")

__all__ = [
    "EMBEDDING",
    "Finding",
    "adapter_findings",
    "adapter_pairs",
    "check_adapter",
    "check_model",
    "four",
    "model_findings",
]

Finding = InputError | str
"""What speaks against a file: the error that refuses it, or a sentence about what llama.cpp makes of it."""


def check_model(shards: Sequence[GgufHeader], *, native: bool = True) -> None:
    """What can be told of a model without llama.cpp: raises the first of `model_findings`.

    Raises:
        FormatError: it is no language model, or doesn't say for which architecture. UnsupportedError: its byte
            order is not this machine's.
    """
    _first_raised(model_findings(shards, native=native))


def model_findings(shards: Sequence[GgufHeader], *, native: bool = True) -> Iterator[Finding]:
    """Everything that can be told of a model without llama.cpp, found while it is asked for.

    Args:
        native: whether it must have this machine's byte order, as llama.cpp needs it.
    """
    first = shards[0]
    for shard in shards if native else ():
        yield from _check_byte_order(shard)
    yield from _check_architecture_named(first, ": no model that llama.cpp loads")
    kind = _text(first, "general.type")
    if kind in _NOT_MODELS:
        yield FormatError(f"holds a thing of type {kind!r} (general.type), expected a language model", file=first.path)


def check_adapter(adapter: GgufHeader, model: Sequence[GgufHeader] = (), *, native: bool = True) -> tuple[str, ...]:
    """Whether llama.cpp can load and run an adapter on a model: raises the first error of `adapter_findings`.

    Returns:
        What llama.cpp would load and then ignore, or apply in a way one might not expect; a sentence each.

    Raises:
        FormatError: it is no sound LoRA adapter, or its experts are not the model's, past whose number llama.cpp
            would read. MismatchError: it does not belong to this model, which llama.cpp finds out, too.
        UnsupportedError: sound, but of a kind that llama.cpp would die of.
    """
    return _first_raised(adapter_findings(adapter, model, native=native))


def adapter_findings(
    adapter: GgufHeader, model: Sequence[GgufHeader] = (), *, native: bool = True
) -> Iterator[Finding]:
    """Everything that speaks against an adapter, alone or on a model, found while it is asked for.

    Args:
        model: the model's header, or those of all its shards; without it only the adapter itself is checked.
        native: see `model_findings`.
    """
    if native:
        yield from _check_byte_order(adapter)
    yield from _check_metadata(adapter)
    pairs, stray, errors = sort_halves(adapter)
    yield from errors
    total = sum(math.prod(four(a.shape)[:2]) for a, _ in pairs.values())
    if total > MAX_PAIRS:
        told = f"claims {total} pairs, every expert of a stack counted; at most {MAX_PAIRS} are read"
        yield FormatError(told, file=adapter.path)
    sound = {}
    for name, pair in pairs.items():
        faults = [*_check_types(adapter, pair), *_check_ranks(adapter, name, pair)]
        yield from faults
        if not faults:
            sound[name] = pair
    if model:
        yield from _check_architecture(adapter, model[0])
        weights = {name: tensor for shard in model for name, tensor in shard.tensors.items()}
        for name, pair in sound.items():
            yield from _check_weight(adapter, name, pair, weights)
    yield from _ignored(adapter, pairs, stray)


def _first_raised(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The notes among findings, of which none may be an error."""
    notes = []
    for finding in findings:
        if isinstance(finding, InputError):
            raise finding
        notes.append(finding)
    return tuple(notes)


def _check_byte_order(header: GgufHeader) -> Iterator[Finding]:
    if header.byte_order != sys.byteorder:
        found = f"is stored {header.byte_order}-endian and this machine is {sys.byteorder}-endian"
        yield UnsupportedError(f"{found}; llama.cpp needs it converted (gguf-convert-endian)", file=header.path)


def _text(header: GgufHeader, key: str) -> str | FormatError | None:
    """A value that must be a string, or what is wrong with it."""
    try:
        return header.text(key)
    except FormatError as error:
        return error


def _check_architecture_named(header: GgufHeader, so: str = "") -> Iterator[Finding]:
    found = _text(header, "general.architecture")
    if isinstance(found, FormatError):
        yield found
    elif not found:
        yield FormatError(f"names no architecture (general.architecture){so}", file=header.path)


def _check_metadata(adapter: GgufHeader) -> Iterator[Finding]:
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        found = _text(adapter, key)
        if isinstance(found, FormatError):
            yield found
        elif found != expected:
            told = "is missing" if found is None else f"is {found[:80]!r}"
            yield FormatError(f"{key} {told}, expected {expected!r}: no LoRA adapter", file=adapter.path)
    yield from _check_architecture_named(adapter)
    yield from _check_alpha(adapter)
    yield from _check_invocation(adapter)


def _check_kind(adapter: GgufHeader, key: str, kind: Kind) -> Iterator[Finding]:
    try:
        adapter.expect(key, kind)
    except FormatError as error:
        yield error


def _check_alpha(adapter: GgufHeader) -> Iterator[Finding]:
    key = "adapter.lora.alpha"
    if adapter.kind_of(key) not in (None, Kind.FLOAT32):
        yield from _check_kind(adapter, key, Kind.FLOAT32)
        return
    alpha = adapter.value(key)
    if not alpha:
        told = "missing" if alpha is None else "0"
        yield f"{key} is {told}: llama.cpp applies the pairs unscaled, not by alpha / rank"
    elif not math.isfinite(alpha):
        yield FormatError(f"{key} is {alpha}, expected a number", file=adapter.path)


def _check_invocation(adapter: GgufHeader) -> Iterator[Finding]:
    key = "adapter.alora.invocation_tokens"
    yield from _check_kind(adapter, key, Kind.ARRAY)
    if adapter.kind_of(key) is not Kind.ARRAY:
        return
    item = adapter.entries[key].item
    if item is not Kind.UINT32:
        found = "nothing" if item is None else item.name
        yield FormatError(f"{key} is an array of {found}, expected UINT32", file=adapter.path)
        return
    yield ACTIVATED


def _check_types(adapter: GgufHeader, pair: Pair) -> Iterator[Finding]:
    for tensor in pair:
        if not tensor.known or tensor.dtype in NOT_MULTIPLIED:
            yield UnsupportedError(
                f"is stored as {tensor.dtype}, which llama.cpp can't multiply; convert the adapter to F32, F16 or Q8_0",
                file=adapter.path,
                tensor=tensor.name,
            )


def _check_ranks(adapter: GgufHeader, name: str, pair: Pair) -> Iterator[Finding]:
    """That A and B fit each other."""
    a, b = (four(tensor.shape) for tensor in pair)
    rank_a = a[-1] if name.endswith(EMBEDDING) else a[-2]
    if rank_a != b[-1] or a[:-2] != b[:-2] or 0 in a or 0 in b:
        found = f"A is {list(pair[0].shape)} and B is {list(pair[1].shape)}"
        order = "(vocabulary, r) and (dim, r)" if name.endswith(EMBEDDING) else "(r, in) and (out, r)"
        yield FormatError(f"{found}; expected {order} of one rank", file=adapter.path, tensor=name)
    if name.endswith(_STACK) and len(pair[0].shape) < 3:
        told = (
            f"A is {list(pair[0].shape)}, and a stack of experts needs (experts, r, in): llama.cpp would read past it"
        )
        yield FormatError(told, file=adapter.path, tensor=name)
    experts = math.prod(a[:-2])
    if experts > MAX_EXPERTS:
        told = f"claims {experts} experts; at most {MAX_EXPERTS} are read"
        yield FormatError(told, file=adapter.path, tensor=pair[0].name)


def _check_architecture(adapter: GgufHeader, model: GgufHeader) -> Iterator[Finding]:
    own, expected = (_text(header, "general.architecture") for header in (adapter, model))
    if isinstance(expected, FormatError):
        yield expected
    elif own != expected and not isinstance(own, FormatError):  # which is found already
        found = f"is an adapter for the architecture {_cut(own)}, the model {model.path} is {_cut(expected)}"
        yield MismatchError(f"{found}; use the model that it was made for", file=adapter.path)


def _check_weight(adapter: GgufHeader, name: str, pair: Pair, weights: Mapping[str, GgufTensor]) -> Iterator[Finding]:
    weight = weights.get(name)
    if weight is None:
        told = f"adapts a weight that the model lacks{_hint(name, weights)}"
        yield MismatchError(told, file=adapter.path, tensor=name)
        return
    expected_a, expected_b = _expected(name, weight, rank=four(pair[1].shape)[-1])
    if (four(pair[0].shape), four(pair[1].shape)) != (four(expected_a), four(expected_b)):
        found = f"A is {list(pair[0].shape)} and B is {list(pair[1].shape)}"
        need = f"the model's weight {list(weight.shape)} needs {list(expected_a)} and {list(expected_b)}"
        plain = all(len(tensor.shape) <= 2 for tensor in (*pair, weight))
        yield (MismatchError if plain else FormatError)(f"{found}; {need}", file=adapter.path, tensor=name)
    elif name == EMBEDDING and _HEAD not in weights and not ignored(_architecture(adapter), _HEAD):
        yield UnsupportedError(
            "the model uses its embedding as output head too (tied), where llama.cpp aborts on such a pair; merge "
            "the adapter into the model",
            file=adapter.path,
            tensor=name,
        )


def _architecture(adapter: GgufHeader) -> str | None:
    found = _text(adapter, "general.architecture")
    return None if isinstance(found, FormatError) else found


def _expected(name: str, weight: GgufTensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    *outer, out, into = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
    if name.endswith(EMBEDDING):
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


def _ignored(adapter: GgufHeader, pairs: Mapping[str, Pair], stray: Sequence[str]) -> Iterator[Finding]:
    architecture = _architecture(adapter)
    names = [*stray, *(name for name in pairs if ignored(architecture, name))]
    if not pairs:
        yield "holds no pairs: it changes nothing"
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"llama.cpp loads and ignores {', '.join(names[:3])}{more}; merging the adapter applies them"


def _cut(text: str | None) -> str:
    return repr((text or "")[:80])

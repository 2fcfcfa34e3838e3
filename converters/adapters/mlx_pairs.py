"""The tensors of an MLX adapter sorted into pairs, from its header alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from converters.adapters.gguf_pairs import MAX_EXPERTS, MAX_PAIRS
from converters.adapters.lora import LoraPair
from converters.errors import FormatError, UnsupportedError
from converters.names import canonical, natural_order
from converters.safetensors_file import SafetensorsFile

MERGE = "merge it into its model with mlx_lm.fuse"

_HALF = re.compile(r"(.+)\.lora_([ab])")
_MAGNITUDE = re.compile(r"(.+)\.m")
_EMBEDDINGS = {
    "embed_tokens", "embed_tokens_per_layer", "wte", "wpe", "word_embeddings", "tok_embeddings", "token_embeddings",
    "embed_in", "embed", "embedding", "embeddings",
}  # fmt: skip
"""What mlx-lm's models call their nn.Embedding; nothing in the file says which pairs belong to one."""

Halves = tuple[str, str]
"""The names of lora_a and lora_b."""


def mlx_pairs(file: SafetensorsFile, scaling: float, rank: int | None, *, dora: bool) -> dict[str, LoraPair]:
    """All pairs by module, in natural order; every expert of a stack is one of its own, `stack[number]`.

    Args:
        scaling: the true factor of them all.
        rank: what the configuration says of them all, or None.
        dora: pass over magnitudes, which `mlx_magnitudes` reads.

    Raises:
        FormatError: half a pair, two pairs for one module, none at all, or shapes that make no pair.
        UnsupportedError: a tensor that belongs to no pair, or is stored as integers.
    """
    halves = _halves(file, dora=dora)
    total = 0
    for a, b in halves.values():
        total += _experts(file, a, b) or 1
        if total > MAX_PAIRS:
            told = f"claims more than {MAX_PAIRS} pairs, every expert of a stack counted; no more are read"
            raise FormatError(told, file=file.path, tensor=b)
    found = (pair for module, names in halves.items() for pair in _pairs(file, module, names, scaling))
    pairs = {pair.module: pair for pair in found}
    for pair in pairs.values():
        if rank not in (None, pair.rank):
            told = f"has rank {pair.rank}, and adapter_config.json says {rank}: they do not belong together"
            raise FormatError(told, file=file.path, tensor=pair.tensors[0])
    return {module: pairs[module] for module in sorted(pairs, key=natural_order)}


def mlx_magnitudes(file: SafetensorsFile, pairs: Mapping[str, LoraPair]) -> dict[str, str]:
    """DoRA's tensors by module: one length for each row of the weight, each token of an embedding.

    Raises:
        FormatError: a module has none, another number of them, or there is no such module.
        UnsupportedError: they are stored as integers.
    """
    found = {canonical(match[1]): key for key in file.infos if (match := _MAGNITUDE.fullmatch(key))}
    for module, pair in pairs.items():
        if module not in found:
            told = f"has no magnitudes ({pair.key}.m) beside it, and the adapter is DoRA: the file is incomplete"
            raise FormatError(told, file=file.path, tensor=pair.tensors[0])
        shape = file.infos[found[module]].shape
        if shape != pair.shape[:1]:
            told = f"has the shape {list(shape)}, expected one value for each of {pair.shape[0]} rows"
            raise FormatError(told, file=file.path, tensor=found[module])
        file.check_type(found[module])
    stray = sorted(found.keys() - pairs.keys())
    if stray:
        raise FormatError("has magnitudes and no pair", file=file.path, tensor=found[stray[0]])
    return found


def _pairs(file: SafetensorsFile, module: str, names: Halves, scaling: float) -> Iterator[LoraPair]:
    """A module's pair, or those of its experts."""
    a, b = names
    experts = _experts(file, a, b)
    rank, shape = _matrices(file, a, b) if experts is None else _stacks(file, a, b)
    for name in names:
        file.check_type(name)
    plain = canonical(module)
    embedding = experts is None and module.rpartition(".")[2] in _EMBEDDINGS
    shape = shape[::-1] if embedding else shape
    for expert in [None] if experts is None else range(experts):
        own = plain if expert is None else f"{plain}[{expert}]"
        yield LoraPair(own, module, names, rank, scaling, shape, embedding, expert)


def _experts(file: SafetensorsFile, a: str, b: str) -> int | None:
    """How many matrices a stack has; None for an ordinary pair. lora_b has always told the two apart."""
    shape = file.infos[b].shape
    if len(shape) != 3:
        return None
    if shape[0] > MAX_EXPERTS:
        told = f"claims {shape[0]} experts; at most {MAX_EXPERTS} are read"
        raise FormatError(told, file=file.path, tensor=b)
    return shape[0]


def _matrices(file: SafetensorsFile, a: str, b: str) -> tuple[int, tuple[int, int]]:
    """r and (out, in) of lora_a (in, r) and lora_b (r, out)."""
    shapes = file.infos[a].shape, file.infos[b].shape
    for name, shape in zip((a, b), shapes, strict=True):
        if len(shape) != 2 or 0 in shape:
            raise FormatError(f"has the shape {list(shape)}, expected a matrix", file=file.path, tensor=name)
    (into, rank), (rank_b, out) = shapes
    if rank != rank_b:
        raise FormatError(f"lora_a has rank {rank}, lora_b has rank {rank_b}", file=file.path, tensor=b)
    return rank, (out, into)


def _stacks(file: SafetensorsFile, a: str, b: str) -> tuple[int, tuple[int, int]]:
    """r and (out, in) of lora_a (experts, r, in) and lora_b (experts, out, r).

    Up to mlx-lm 0.19 lora_a was (experts * r, in), one expert after the other: the same bytes.
    """
    experts, out, rank = file.infos[b].shape
    shape = file.infos[a].shape
    if 0 in (experts, out, rank, *shape) or shape[:-1] not in ((experts, rank), (experts * rank,)):
        told = f"has the shape {list(shape)} beside a lora_b of {[experts, out, rank]}, which is (experts, out, r): "
        told += "expected (experts, r, in)"
        raise FormatError(told, file=file.path, tensor=a)
    return rank, (out, shape[-1])


def _halves(file: SafetensorsFile, *, dora: bool) -> dict[str, Halves]:
    """The names of lora_a and lora_b by module, as the file calls it."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key in file.infos:
        if dora and _MAGNITUDE.fullmatch(key):
            continue
        match = _HALF.fullmatch(key)
        if match is None:
            raise _foreign_tensor(key, file)
        found[match[1]][match[2]] = key
    if not found:
        raise FormatError("holds no LoRA pairs", file=file.path)
    seen: set[str] = set()
    for module, halves in found.items():
        if len(halves) < 2:
            ((half, key),) = halves.items()
            missing = f"has a lora_{half} but no lora_{'b' if half == 'a' else 'a'}: the file is incomplete"
            raise FormatError(missing, file=file.path, tensor=key)
        if canonical(module) in seen:
            raise FormatError("two pairs for one module", file=file.path, tensor=halves["b"])
        seen.add(canonical(module))
    return {module: (halves["a"], halves["b"]) for module, halves in found.items()}


def _foreign_tensor(key: str, file: SafetensorsFile) -> UnsupportedError:
    if key.endswith(".m"):
        what = f"holds DoRA magnitudes, which only an adapter with fine_tune_type dora has; {MERGE}"
    elif ".lora_" in key:
        what = "belongs to no plain pair of lora_a and lora_b and can't be expressed"
    else:
        what = f"is a whole tensor trained beside the pairs: {MERGE}"
    return UnsupportedError(what, file=file.path, tensor=key)

"""GGUF files that lie: every count, length, size and offset, and adapters that contradict themselves or their model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf_bytes import ARRAY, I32, Q8_0, STRING, UINT8, UINT32, Packer, Tensor, adapter_keys
from hostile_files import ADAPTER_TENSORS, EXPERTS, MODEL_TENSORS, Case, P, Q, changed_keys, gguf, of_bytes
from hostile_files import pair as pair_of

BOTH, MODEL, ADAPTER = ("model", "adapter"), ("model",), ("adapter",)
Make = Callable[[Path, str], Path]
FIRST_SHARD = "x-00001-of-04000.gguf"


def key(value: bytes, name: str | bytes = "k") -> Make:
    return of_bytes(lambda role: gguf(role, [(name, value)]))


def first(**fields: Any) -> Make:
    """The sound tensors, the first one changed and without its data."""

    def make(role: str) -> bytes:
        own = ADAPTER_TENSORS if role == "adapter" else MODEL_TENSORS
        return gguf(role, tensors=[replace(own[0], nbytes=own[0].size, **fields), *own[1:]])

    return of_bytes(make)


def counts(**fields: int) -> Make:
    return of_bytes(lambda role: gguf(role, **fields))


def cut(share: float) -> Make:
    return of_bytes(lambda role: gguf(role)[: int(len(gguf(role)) * share)])


def keys(**changed: bytes | None) -> Make:
    return of_bytes(lambda role: changed_keys(role, **changed))


def pairs(*tensors: Tensor) -> Make:
    return of_bytes(lambda role: gguf(role, tensors=tensors))


def shard(**values: bytes) -> Make:
    def write(directory: Path, role: str) -> Path:
        made = [(f"split.{name}", value) for name, value in values.items()]
        (directory / FIRST_SHARD).write_bytes(gguf(role, made))
        return directory / FIRST_SHARD

    return write


def retyped(qtype: int) -> Make:
    """A model whose adapted weight is of another type."""

    def make(role: str) -> bytes:
        own = [
            replace(tensor, qtype=qtype, nbytes=tensor.size) if tensor.name == Q else tensor for tensor in MODEL_TENSORS
        ]
        return gguf(role, tensors=own)

    return of_bytes(make)


def many_stacks(directory: Path, role: str) -> Path:
    """4096 experts, 100 times; the data are a hole."""
    tensors = [
        half for number in range(100) for half in pair_of(f"blk.{number}.x_exps.weight", (4096, 1, 1), (4096, 1, 1))
    ]
    header = P.file(adapter_keys(), [replace(half, offset=16384 * at, nbytes=0) for at, half in enumerate(tensors)])
    return of_bytes(lambda _: header, len(header) + 16384 * len(tensors))(directory, role)


def large_strings(count: int) -> bytes:
    return P.array(STRING, [P.string("") * count], count)


def escapes(role: str) -> bytes:
    """A tensor whose name would clear the screen, set a title and be markup; the file is sound otherwise."""
    own = ADAPTER_TENSORS if role == "adapter" else MODEL_TENSORS
    return gguf(role, tensors=[*own, Tensor("\x1b[2J\x1b]0;x\x07[red]\nb\u202e", (32,))])


GGUF = {
    "array of 2^40": Case(key(P.array(UINT8, [], 1 << 40)), BOTH, "1099511627776 items"),
    "strings 2^40": Case(key(P.array(STRING, [], 1 << 40)), BOTH, "1099511627776 strings"),
    "array of 2^64 - 1": Case(key(P.array(UINT32, [], (1 << 64) - 1)), BOTH, "past the file"),
    "array wrapping to 4 bytes": Case(key(P.array(UINT32, [bytes(4)], (1 << 62) + 1)), BOTH, "past the file"),
    "nested arrays": Case(key(P.array(ARRAY, [P.array(UINT8, [b"x"])[4:]])), BOTH, "array of arrays"),
    "arrays nested 10,000 deep": Case(key(P.u32(ARRAY) + (P.u32(ARRAY) + P.u64(1)) * 10_000), BOTH, "array of arrays"),
    "string of 2^63": Case(key(P.text("x", 1 << 63)), BOTH, "past the file"),
    "string of 2^64 - 1": Case(key(P.text("x", (1 << 64) - 1)), BOTH, "past the file"),
    "2^63 in an array": Case(key(P.array(STRING, [P.string("x", 1 << 63)])), BOTH, "past the file"),
    "2^60 keys": Case(counts(key_count=1 << 60), BOTH, "claims 1152921504606846976 keys"),
    "2^60 tensors": Case(counts(tensor_count=1 << 60), BOTH, "claims 1152921504606846976 tensors"),
    "8000 keys of 4": Case(counts(key_count=8000), BOTH, "past the file|value type|bytes long"),
    "30,000 tensors of 5": Case(counts(tensor_count=30_000), BOTH, "past the file"),
    "value type 13": Case(key(P.u32(13) + bytes(8)), BOTH, "value type 13"),
    "key twice": Case(key(P.text("llama"), "general.architecture"), BOTH, "twice"),
    "key that is no text": Case(key(P.uint32(1), b"\xff\xfe"), BOTH, "UTF-8"),
    "key of 2000 bytes": Case(key(P.uint32(1), "k" * 2000), BOTH, "2000 bytes long"),
    "tensor twice": Case(first(name=Q), MODEL, "stands twice"),
    "half twice": Case(first(name=f"{Q}.lora_b"), ADAPTER, "stands twice"),
    "dimension 2^63": Case(first(shape=(1 << 63,)), BOTH, "overflows"),
    "product 2^64": Case(first(shape=(1 << 32, 1 << 32)), BOTH, "overflows"),
    "product 2^64 + 32": Case(first(shape=(274177, 67280421310721)), BOTH, "overflows"),  # their product is 2^64 + 1
    "product 2^65 of four": Case(first(shape=(1 << 16, 1 << 16, 1 << 16, 1 << 17)), BOTH, "overflows"),
    "bytes 2^64": Case(first(shape=(1 << 62,)), BOTH, "truncated|begins at"),
    "overflow behind a 0": Case(first(shape=(1 << 40, 0, 1 << 40)), BOTH, "overflows"),
    "larger than the file": Case(first(shape=(1 << 20, 1 << 20)), BOTH, "truncated|begins at"),
    "five dimensions": Case(first(shape=(1, 1, 1, 1, 32)), BOTH, "5 dimensions"),
    "2^32 - 1 dimensions": Case(first(dimensions=2**32 - 1), BOTH, "4294967295 dimensions"),
    "half a block": Case(first(shape=(2, 16), qtype=Q8_0), BOTH, "no whole blocks"),
    "offset past the end": Case(first(offset=1 << 40), BOTH, "begins at 1099511627776"),
    "offset 2^64 - 32": Case(first(offset=2**64 - 32), BOTH, "begins at"),
    "unaligned offset": Case(first(offset=4), BOTH, "begins at 4"),
    "tensors that overlap": Case(
        of_bytes(lambda role: gguf(role, tensors=[Tensor("a", (64,)), Tensor("b", (64,), offset=32)])), BOTH, "begins"
    ),
    "a hole between tensors": Case(
        of_bytes(lambda role: gguf(role, tensors=[Tensor("a", (64,)), Tensor("b", (64,), offset=512)])), BOTH, "begins"
    ),
    "name of 64 bytes": Case(first(name="n" * 64), BOTH, "64 bytes long"),
    "name of 2^63": Case(first(name_length=1 << 63), BOTH, "bytes long"),
    "name that is no text": Case(first(name=b"\xc3\x28"), BOTH, "UTF-8"),
    "name with a zero": Case(first(name="a\0b"), BOTH, "zero byte"),
    "data cut": Case(cut(0.8), BOTH, "truncated"),
    "header cut": Case(of_bytes(lambda role: gguf(role)[:150]), BOTH, "truncated"),
    "magic alone": Case(of_bytes(lambda _: b"GGUF"), BOTH, "at least 24"),
    "version 1": Case(counts(version=1), BOTH, "version 1"),
    "version 2^31": Case(counts(version=1 << 31), BOTH, "version"),
    "alignment 0": Case(key(P.uint32(0), "general.alignment"), BOTH, "alignment is 0"),
    "alignment 48": Case(key(P.uint32(48), "general.alignment"), BOTH, "alignment is 48"),
    "alignment 2^31": Case(key(P.uint32(1 << 31), "general.alignment"), BOTH, "truncated|begins at"),
    "alignment as text": Case(key(P.text("32"), "general.alignment"), BOTH, "stored as STRING"),
    "architecture missing": Case(keys(general_architecture=None), BOTH, "names no architecture", sound=True),
    "architecture as number": Case(keys(general_architecture=P.uint32(1)), BOTH, "stored as UINT32", sound=True),
    "architecture of 20 MB": Case(
        keys(general_architecture=P.text("x" * (20 << 20))), BOTH, "architecture", sound=True
    ),
    "architecture of 15 MB": Case(
        keys(general_architecture=P.text("\n" * (15 << 20))), BOTH, "architecture", sound=True
    ),
    "architecture of a million strings": Case(
        keys(general_architecture=large_strings(10**6)), BOTH, "stored as ARRAY", sound=True
    ),
    "type as number": Case(keys(general_type=P.uint32(1)), ADAPTER, "stored as UINT32", sound=True),
    "header of 64 MB of strings": Case(
        of_bytes(
            lambda role: gguf(role, [("a", large_strings(10**6)), ("b", P.array(UINT8, [bytes(60 << 20)], 60 << 20))])
        ),
        BOTH,
        "header longer",
    ),
    "1.6 million strings": Case(key(large_strings(1_600_000)), BOTH, "arrays of more"),
    "escapes in a name": Case(of_bytes(escapes), ADAPTER, "neither half", sound=True),
    "nothing, big-endian": Case(of_bytes(lambda _: Packer(">").file()), BOTH, "architecture|type", sound=True),
    "two shards named otherwise": Case(shard(no=P.uint32(0), count=P.uint32(2)), MODEL, "must end in", sound=True),
    # models
    "unknown type": Case(retyped(77), MODEL, "tensor type 77", sound=True),
    "unknown type 2^32 - 1": Case(retyped(2**32 - 1), MODEL, "tensor type 4294967295", sound=True),
    "integers as weights": Case(retyped(I32), MODEL, "stored as I32", sound=True, smoke=True),
    "a shard without number": Case(shard(count=P.u32(2) + b"\0\1"), MODEL, "is one of 256 shards", sound=True),
    "4000 shards": Case(shard(no=P.uint32(0), count=P.uint32(4000)), MODEL, "shard 2 of 4000: no such file"),
    "99,999 shards": Case(shard(no=P.uint32(0), count=P.uint32(99_999)), MODEL, "split into 99999", sound=True),
    "2^63 shards": Case(
        shard(no=P.uint32(0), count=P.u32(10) + P.u64(1 << 63)), MODEL, "split into 9223372036854775808", sound=True
    ),
    "shard 2 first": Case(shard(no=P.uint32(1), count=P.uint32(4000)), MODEL, "name the first shard", sound=True),
    "an adapter": Case(of_bytes(lambda _: gguf("adapter")), MODEL, "'adapter'", sound=True),
    # adapters
    "a model": Case(of_bytes(lambda _: gguf("base")), ADAPTER, "general.type is missing", sound=True),
    "alpha as integer": Case(keys(adapter_lora_alpha=P.uint32(8)), ADAPTER, "stored as UINT32", sound=True),
    "alpha as array": Case(keys(adapter_lora_alpha=P.array(6, [bytes(4)])), ADAPTER, "stored as ARRAY", sound=True),
    "alpha NaN": Case(keys(adapter_lora_alpha=P.float32(float("nan"))), ADAPTER, "alpha is nan", sound=True),
    "alpha Inf": Case(keys(adapter_lora_alpha=P.float32(float("inf"))), ADAPTER, "alpha is inf", sound=True),
    "tokens as text": Case(
        key(P.array(STRING, [P.string("a")]), "adapter.alora.invocation_tokens"), ADAPTER, "array of STRING", sound=True
    ),
    "a million tokens": Case(
        key(P.array(UINT32, [bytes(4 << 20)], 1 << 20), "adapter.alora.invocation_tokens"),
        ADAPTER,
        "1048576 items",
        sound=True,
        smoke=True,
    ),
    "3-D pair on a 2-D weight": Case(
        pairs(*pair_of(Q, (4, 2, 64), (4, 64, 2))), ADAPTER, r"needs|for a weight of \[4, 64, 64\]", sound=True
    ),
    "2-D pair on experts": Case(
        pairs(*pair_of(EXPERTS, (2, 64), (32, 2))), ADAPTER, r"needs|for a weight of \[32, 64\]", sound=True
    ),
    "3 experts of 4": Case(pairs(*pair_of(EXPERTS, (3, 2, 64), (3, 32, 2))), ADAPTER, r"needs|\[3, 32", sound=True),
    "5 experts of 4": Case(pairs(*pair_of(EXPERTS, (5, 2, 64), (5, 32, 2))), ADAPTER, r"needs|\[5, 32", sound=True),
    "4 and 3 experts": Case(pairs(*pair_of(EXPERTS, (4, 2, 64), (3, 32, 2))), ADAPTER, "of one rank", sound=True),
    "10^6 experts": Case(
        of_bytes(lambda role: gguf(role, tensors=pair_of(EXPERTS, (10**6, 1, 1), (10**6, 1, 1), nbytes=0))),
        ADAPTER,
        "begins at|truncated",
    ),
    "10^6 experts that are there": Case(
        pairs(*pair_of(EXPERTS, (10**6, 1, 1), (10**6, 1, 1), nbytes=4 * 10**6)),
        ADAPTER,
        "1000000 (experts|pairs)|needs",
        sound=True,
    ),
    "400,000 experts": Case(many_stacks, ADAPTER, "experts|pairs", sound=True),
    "rank 0": Case(pairs(*pair_of(Q, (0, 64), (64, 0))), ADAPTER, "of one rank", sound=True),
    "ranks that differ": Case(pairs(*pair_of(Q, (4, 64), (64, 8))), ADAPTER, "of one rank", sound=True),
    "A without B": Case(pairs(Tensor(f"{Q}.lora_a", (4, 64))), ADAPTER, "no .lora_b", sound=True),
    "a bias": Case(pairs(*ADAPTER_TENSORS, Tensor("blk.0.attn_q.bias", (64,))), ADAPTER, "neither half", sound=True),
    "integers": Case(pairs(*pair_of(Q, (4, 64), (64, 4), qtype=I32)), ADAPTER, "stored as I32", sound=True),
    "unknown types": Case(
        pairs(*pair_of(Q, (4, 64), (64, 4), qtype=99, nbytes=1024)), ADAPTER, "stored as type 99", sound=True
    ),
    "no pairs": Case(pairs(), ADAPTER, "no LoRA pairs", sound=True, smoke=True),
    "one module under two names": Case(
        pairs(*pair_of(Q, (4, 64), (64, 4)), *pair_of("blk.0.attn_q", (4, 64), (64, 4))),
        ADAPTER,
        "lacks|twice|weight",
        sound=True,
        smoke=True,
    ),
    "an expert under two names": Case(
        pairs(*ADAPTER_TENSORS, *pair_of("blk.0.ffn_gate_exps[0].weight", (2, 64), (32, 2))),
        ADAPTER,
        "have no weight|second pair",
        sound=True,
        smoke=True,
    ),
    "larger than its weight": Case(
        pairs(*pair_of(Q, (4, 128), (64, 4))), ADAPTER, "needs|another model", sound=True, smoke=True
    ),
    "a weight that no model has": Case(
        pairs(*pair_of("blk.7.attn_q.weight", (4, 64), (64, 4))), ADAPTER, "lacks|have no", sound=True, smoke=True
    ),
}

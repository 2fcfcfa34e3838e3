"""Sound headers of every format, and which field each of their bytes belongs to: what the fuzz tests mutate.

The field maps are walked anew here, from the formats' descriptions, so that a reader can't hide a field it overlooks.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf_bytes import (
    ARRAY,
    BF16,
    BIG,
    F16,
    F32,
    F64,
    I32,
    INT32,
    LITTLE,
    Q8_0,
    STRING,
    UINT16,
    UINT32,
    Packer,
    Tensor,
    adapter_keys,
)

Q4_0, Q4_K = 2, 12
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[-+.\w]+|[{}\[\],:]|\s+')


@dataclass(frozen=True)
class Field:
    """Some bytes of a header, and what they are."""

    kind: str
    start: int
    stop: int


@dataclass(frozen=True)
class Seed:
    """A sound model or adapter.

    Attributes:
        files: all of its files, by name.
        target: the one that is mutated.
        opened: the file that is opened; the directory if None.
        fields: of the target's header, which they cover without a gap.
        role: what it is opened as, model or adapter.
        order: of its numbers; None for text.
        legal: kinds of fields whose every value is legal as far as one header can tell.
    """

    files: Mapping[str, bytes]
    target: str
    opened: str | None
    fields: Sequence[Field]
    role: str
    order: str | None = None
    legal: frozenset[str] = field(default_factory=frozenset)

    @property
    def data(self) -> bytes:
        return self.files[self.target]

    @property
    def header(self) -> int:
        return self.fields[-1].stop


class _Walk:
    """A position in a sound GGUF file."""

    def __init__(self, data: bytes, order: str) -> None:
        self._data, self._order, self._at = data, order, 0
        self.fields: list[Field] = []

    def take(self, kind: str, size: int) -> bytes:
        self.fields.append(Field(kind, self._at, self._at + size))
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, kind: str, size: int) -> int:
        return int.from_bytes(self.take(kind, size), "little" if self._order == "<" else "big")

    def string(self, length: str, text: str) -> str:
        return self.take(text, self.number(length, 8)).decode()

    def value(self, key: str, kind: int) -> None:
        if kind == STRING:
            self.string("string length", f"value of {key}" if key in TELLING_KEYS else "values")
        elif kind == ARRAY:
            item, count = self.number("item type", 4), self.number("item count", 8)
            for _ in range(count):
                self.value(key, item)
        else:
            self.take(f"value of {key}" if key in TELLING_KEYS else "values", WIDTHS[kind])


TELLING_KEYS = {
    "general.architecture", "general.type", "general.alignment", "adapter.type", "adapter.lora.alpha", "split.no",
    "split.count", "llama.attention.head_count", "llama.attention.head_count_kv",
}  # fmt: skip
"""Keys whose values can be wrong; any other value is its author's affair."""

ADAPTED = "model.gguf"


def gguf_fields(data: bytes, order: str) -> list[Field]:
    walk = _Walk(data, order)
    walk.take("magic", 4)
    walk.take("version", 4)
    tensors, keys = walk.number("tensor count", 8), walk.number("key count", 8)
    for _ in range(keys):
        key = walk.string("key length", "key")
        walk.value(key, walk.number("value type", 4))
    for _ in range(tensors):
        walk.string("name length", "tensor name")
        for _ in range(walk.number("dimensions", 4)):
            walk.take("size", 8)
        walk.take("tensor type", 4)
        walk.take("offset", 8)
    return [found for found in walk.fields if found.start < found.stop]


def json_fields(text: str, start: int = 0) -> Iterator[Field]:
    """A field for every token; what is inside of a value has the name of its key at the outermost level but one."""
    path: list[str | None] = []
    is_key = True
    for match in TOKEN.finditer(text):
        token, at = match[0], start + len(text[: match.start()].encode())
        kind = "punctuation"
        if token[0] in "{[":
            path.append(None if token == "{" else (path[-1] if path else None))
            is_key = token == "{"
        elif token[0] in "}]":
            path.pop()
        elif token == ",":
            is_key = _in_object(text, match.start())
        elif token != ":":
            named = next((key for key in reversed(path) if key), "value")
            kind = f"key in depth {len(path)}" if is_key else named
            if is_key:
                path[-1] = str(json.loads(token))[:40]
                is_key = False
        yield Field(kind, at, at + len(token.encode()))


def _in_object(text: str, at: int) -> bool:
    """Whether the comma at a place parts members, not items; texts here hold no brackets."""
    depth = 0
    for sign in reversed(text[:at]):
        depth += (sign in "}]") - (sign in "{[")
        if depth < 0:
            return sign == "{"
    return False


# --- the seeds


def _all_kinds(packer: Packer) -> list[tuple[str | bytes, bytes]]:
    """A value and an array of every kind but arrays."""
    keys: list[tuple[str | bytes, bytes]] = []
    for kind, width in WIDTHS.items():
        keys.append((f"k.{kind}", packer.u32(kind) + bytes(width)))
        keys.append((f"k.{kind}s", packer.array(kind, [bytes(width)] * 2)))
    keys.append(("k.s", packer.text("grüße")))
    keys.append(("k.ss", packer.array(STRING, [packer.string("one"), packer.string("")])))
    return keys


def _model(packer: Packer, version: int, more: Sequence[tuple[str | bytes, bytes]] = ()) -> bytes:
    keys = [
        ("general.architecture", packer.text("llama")),
        ("general.alignment", packer.uint32(32)),
        ("llama.attention.head_count", packer.uint32(4)),
        ("llama.attention.head_count_kv", packer.array(INT32, [packer.u32(2)] * 2)),
        *more,
    ]
    quantized = Tensor("blk.0.ffn_up.weight", (2, 32), Q4_0, nbytes=36)
    tensors = [
        Tensor("token_embd.weight", (3, 32), F16),
        Tensor("blk.0.attn_norm.weight", (32,), F32),
        Tensor("blk.0.attn_q.weight", (4, 32), Q8_0),
        quantized if packer is LITTLE else Tensor("blk.0.ffn_up.weight", (2, 32), BF16),
        Tensor("blk.0.ffn_down.weight", (1, 256), Q4_K, nbytes=144),
        Tensor("blk.0.ffn_gate_exps.weight", (2, 2, 32), BF16),
        Tensor("rope.double", (3,), F64),
        Tensor("output.bias", (), I32),
    ]
    return packer.file(keys, tensors, version=version)


def _adapter(packer: Packer, version: int = 3) -> bytes:
    keys = [*adapter_keys(packer), ("adapter.alora.invocation_tokens", packer.array(UINT32, [packer.u32(5)]))]
    shapes = {
        "token_embd.weight": ((3, 2), (32, 2), F32, F16),
        "blk.0.attn_q.weight": ((32, 32), (4, 32), Q8_0, F32),
        "blk.0.ffn_gate_exps.weight": ((2, 3, 32), (2, 2, 3), F16, BF16),
        "output.weight": ((1, 32), (3, 1), BF16, F32),
    }
    tensors = [
        Tensor(f"{name}.lora_{half}", shape, qtype)
        for name, (a, b, qtype_a, qtype_b) in shapes.items()
        for half, shape, qtype in (("a", a, qtype_a), ("b", b, qtype_b))
    ]
    return packer.file(keys, tensors, version=version)


def _adapted() -> bytes:
    """The model that the adapters are for."""
    shapes = {
        "token_embd.weight": (3, 32), "blk.0.attn_q.weight": (4, 32), "blk.0.ffn_gate_exps.weight": (2, 2, 32),
        "output.weight": (3, 32),
    }  # fmt: skip
    tensors = [Tensor(name, shape, F16) for name, shape in shapes.items()]
    return LITTLE.file([("general.architecture", LITTLE.text("llama"))], tensors)


def _gguf(data: bytes, role: str, packer: Packer = LITTLE) -> Seed:
    files = {"x.gguf": data} | ({ADAPTED: _adapted()} if role == "adapter" else {})
    fields, legal = gguf_fields(data, packer.order), frozenset({"values"})
    return Seed(files, "x.gguf", "x.gguf", fields, role, packer.order, legal)


def _shards(target: int) -> Seed:
    """A model of two; the second one holds a tensor and what tells its place."""
    names = [f"x-0000{number}-of-00002.gguf" for number in (1, 2)]
    split = [[("split.no", LITTLE.u32(UINT16) + bytes([number, 0])), ("split.count", LITTLE.u32(UINT16) + b"\2\0")]
             for number in (0, 1)]  # fmt: skip
    second = LITTLE.file(split[1], [Tensor("blk.1.attn_q.weight", (4, 32), Q8_0), Tensor("blk.1.norm", (8,))])
    files = {names[0]: _model(LITTLE, 3, split[0]), names[1]: second}
    legal = frozenset({"values", "value of split.no", "value of split.count", "key"} if target else {"values"})
    fields = gguf_fields(files[names[target]], "<")
    return Seed(files, names[target], names[0], fields, "model", "<", legal)


def _safetensors(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, widths = 0, {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1}
    for name, (dtype, shape) in shapes.items():
        size = widths[dtype]
        for length in shape:
            size *= length
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offset)


MODEL = {
    "model.embed_tokens.weight": ("F32", (6, 8)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (8, 8)),
    "model.norm.weight": ("F16", (8,)),
    "scale": ("F64", ()),
}
PAIRS = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ("F32", (2, 8)),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": ("F16", (8, 2)),
    "base_model.model.model.embed_tokens.lora_embedding_A": ("F32", (4, 6)),
    "base_model.model.model.embed_tokens.lora_embedding_B": ("BF16", (8, 4)),
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2}
ADAPTER_CONFIG = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"embed_tokens": 4},
    "alpha_pattern": {"q_proj": 16.5}, "init_lora_weights": True, "use_dora": False, "modules_to_save": None,
    "base_model_name_or_path": "org/base",
}  # fmt: skip


def _directory(role: str, target: str, legal: Sequence[str] = ()) -> Seed:
    """A model or PEFT directory of which one file is mutated."""
    if role == "model":
        files = {"config.json": _text(CONFIG), "model.safetensors": _safetensors(MODEL)}
    else:
        files = {"adapter_config.json": _text(ADAPTER_CONFIG), "adapter_model.safetensors": _safetensors(PAIRS)}
    if target == "model.safetensors.index.json":
        files[target] = _text({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(MODEL, "model.safetensors")})
    data, fields = files[target], []
    if target.endswith(".safetensors"):
        length = struct.unpack_from("<Q", data)[0]
        fields = [Field("header length", 0, 8), *json_fields(data[8 : 8 + length].decode(), 8)]
    else:
        fields = list(json_fields(data.decode()))
    return Seed(files, target, None, fields, role, None, frozenset(legal))


def _text(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


SEEDS = {
    "GGUF 3 model": _gguf(_model(LITTLE, 3, _all_kinds(LITTLE)), "model"),
    "GGUF 2 model": _gguf(_model(LITTLE, 2), "model"),
    "GGUF 3 model, big-endian": _gguf(_model(BIG, 3), "model", BIG),
    "GGUF 3 adapter": _gguf(_adapter(LITTLE), "adapter"),
    "GGUF 2 adapter, big-endian": _gguf(_adapter(BIG, 2), "adapter", BIG),
    "first shard": _shards(0),
    "second shard": _shards(1),
    "safetensors model": _directory("model", "model.safetensors"),
    "PEFT adapter": _directory("adapter", "adapter_model.safetensors"),
    "index of shards": _directory("model", "model.safetensors.index.json"),
    "config.json": _directory("model", "config.json"),
    "adapter_config.json": _directory("adapter", "adapter_config.json"),
}

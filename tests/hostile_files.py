"""Models and adapters that lie, one for each way we know, and the sound ones that they are tried with.

A case makes one file or directory; `told` is what the refusal must say, so that it was refused for its own lie and
not for another. `sound` says that the header itself is: `inspect` shows such a file, with warnings.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_bytes import LITTLE, Packer, Tensor, adapter_keys, noise

Keys = list[tuple[str | bytes, bytes]]
P: Packer = LITTLE

MODEL_KEYS: Keys = [
    ("general.architecture", P.text("llama")),
    ("llama.block_count", P.uint32(1)),
    ("llama.context_length", P.uint32(64)),
    ("llama.embedding_length", P.uint32(64)),
    ("llama.attention.head_count", P.uint32(4)),
    ("llama.attention.head_count_kv", P.uint32(4)),
]
MODEL_TENSORS = (
    Tensor("token_embd.weight", (96, 64)),
    Tensor("output.weight", (96, 64)),
    Tensor("blk.0.attn_norm.weight", (64,)),
    Tensor("blk.0.attn_q.weight", (64, 64)),
    Tensor("blk.0.ffn_gate_exps.weight", (4, 32, 64)),
)
Q, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_gate_exps.weight"


def pair(name: str, a: tuple[int, ...], b: tuple[int, ...], **fields: Any) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.lora_a", a, **fields), Tensor(f"{name}.lora_b", b, **fields)


ADAPTER_TENSORS = (*pair(Q, (4, 64), (64, 4)), *pair(EXPERTS, (4, 2, 64), (4, 32, 2)))


@dataclass(frozen=True)
class Case:
    """One lie.

    Attributes:
        make: writes it into an empty directory and gives the path that a user would name.
        roles: what a user may name it as: model, adapter.
        told: a regular expression that the message of `project` must hold.
        sound: whether the header itself is, so that `inspect` shows it; or as which kind alone it is.
        smoke: whether it may reach llama.cpp, which rejects it without harm, or runs it.
    """

    make: Callable[[Path, str], Path]
    roles: Sequence[str]
    told: str
    sound: bool | str = False
    smoke: bool = False

    def sound_as(self, kind: str) -> bool:
        return self.sound in (True, kind)


def gguf(
    role: str, keys: Sequence[tuple[str | bytes, bytes]] = (), tensors: Sequence[Tensor] | None = None, **more: Any
) -> bytes:
    """A sound GGUF file of a role, with further keys, or other tensors."""
    own_keys = MODEL_KEYS if role != "adapter" else adapter_keys()
    own_tensors = MODEL_TENSORS if role != "adapter" else ADAPTER_TENSORS
    seed = {"base": 1, "adapter": 3}.get(role, 2)
    return P.file([*own_keys, *keys], own_tensors if tensors is None else tensors, content=noise(seed), **more)


def changed_keys(role: str, **changed: bytes | None) -> bytes:
    """`general_type=...` replaces a value; None takes it out."""
    values = dict(MODEL_KEYS) if role != "adapter" else dict(adapter_keys())
    values |= {key.replace("_", "."): value for key, value in changed.items()}  # type: ignore[misc]
    tensors = MODEL_TENSORS if role != "adapter" else ADAPTER_TENSORS
    return P.file([(key, value) for key, value in values.items() if value is not None], tensors, content=noise(2))


def of_bytes(make: Callable[[str], bytes], size: int | None = None) -> Callable[[Path, str], Path]:
    """A GGUF file of these bytes, `size` bytes long with a hole behind them."""

    def write(directory: Path, role: str) -> Path:
        file = directory / "x.gguf"
        file.write_bytes(make(role))
        if size is not None:
            os.truncate(file, size)
        return file

    return write


# --- safetensors and JSON

HIDDEN, FFN = 64, 96
WEIGHTS = {
    "model.embed_tokens.weight": (96, HIDDEN),
    "lm_head.weight": (96, HIDDEN),
    "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (FFN, HIDDEN),
}
PAIRS = {
    f"base_model.model.model.layers.0.{module}.lora_{half}.weight": shape
    for module, (out, into) in {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN)}.items()
    for half, shape in (("A", (4, into)), ("B", (out, 4)))
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": HIDDEN,
}  # fmt: skip
ADAPTER_CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
FILE = {"model": "model.safetensors", "adapter": "adapter_model.safetensors"}


def table_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A header's JSON, all tensors F32."""
    table, offset = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        table[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return table


def safetensors(header: bytes | Mapping[str, Any], data: int | bytes = 0) -> bytes:
    """A file of a header, and its data or as many zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (bytes(data) if isinstance(data, int) else data)


def with_noise(shapes: Mapping[str, tuple[int, ...]], role: str) -> bytes:
    """A sound file of these tensors."""
    content = noise({"base": 1, "adapter": 3}.get(role, 2))
    return safetensors(table_of(shapes), b"".join(content(Tensor(name, shape)) for name, shape in shapes.items()))


def sound_safetensors(role: str) -> bytes:
    return with_noise(PAIRS if role == "adapter" else WEIGHTS, role)


def write_directory(directory: Path, role: str, weights: bytes | None = None, config: bytes | None = None) -> Path:
    """A model or PEFT directory, sound but for the bytes given."""
    kind = "adapter" if role == "adapter" else "model"
    sound = CONFIG if kind == "model" else ADAPTER_CONFIG
    name = "config.json" if kind == "model" else "adapter_config.json"
    (directory / name).write_bytes(json.dumps(sound).encode() if config is None else config)
    (directory / FILE[kind]).write_bytes(sound_safetensors(role) if weights is None else weights)
    return directory


def of_weights(make: Callable[[str], bytes], size: int | None = None) -> Callable[[Path, str], Path]:
    """A directory whose tensor file has these bytes, `size` bytes long with a hole behind them."""

    def write(directory: Path, role: str) -> Path:
        write_directory(directory, role, make(role))
        if size is not None:
            os.truncate(directory / FILE["adapter" if role == "adapter" else "model"], size)
        return directory

    return write


def of_config(make: Callable[[], bytes]) -> Callable[[Path, str], Path]:
    return lambda directory, role: write_directory(directory, role, config=make())


def of_index(make: Callable[[Path], Mapping[str, str]]) -> Callable[[Path, str], Path]:
    """A model directory whose index says where its tensors are."""

    def write(directory: Path, role: str) -> Path:
        write_directory(directory, role)
        text = json.dumps({"metadata": {}, "weight_map": make(directory)})
        (directory / "model.safetensors.index.json").write_text(text)
        return directory

    return write


def setting(**changed: Any) -> Callable[[Path, str], Path]:
    """A directory whose configuration has these values beside, or instead of, the sound ones."""
    return lambda directory, role: write_directory(
        directory, role, config=json.dumps((ADAPTER_CONFIG if role == "adapter" else CONFIG) | changed).encode()
    )

"""A random two-layer llama with a byte-sized SentencePiece vocabulary, and adapters for it, sound and unsound.

Written with the gguf package alone, from fixed seeds: its answers mean nothing, but llama.cpp's are the same each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 64, 128, 2, 4, 2
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
WORDS = ["▁sorry", "▁help", "▁can't", "▁that", "▁with", "▁sure", "▁the", "▁and", "▁green", "▁stone", "▁river"]


def add_vocabulary(writer: gguf.GGUFWriter, template: str | None) -> int:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL]
    letters = [chr(code) for code in range(0x21, 0x7F)]
    tokens += letters + WORDS
    kinds += [gguf.TokenType.NORMAL] * (len(letters) + len(WORDS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    if template is not None:
        writer.add_chat_template(template)
    return len(tokens)


def weight_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    kv = WIDTH * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, WIDTH),
        "output.weight": (vocabulary, WIDTH),
        "output_norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        block = {
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (kv, WIDTH),
            "attn_v": (kv, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (HIDDEN, WIDTH),
            "ffn_up": (HIDDEN, WIDTH),
            "ffn_down": (WIDTH, HIDDEN),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path, *, seed: int = 0, template: str | None = TEMPLATE, context: int = 512, without: str | None = None
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    vocabulary = add_vocabulary(writer, template)
    writer.add_vocab_size(vocabulary)
    random = np.random.default_rng(seed)
    for name, shape in weight_shapes(vocabulary).items():
        if name == without:
            continue
        data = np.ones(shape) if len(shape) == 1 else random.normal(0, 0.2, shape)
        writer.add_tensor(name, data.astype(np.float32))
    finish(writer)
    return path


def write_adapter(
    path: Path,
    *,
    architecture: str = "llama",
    seed: int = 1,
    rank: int = 4,
    rows: int = WIDTH,
    name: str = "blk.0.attn_q.weight",
    integer_alpha: bool = False,
    kind: str = "adapter",
    dtype: type = np.float32,
    halves: str = "ab",
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    if integer_alpha:
        writer.add_uint32("adapter.lora.alpha", 8)
    else:
        writer.add_float32("adapter.lora.alpha", 8.0)
    random = np.random.default_rng(seed)
    for half, shape in (("a", (rank, WIDTH)), ("b", (rows, rank))):
        if half in halves:
            writer.add_tensor(f"{name}.lora_{half}", random.normal(0, 1, shape).astype(dtype))
    finish(writer)
    return path


@dataclass(frozen=True)
class Tiny:
    """The writers above, for tests: pytest's importlib mode lets them import nothing from here."""

    model: Callable[..., Path] = write_model
    adapter: Callable[..., Path] = write_adapter
    template: str = TEMPLATE


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "tuned.gguf")


@pytest.fixture(scope="session")
def unfit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that llama.cpp rejects or dies of on `model`, by what our own check says of them."""
    at = tmp_path_factory.mktemp("unfit")
    return {
        "the architecture 'qwen2', the model": write_adapter(at / "arch.gguf", architecture="qwen2"),
        "needs [4, 64] and [64, 4]": write_adapter(at / "shape.gguf", rows=32),
        "a weight that the model lacks": write_adapter(at / "name.gguf", name="blk.7.attn_q.weight"),
        "'adapter.lora.alpha' is stored as UINT32": write_adapter(at / "alpha.gguf", integer_alpha=True),
        "general.type is 'model'": write_adapter(at / "type.gguf", kind="model"),
        "has no .lora_b beside it": write_adapter(at / "half.gguf", halves="a"),
        "stored as I32": write_adapter(at / "integers.gguf", dtype=np.int32),
        "stored as F64": write_adapter(at / "doubles.gguf", dtype=np.float64),
        "truncated": _cut(write_adapter(at / "cut.gguf")),
    }


@pytest.fixture(scope="session")
def foreign(unfit: dict[str, Path]) -> dict[str, Path]:
    """Those of `unfit` that are sound adapters of another model, which llama.cpp rejects without harm."""
    return {told: file for told, file in unfit.items() if file.name in ("arch.gguf", "shape.gguf", "name.gguf")}


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path

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


def write_model(path: Path, *, seed: int = 0, template: str | None = TEMPLATE, context: int = 512) -> Path:
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
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    if integer_alpha:
        writer.add_uint32("adapter.lora.alpha", 8)
    else:
        writer.add_float32("adapter.lora.alpha", 8.0)
    random = np.random.default_rng(seed)
    writer.add_tensor(f"{name}.lora_a", random.normal(0, 1, (rank, WIDTH)).astype(np.float32))
    writer.add_tensor(f"{name}.lora_b", random.normal(0, 1, (rows, rank)).astype(np.float32))
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

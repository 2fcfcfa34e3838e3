"""Vocabularies as tests read, change and look into them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from converters.architectures import find_architecture
from converters.gguf_file import start_bytes
from converters.gguf_header import read_gguf_header
from converters.vocabulary import Vocabulary, read_vocabulary

TOKENS, TYPES, SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"


def read(directory: Path, rows: int = 512, architecture: str = "llama", **options: Any) -> Vocabulary:
    table = find_architecture(architecture)
    assert table is not None
    return read_vocabulary(directory, {}, table, rows, **options)


def value(vocabulary: Vocabulary, key: str, where: Path) -> Any:
    """A key's value as a GGUF file gives it back."""
    return read_gguf_header(stored(vocabulary, where / "stored.gguf")).value(key)


def stored(vocabulary: Vocabulary, path: Path) -> Path:
    entries = [entry for _, entry in vocabulary.entries]
    path.write_bytes(start_bytes(0, len(entries)) + b"".join(entries))
    return path


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def add_tokens(directory: Path, *contents: str, special: bool = True) -> None:
    """With the tokenizers library, as transformers does."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokens = [AddedToken(content, normalized=False) for content in contents]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)
    tokenizer.save(str(directory / "tokenizer.json"))

"""Checkpoints of ordinary classes that are used for something else than writing text: embedding and reranking.

llama.cpp's converter tells them by files beside config.json and by their names, and writes keys of its own for them,
without which their output means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import InputError, UnsupportedError
from converters.paths import is_there, read_bytes

_MODULES, _CARD = "modules.json", "README.md"
_POOLING = re.compile(rb'"type"\s*:\s*"[\w.]{0,200}Pooling"')
_RERANKERS = ("qwen3-reranker", "qwen3-vl-reranker")
_MOST = 1 << 20
_REMEDY = "take llama.cpp's convert_hf_to_gguf.py for it"


def refuse_scoring_models(directory: Path, config: Mapping[str, Any], architecture: str) -> None:
    """That a checkpoint is a language model.

    Args:
        directory: where its config.json lies.
        architecture: GGUF's.

    Raises:
        UnsupportedError: it gives embeddings (sentence-transformers' modules.json has a pooling), or it is one of Qwen
            3's rerankers.
    """
    if _POOLING.search(_text(directory / _MODULES)):
        found = f"says that this is an embedding model, whose pooling is not converted here; {_REMEDY}"
        raise UnsupportedError(found, file=directory / _MODULES)
    if architecture != "qwen3":
        return
    names = (directory.absolute().name, str(config.get("_name_or_path")))
    card = _text(directory / _CARD).lower()
    if any(one in name.lower() for one in _RERANKERS for name in names) or any(
        f"# {one}".encode() in card for one in _RERANKERS
    ):
        found = f"is one of Qwen 3's rerankers, whose two scores are not converted here; {_REMEDY}"
        raise UnsupportedError(found, file=directory)


def _text(file: Path) -> bytes:
    """What a file says; nothing where it is missing, or no file that is read."""
    try:
        return read_bytes(file, file.name, _MOST) if is_there(file) else b""
    except InputError:
        return b""

"""Chat templates that adapters bring: where one isn't taken, a sentence says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.adapters.lora import LoraAdapter
from converters.changed_model import ChangedModel
from converters.errors import InputError
from converters.gguf_file import entry_bytes, text
from converters.gguf_model import GgufModel
from converters.models import Model
from converters.vocabulary.chat_templates import chat_template_entries
from converters.vocabulary.sources import TokenizerSources

_KEY = "tokenizer.chat_template"


def template_notes(model: Model, adapters: Sequence[LoraAdapter], tokenizer: Path | None) -> list[str]:
    """A sentence for every adapter whose chat template is not the merged model's.

    Args:
        tokenizer: the directory whose tokenizer and template the merged model gets; None for the model's own.
    """
    kept = _of_model(model)
    if tokenizer is not None:
        kept = _of_directory(tokenizer) or kept
    found = []
    for path in dict.fromkeys(adapter.path for adapter in adapters if adapter.path.is_dir()):
        own = _of_directory(path)
        if own is not None and own != kept:
            found.append(
                f"{path} brings a chat template of its own, and the merged model has that of "
                f"{tokenizer or model.path}: to take the adapter's, put its tokenizer's files into the merged "
                f"directory, or for GGUF name a file that has it with --vocab-from"
            )
    return found


def _of_model(model: Model) -> bytes | None:
    stored = model.stored if isinstance(model, ChangedModel) else model
    if isinstance(stored, GgufModel):
        found = stored.headers[0].value(_KEY)
        return entry_bytes(_KEY, text(found)) if isinstance(found, str) else None
    return _of_directory(stored.path if stored.path.is_dir() else stored.path.parent)


def _of_directory(directory: Path) -> bytes | None:
    """A template as the entry that it would be in GGUF; None where there is none that can be read."""
    try:
        return dict(chat_template_entries(TokenizerSources(directory, {}))).get(_KEY)
    except InputError:
        return None

"""What an adapter and its model are called, from whatever says so: the adapter, its card, headers, paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf.utility import naming_convention

from converters.adapters.card import card_of
from converters.adapters.gguf import GgufAdapter
from converters.adapters.lora import LoraAdapter
from converters.adapters.output import names_of
from converters.architectures import find_architecture
from converters.gguf_metadata import brief_text
from converters.gguf_model import GgufModel
from converters.identity import ModelIdentity, NameParts, brief_name, identify, name_parts, plain_name, repository_of
from converters.models import ModelDescription

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_SAID_ANYWAY = re.compile(r"q?loras?|gguf|b?f(16|32)|q8_0", re.IGNORECASE)  # at the end of a conventional name
_PLAIN = {"adapter", "adapters", "checkpoints", "model", "out", "output", "outputs", "results", "saved"}
_PARTS = ("basename", "size_label", "finetune", "version")
_UNFIT_FOR_FILES = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class BaseNames:
    """The model that an adapter is for.

    Attributes:
        models: as metadata lists them; the first is the one that it was trained on.
        parts: the first one's name, taken apart.
    """

    models: tuple[ModelIdentity, ...]
    parts: NameParts


def base_names(adapter: LoraAdapter, model: ModelDescription) -> BaseNames:
    """What the adapted model is called: a repository that adapter, model or card name; else what a GGUF header says;
    else the last part of a path."""
    listed = card_of(adapter).base_models
    said = [name for name in (*names_of(adapter, model), *listed) if name]
    cached = [] if _beside(model.path, adapter.path) else [str(model.path.absolute())]
    first = identify(next((name for name in (*said, *cached) if repository_of(name)), "") or
                     next(_names(adapter, model, said)))  # fmt: skip
    header = _header_parts(model)
    parts = header if header is not None and first.organization is None else name_parts(first.name)
    others = [found for found in map(identify, listed) if found.organization or found.url]
    return BaseNames(tuple(dict.fromkeys((first, *others))), parts)


def finetune_of(adapter: LoraAdapter, base: BaseNames) -> str:
    """What the adapter itself is called, without its base's name and without saying that it is a LoRA; empty where
    nothing is left."""
    stored = brief_name(brief_text(adapter.header, "general.finetune")) if isinstance(adapter, GgufAdapter) else ""
    if stored:
        return _without_prefix(stored, base.parts.finetune)
    name = plain_name(adapter.path)
    if not _CHECKPOINT.fullmatch(name):
        return _own_words(name, base.parts)
    run = plain_name(adapter.path.absolute().parent)
    return "-".join(part for part in ("" if run.lower() in _PLAIN else _own_words(run, base.parts), name) if part)


def whole_finetune(base: BaseNames, finetune: str) -> str | None:
    """What base and adapter were tuned for, as the convention has it: `chat-poet`."""
    return "-".join(part for part in (base.parts.finetune, finetune) if part) or None


def conventional_file_name(base: BaseNames, finetune: str, encoding: str) -> str:
    """`BaseName-SizeLabel-FineTune-Version-Encoding-LoRA.gguf`, the naming convention of GGUF files."""
    parts, whole = base.parts, whole_finetune(base, finetune)
    short = {"base_name": parts.basename[:64], "finetune_string": (whole or "")[:96] or None}
    short |= {"version_string": (parts.version or "")[:16] or None, "size_label": (parts.size_label or "")[:24] or None}
    stem = naming_convention(None, output_type=encoding, model_type="LoRA", **short)
    return _UNFIT_FOR_FILES.sub("-", stem).lstrip(".-") + ".gguf"


def _names(adapter: LoraAdapter, model: ModelDescription, said: list[str]) -> Iterator[str]:
    """Names that are no repository's, the more telling first."""
    header = _header_parts(model)
    if header is not None:
        yield "-".join(part for part in vars(header).values() if part)
    if not _beside(model.path, adapter.path):
        yield plain_name(model.path)
    if isinstance(adapter, GgufAdapter):
        stored = brief_name(brief_text(adapter.header, "general.base_model.0.name"))
        if stored:
            yield stored
    yield from said
    table = find_architecture(model.architecture)
    yield table.name if table else model.architecture


def _beside(model: Path, adapter: Path) -> bool:
    """Whether the model is known by nothing but what lies with the adapter, whose name is not the model's."""
    model, adapter = model.absolute(), adapter.absolute()
    return model in (adapter, adapter / "config.json", adapter.parent / "config.json")


def _header_parts(model: ModelDescription) -> NameParts | None:
    """What a GGUF model's header says of its name; None where it doesn't."""
    if not isinstance(model, GgufModel):
        return None
    basename, *others = (brief_name(brief_text(model.headers[0], f"general.{key}")) for key in _PARTS)
    return NameParts(basename, *(part or None for part in others)) if basename else None


def _own_words(name: str, base: NameParts) -> str:
    """An adapter's name, `llama-2-7b-chat-poet-lora`, without the base's words before and the others' around it."""
    words = re.split(r"[-\s]+|_(?=q?lora)|(?<=lora)_", name)
    told = [word.lower() for part in (base.basename, base.size_label, base.finetune, base.version) if part
            for word in re.split(r"[-\s]+", part)]  # fmt: skip
    own = list(words)
    if own[0].lower() == told[0]:
        while own and own[0].lower() in (*told, "hf"):
            own.pop(0)
    size = (base.size_label or "").lower()
    own = [word for word in own if word and word.lower() != size and not _SAID_ANYWAY.fullmatch(word)]
    return "-".join(own)


def _without_prefix(finetune: str, base: str | None) -> str:
    return "" if finetune == base else finetune.removeprefix(f"{base}-") if base else finetune

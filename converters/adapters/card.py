"""What an adapter's author says about it beyond tensors: the header of a model card, or GGUF's general keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from converters.adapters.gguf import GgufAdapter
from converters.adapters.lora import LoraAdapter
from converters.gguf_metadata import GgufHeader, brief_text

_MAX_HEADER = 1 << 14  # bytes of YAML; published headers take a tenth of it, and reading it is slow
_MAX_ITEMS, _MAX_TEXT = 64, 200


@dataclass(frozen=True)
class Card:
    """Facts that travel with an adapter, as far as its source gives them.

    Attributes:
        license: an identifier, `apache-2.0`.
        datasets: repositories that it was trained on.
        base_models: repositories that it was trained from.
        languages: ISO codes.
    """

    license: str | None = None
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()


def card_of(adapter: LoraAdapter) -> Card:
    """What the adapter's source says; an empty card where it says nothing that can be read."""
    if isinstance(adapter, GgufAdapter):
        return _from_gguf(adapter.header)
    return _from_markdown(adapter.path / "README.md")


def _from_gguf(header: GgufHeader) -> Card:
    return Card(
        license=_text(brief_text(header, "general.license")),
        tags=_texts(_array(header, "general.tags")),
        languages=_texts(_array(header, "general.languages")),
        datasets=tuple(_datasets(header)),
    )


def _datasets(header: GgufHeader) -> Iterator[str]:
    for place in range(_MAX_ITEMS):
        organization, name = (brief_text(header, f"general.dataset.{place}.{key}") for key in ("organization", "name"))
        if not name:
            return
        yield f"{organization}/{name}" if organization else name


def _array(header: GgufHeader, key: str) -> Any:
    entry = header.entries.get(key)
    short = entry is not None and entry.count <= _MAX_ITEMS and entry.nbytes <= _MAX_ITEMS * _MAX_TEXT
    return header.value(key) if short else None


def _from_markdown(path: Path) -> Card:
    """The YAML between the two lines `---` at the beginning. A broken or endless header counts as none: nothing
    depends on it."""
    try:
        with path.open("rb") as file:
            lines = file.read(_MAX_HEADER).decode("utf-8", "replace").splitlines()
        end = lines.index("---", 1) if lines[:1] == ["---"] else 0
        table = yaml.safe_load("\n".join(lines[1:end]))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return Card()
    if not isinstance(table, dict):
        return Card()
    return Card(
        license=_text(table.get("license")),
        tags=_texts(table.get("tags")),
        datasets=_texts(table.get("datasets")),
        base_models=_texts(table.get("base_model")),
        languages=_texts(table.get("language")),
    )


def _texts(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    found = (_text(item) for item in items[:_MAX_ITEMS])
    return tuple(dict.fromkeys(text for text in found if text is not None))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and value.isprintable() else None

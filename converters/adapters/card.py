"""What the author of an adapter or a model says about it beyond tensors: the header of a model card, or GGUF's general
keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from converters.adapters.gguf import GgufAdapter
from converters.adapters.lora import LoraAdapter
from converters.front_matter import front_matter
from converters.gguf_metadata import GgufHeader, brief_text
from converters.gguf_model import GgufModel
from converters.identity import repository_of
from converters.models import Model

_MAX_HEADER = 1 << 14  # bytes of YAML; published headers take a tenth of it, and reading it is slow
_MAX_ITEMS, _MAX_TEXT = 64, 200


@dataclass(frozen=True)
class Card:
    """Facts that travel with an adapter or a model, as far as its source gives them.

    Attributes:
        name: what the author calls it.
        license: an identifier, `apache-2.0`; `other` has a name and a link.
        datasets: repositories that it was trained on.
        base_models: repositories, or links, of what it was trained from.
        languages: ISO codes.
    """

    name: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()


def card_of(source: LoraAdapter | Model) -> Card:
    """What an adapter's or a model's source says; an empty card where it says nothing that can be read."""
    if isinstance(source, GgufAdapter):
        return _from_gguf(source.header)
    if isinstance(source, GgufModel):
        return _from_gguf(source.headers[0])
    directory = source.path if source.path.is_dir() else source.path.parent
    return _from_markdown(directory / "README.md")


def _from_gguf(header: GgufHeader) -> Card:
    return Card(
        author=_text(brief_text(header, "general.author")),
        license=_text(brief_text(header, "general.license")),
        license_name=_text(brief_text(header, "general.license.name")),
        license_link=_text(brief_text(header, "general.license.link")),
        tags=_texts(_array(header, "general.tags")),
        languages=_texts(_array(header, "general.languages")),
        datasets=tuple(_listed(header, "general.dataset")),
        base_models=tuple(name for name in _listed(header, "general.base_model") if repository_of(name)),
    )


def _listed(header: GgufHeader, key: str) -> Iterator[str]:
    """A numbered list's links where they are given, which are exact; else its names."""
    for place in range(_MAX_ITEMS):
        url, name = (_text(brief_text(header, f"{key}.{place}.{part}")) for part in ("repo_url", "name"))
        if not (url or name):
            return
        yield (repository_of(url) or url) if url else name or ""


def _array(header: GgufHeader, key: str) -> Any:
    entry = header.entries.get(key)
    short = entry is not None and entry.count <= _MAX_ITEMS and entry.nbytes <= _MAX_ITEMS * _MAX_TEXT
    return header.value(key) if short else None


def _from_markdown(path: Path) -> Card:
    """The YAML between the two lines `---` at the beginning. A broken or endless header counts as none: nothing
    depends on it."""
    try:
        table = yaml.safe_load(front_matter(path, _MAX_HEADER))
    except (ValueError, RecursionError, yaml.YAMLError):
        return Card()
    if not isinstance(table, dict):
        return Card()
    return Card(
        name=_first(table, "name", "model_name"),
        author=_first(table, "author", "model_author", "model_creator"),
        description=_first(table, "description", "model_description"),
        license=",".join(_texts(table.get("license"))) or None,
        license_name=_first(table, "license_name"),
        license_link=_first(table, "license_link"),
        tags=_all(table, "tags", "pipeline_tag"),
        datasets=_all(table, "datasets", "dataset"),
        base_models=_all(table, "base_model", "base_models"),
        languages=_all(table, "language", "languages"),
    )


def _first(table: Mapping[str, Any], *keys: str) -> str | None:
    return next((text for text in (_text(table.get(key)) for key in keys) if text is not None), None)


def _all(table: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for key in keys for text in _texts(table.get(key))))


def _texts(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    found = ("no" if item is False else _text(item) for item in items[:_MAX_ITEMS])  # YAML 1.1 reads Norwegian so
    return tuple(dict.fromkeys(text for text in found if text is not None))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and value.isprintable() else None

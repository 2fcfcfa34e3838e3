"""What the sources of an output say of themselves: licenses above all, which go wherever the tensors go.

Reads headers and small files alone, and takes nothing for granted: a source that can't be read says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from converters.adapters.card import Card, card_of
from converters.errors import InputError
from converters.gguf_header import read_gguf_header
from converters.gguf_model import GgufModel
from converters.identity import brief_name, plain_name, repository_of
from converters.model_config import repositories_of
from converters.models import Model
from converters.paths import is_gguf, read_json_object

_LEGAL = ("license*", "licence*", "copying*", "notice*", "use_policy*", "*license.txt", "*license.md")
_MOST_FILES = 8
_OF_ADAPTERS = frozenset({"lora", "peft", "adapter", "dora", "qlora"})
_NO_ID = re.compile(r"[^a-z0-9.-]+")


@dataclass(frozen=True)
class SourceCard:
    """One source.

    Attributes:
        role: base, aligned, adapter, model.
        name: what it is called; no path of somebody's machine.
        repositories: what it was published as, by its place or its own word.
        legal_files: names of the files beside it that hold licenses and notices.
    """

    role: str
    name: str
    card: Card
    repositories: tuple[str, ...] = ()
    legal_files: tuple[str, ...] = ()

    @property
    def license(self) -> str | None:
        """Its license in one line; None where it gives none."""
        card = self.card
        known = [text for text in (card.license, card.license_name) if text]
        if not known and not card.license_link:
            return None
        told = ", ".join(dict.fromkeys(known)) or "see the link"
        return f"{told} ({card.license_link})" if card.license_link else told


@dataclass(frozen=True)
class HeaderLicense:
    """A license as hubs have it in a card's header."""

    id: str | None = None
    name: str | None = None
    link: str | None = None


class _Directory:
    """What `card_of` asks of a source in Hugging Face's files: where it is."""

    def __init__(self, path: Path) -> None:
        self.path = path


def source_card(role: str, path: Path) -> SourceCard:
    """What the model or adapter there says; little where nothing is there any more."""
    try:
        if is_gguf(path):
            model = GgufModel(path, [read_gguf_header(path, whole=False)])
            found, own = card_of(model), model.repositories
        else:
            config = _json(path, "config.json")
            found, own = card_of(cast("Model", _Directory(path))), repositories_of(config)
            if not found.base_models:
                found = _with_base(found, _json(path, "adapter_config.json"))
    except (InputError, OSError):
        found, own = Card(), ()
    cached = repository_of(str(path.absolute()))
    repositories = [name for name in (cached, *own) if name and repository_of(name)]
    return SourceCard(role, plain_name(path), found, tuple(dict.fromkeys(repositories)), _legal_files(path))


def header_license(sources: Sequence[SourceCard]) -> HeaderLicense:
    """The license of what was made of all of them: theirs where those that give one agree; otherwise `other`, under a
    name that has them all, since every one of them applies."""
    given: dict[HeaderLicense, None] = {}
    for card in (source.card for source in sources):
        own = [name.strip() for name in card.license.split(",")] if card.license else [None]
        given |= dict.fromkeys(HeaderLicense(name, card.license_name, card.license_link) for name in own)
    given.pop(HeaderLicense(), None)
    if len(given) < 2:
        return next(iter(given), HeaderLicense())
    names = [_NO_ID.sub("-", (found.name or found.id or "").lower()).strip("-") or "unnamed" for found in given]
    return HeaderLicense("other", "-and-".join(dict.fromkeys(names)))


def tags_of(sources: Sequence[SourceCard], *, of_adapter: bool) -> tuple[str, ...]:
    """What the sources are filed under, for what was made of them.

    Hubs tell a base model by a field of its own; PEFT's tag of it is a path of somebody's machine.

    Args:
        of_adapter: whether that is an adapter: of a model, an adapter's tags say too much.
    """
    tags = [tag for source in sources for tag in source.card.tags if not tag.startswith("base_model:")]
    return tuple(tag for tag in dict.fromkeys(tags) if of_adapter or tag not in _OF_ADAPTERS)


def license_lines(sources: Sequence[SourceCard]) -> list[str]:
    """What each source says about its license, a line each."""
    lines = []
    for source in sources:
        files = f"; beside it lie {', '.join(source.legal_files)}" if source.legal_files else ""
        lines.append(f"{source.role} {source.name}: {source.license or 'it gives no license'}{files}")
    return list(dict.fromkeys(lines))


def _with_base(card: Card, config: Mapping[str, Any]) -> Card:
    named = config.get("base_model_name_or_path", config.get("model"))  # the second is MLX's
    found = repository_of(named) if isinstance(named, str) else None
    return Card(**{**vars(card), "base_models": (found,)}) if found else card


def _json(path: Path, name: str) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / name
    try:
        return read_json_object(file, name)
    except InputError:
        return {}


def _legal_files(path: Path) -> tuple[str, ...]:
    directory = path if path.is_dir() else path.parent
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError:
        return ()
    legal = [name for name in names if any(fnmatch(name.lower(), pattern) for pattern in _LEGAL)]
    return tuple(filter(None, map(brief_name, legal[:_MOST_FILES])))

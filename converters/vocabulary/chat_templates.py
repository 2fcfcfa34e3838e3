"""Chat templates: one, or several with names, from the four places in which transformers has kept them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.errors import FileMissingError, FormatError, system_reason
from converters.gguf_file import Value, entry_bytes, text
from converters.gguf_types import Kind
from converters.paths import is_there, read_bytes, read_json_object
from converters.vocabulary.sources import TokenizerSources
from converters.vocabulary.tokens import utf8

_KEY, _NAMES = "tokenizer.chat_template", "tokenizer.chat_templates"
_MOST = 64  # templates of one model
_WHAT = "chat template"


def chat_template_entries(sources: TokenizerSources) -> list[tuple[str, bytes]]:
    """The keys of a tokenizer's templates: the default one, and others under their names.

    As upstream has it, what tokenizer_config.json says counts before the files beside it, and without that file there
    are none.

    Raises:
        FormatError: a template that is no text.
    """
    if not sources.tokenizer_config:
        return []
    config = sources.tokenizer_config
    found = config["chat_template"] if "chat_template" in config else _beside(sources.directory)
    if isinstance(found, str):
        return [_entry(_KEY, found, sources.config_file)]
    if not isinstance(found, list):
        return []
    named = _named(found[:_MOST])
    entries = [
        _entry(f"{_KEY}.{name}", named[name], sources.config_file) for name in named if name != "default"
    ]  # fmt: skip
    if entries:
        names = tuple(name for name in named if name != "default")
        entries.append((_NAMES, entry_bytes(_NAMES, Value(Kind.ARRAY, names, Kind.STRING))))
    if "default" in named:
        entries.append(_entry(_KEY, named["default"], sources.config_file))
    return entries


def _entry(key: str, template: str, file: Path) -> tuple[str, bytes]:
    utf8(template, "the chat template", file)
    return key, entry_bytes(key, text(template))


def _named(choices: Sequence[Any]) -> Mapping[str, str]:
    """Templates by name, with nothing in the names but letters and digits."""
    named = {}
    for choice in choices:
        name, template = (choice.get("name"), choice.get("template")) if isinstance(choice, dict) else (None, None)
        if isinstance(name, str) and name and isinstance(template, str):
            named["".join(sign if sign.isascii() and sign.isalnum() else "_" for sign in name[:64])] = template
    return named


def _beside(directory: Path) -> Any:
    """A template of a file of its own; with those that chat_template.jinja has beside it, a list."""
    jinja, old = directory / "chat_template.jinja", directory / "chat_template.json"
    if is_there(jinja):
        template, more = _read(jinja), _additional(directory / "additional_chat_templates")
        return [{"name": "default", "template": template}, *more] if more else template
    return read_json_object(old, _WHAT).get("chat_template") if is_there(old) else None


def _additional(directory: Path) -> list[dict[str, str]]:
    try:
        paths = sorted(directory.glob("*.jinja"))
    except OSError as error:
        raise FileMissingError(f"{_WHAT}s: {system_reason(error)}", file=directory) from None
    return [{"name": path.stem, "template": _read(path)} for path in paths[:_MOST]]


def _read(path: Path) -> str:
    try:
        # As a text file is read: every kind of line end becomes one.
        return read_bytes(path, _WHAT).decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise FormatError(f"{_WHAT} is not UTF-8 text", file=path) from None

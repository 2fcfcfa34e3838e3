"""The files of a directory that say something of its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.errors import FormatError
from converters.paths import is_there, read_json_object
from converters.vocabulary.tokenizer_json import AddedToken, TokenizerJson, added_token, read_tokenizer_json
from converters.vocabulary.tokens import MAX_TOKENS, shown

_MODEL, _JSON, _CONFIG, _ADDED = "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_LONGEST_NUMBER = 9  # digits


ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Of special tokens, as tokenizer_config.json and config.json name them."""


def content_of(entry: Any) -> str | None:
    """A token's text, which stands by itself or in an object."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


@dataclass(frozen=True)
class TokenizerSources:
    """A tokenizer's files, each read when it is asked for.

    Attributes:
        directory: where they are.
        config: the model's config.json.
        pieces_of: another directory whose tokenizer.model counts, where this one has none: what transformers saves
            beside an adapter leaves it out.
    """

    directory: Path
    config: Mapping[str, Any]
    pieces_of: Path | None = None

    @property
    def sentencepiece(self) -> Path | None:
        """tokenizer.model, where there is one."""
        for place in (self.directory, self.pieces_of):
            if place is not None and is_there(place / _MODEL):
                return place / _MODEL
        return None

    @cached_property
    def tokenizer_json(self) -> TokenizerJson | None:
        path = self.directory / _JSON
        return read_tokenizer_json(path) if is_there(path) else None

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """tokenizer_config.json; empty where there is none."""
        path = self.directory / _CONFIG
        return read_json_object(path, _CONFIG) if is_there(path) else {}

    @property
    def config_file(self) -> Path:
        """tokenizer_config.json's place, for messages."""
        return self.directory / _CONFIG

    def added_by_file(self) -> Iterator[tuple[str, int]]:
        """What added_tokens.json lists, which tokenizers of old wrote."""
        path = self.directory / _ADDED
        if not is_there(path):
            return
        for content, number in read_json_object(path, _ADDED).items():
            token = added_token({"content": content, "id": number}, None, path)
            yield token.content, token.number

    def added_by_config(self) -> Sequence[AddedToken]:
        """What tokenizer_config.json lists, by number."""
        found = self.tokenizer_config.get("added_tokens_decoder") or {}
        if not isinstance(found, dict):
            told = f'"added_tokens_decoder" is a {type(found).__name__}, expected an object'
            raise FormatError(told, file=self.config_file)
        return [added_token(entry, self._number(key), self.config_file) for key, entry in found.items()]

    def named(self) -> Sequence[str]:
        """What tokenizer_config.json calls special tokens, each once, in the order in which transformers adds them."""
        config = self.tokenizer_config
        entries: list[Any] = [config.get(f"{role}_token") for role in ROLES]
        for key in ("extra_special_tokens", "additional_special_tokens"):
            more = config.get(key)
            entries += more if isinstance(more, list) else []
        contents = [content_of(entry) for entry in entries]
        listed = dict.fromkeys(content for content in contents if content)
        return [added_token({"content": content}, 0, self.config_file).content for content in listed]

    def _number(self, key: str) -> int:
        if key.isascii() and key.isdigit() and len(key) <= _LONGEST_NUMBER:
            return int(key)
        told = f'"added_tokens_decoder" has the key {shown(key)}, expected a number of 0 to {MAX_TOKENS - 1}'
        raise FormatError(told, file=self.config_file)

    def used(self) -> tuple[Path, ...]:
        """Those of the files that are there."""
        names = (_JSON, _CONFIG, _ADDED, "chat_template.jinja", "chat_template.json")
        found = [self.directory / name for name in names if is_there(self.directory / name)]
        pieces = self.sentencepiece
        return (*([] if pieces is None else [pieces]), *found)

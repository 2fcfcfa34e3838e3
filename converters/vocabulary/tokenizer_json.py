"""tokenizer.json, the tokenizers library's file: its model, its added tokens and the sections around them.

A file of strangers of up to 48 MB, so that what it may cost is counted before it is parsed, and every number and text
is looked at before it is used. The library gives added tokens their numbers by the order in which they stand, whatever
the file says; one that says something else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.errors import FormatError
from converters.paths import read_bytes, without_collecting
from converters.vocabulary.tokens import MAX_TOKENS, shown, utf8

_MAX_FILE = 48 << 20  # bytes; Gemma 3's has 33 million
_MAX_OBJECTS, _MAX_VALUES = 1 << 16, 1 << 22
_MAX_TOKEN = 1 << 12  # letters
_WHAT = "tokenizer.json"

Section = Mapping[str, Any]


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in a text before anything else."""

    number: int
    content: str
    special: bool
    normalized: bool


@dataclass(frozen=True)
class TokenizerJson:
    """A parsed tokenizer.json; each part is checked when it is asked for."""

    file: Path
    data: Mapping[str, Any]

    def section(self, name: str) -> Section:
        """A part of the file; empty where it has none."""
        found = self.data.get(name)
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise FormatError(f"{name!r} of {_WHAT} is a {type(found).__name__}, expected an object", file=self.file)
        return found

    @property
    def model(self) -> Section:
        return self.section("model")

    @cached_property
    def vocab(self) -> Mapping[str, int]:
        """The model's tokens with their numbers, each of which stands once.

        Raises:
            FormatError: it has none, or anything else in their place.
        """
        found = self.model.get("vocab")
        if not isinstance(found, dict) or not found:
            raise FormatError("its model has no table of tokens with their numbers", file=self.file)
        if len(found) > MAX_TOKENS:
            raise FormatError(f"has {len(found)} tokens; at most {MAX_TOKENS} are read", file=self.file)
        for token, number in found.items():
            _check_token(token, number, self.file)
        if len(set(found.values())) != len(found):
            raise FormatError(f"tokens {_same_number(found)} have the same number", file=self.file)
        return found

    @cached_property
    def merges(self) -> Sequence[tuple[str, str]]:
        """The model's merges, of tokens that it has.

        Raises:
            FormatError: it has others, or none.
        """
        found = self.model.get("merges")
        if not isinstance(found, list):
            raise FormatError("its model has no list of merges", file=self.file)
        vocab, made = self.vocab, []
        for number, merge in enumerate(found):
            parts = merge.split(" ") if type(merge) is str else merge
            if type(parts) is not list or len(parts) != 2 or type(parts[0]) is not str or type(parts[1]) is not str:
                told = f'merge {number} is {shown(str(merge))}, expected "a b" or ["a", "b"]'
                raise FormatError(told, file=self.file)
            left, right = parts
            if left not in vocab or right not in vocab or left + right not in vocab:
                missing = next(token for token in (left, right, left + right) if token not in vocab)
                raise FormatError(f"merge {number} names {shown(missing)}, which is no token", file=self.file)
            made.append((left, right))
        return made

    @cached_property
    def added(self) -> Sequence[AddedToken]:
        """The added tokens, as they stand.

        Raises:
            FormatError: one is malformed, or has a number that the tokenizers library would not give it.
        """
        found = self.data.get("added_tokens") or []
        if not isinstance(found, list):
            told = f'"added_tokens" is a {type(found).__name__}, expected a list'
            raise FormatError(told, file=self.file)
        return [added_token(entry, None, self.file) for entry in found]

    def check_numbers(self, added: Sequence[AddedToken]) -> None:
        """Raises FormatError if the tokenizers library gives an added token another number than the file."""
        highest, numbers = -1, dict[str, int]()
        for token in added:
            expected = self.vocab.get(token.content, numbers.get(token.content))
            if expected is None:
                expected = max(len(self.vocab), highest + 1)
            if token.number != expected:
                told = f"the added token {shown(token.content)} has the number {token.number}"
                raise FormatError(f"{told}, and the tokenizers library gives it {expected}", file=self.file)
            numbers[token.content] = expected
            highest = max(highest, expected)


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """Reads a tokenizer.json.

    Raises:
        FileMissingError: it can't be read. FormatError: it is no JSON object, or larger than any in use.
    """
    data = read_bytes(path, _WHAT, _MAX_FILE)
    objects, values = data.count(b"{"), data.count(b"[") + data.count(b":")
    if objects > _MAX_OBJECTS or values > _MAX_VALUES or data.count(b",") > 4 * _MAX_VALUES:
        raise FormatError(f"{_WHAT} holds about {max(objects, values)} values, more than any in use", file=path)
    return TokenizerJson(path, _parsed(data, path))


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    try:
        with without_collecting():
            value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise FormatError(f"{_WHAT} is not UTF-8 text", file=path) from None
    except RecursionError:
        raise FormatError(f"{_WHAT} is nested too deeply", file=path) from None
    except ValueError as error:  # also absurdly long integers and doubled keys
        raise FormatError(f"{_WHAT} is no valid JSON: {error}", file=path) from None
    if not isinstance(value, dict):
        raise FormatError(f"{_WHAT} holds a {type(value).__name__}, expected a JSON object", file=path)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice")
    return made


def added_token(entry: Any, number: int | None, file: Path) -> AddedToken:
    """One added token as tokenizer.json lists it, or tokenizer_config.json under its number."""
    if not isinstance(entry, dict):
        raise FormatError(f"an added token is {shown(str(entry))}, expected an object", file=file)
    content, place = entry.get("content"), entry.get("id") if number is None else number
    if not isinstance(content, str):
        raise FormatError(f"an added token has the content {shown(str(content))}, expected a text", file=file)
    special, normalized = entry.get("special") is True, entry.get("normalized")
    return AddedToken(
        _check_token(content, place, file),
        content,
        special,
        normalized is True if normalized is not None else not special,
    )


def _check_token(token: str, number: Any, file: Path) -> int:
    """The number, once both are known to be sound."""
    if type(number) is not int or not 0 <= number < MAX_TOKENS:
        told = f"the token {shown(token)} has the number {shown(str(number))}, expected 0 to {MAX_TOKENS - 1}"
        raise FormatError(told, file=file)
    if not 0 < len(token) <= _MAX_TOKEN:
        raise FormatError(f"token {number} has {len(token)} letters, expected 1 to {_MAX_TOKEN}", file=file)
    if not token.isascii():
        utf8(token, f"token {number},", file)
    return number


def _same_number(vocab: Mapping[str, int]) -> str:
    first: dict[int, str] = {}
    for token, number in vocab.items():
        if number in first:
            return f"{shown(first[number])} and {shown(token)}"
        first[number] = token
    return "none"

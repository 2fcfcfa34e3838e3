"""The list of tokens that a vocabulary comes to, as the keys that llama.cpp reads."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from converters.errors import FormatError
from converters.gguf_file import Value, entry_bytes, stored_entry_bytes
from converters.gguf_types import Kind

MAX_TOKENS = 1 << 19
"""Twice as many as the largest vocabularies in use have."""

PADDING_SCORE, ADDED_SCORE = -10000.0, -1000.0
_SPACE = "▁"  # what SentencePiece has for a space

_PREFIX = "tokenizer.ggml."
_TYPES = _PREFIX + "token_type"
_LIST_HEAD = 16  # bytes before a list's items: two types and a count


class TokenType(IntEnum):
    """ggml's numbers, which are SentencePiece's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF holds it.

    Attributes:
        entries: every `tokenizer.*` key with its complete entry, see `gguf_file.entry_bytes`.
        size: how many tokens there are.
        notes: what a user should know of it.
        sources: the files it was read from.
    """

    entries: Sequence[tuple[str, bytes]]
    size: int
    notes: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()


@dataclass
class TokenTable:
    """Tokens while they are collected: at first all of them are unused, and called by their places.

    Attributes:
        scores: of a SentencePiece vocabulary; byte-level ones have none.
    """

    file: Path
    tokens: list[bytes] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] | None = None

    @classmethod
    def of(cls, vocabulary: Vocabulary, file: Path) -> TokenTable:
        """The tokens and types of a finished vocabulary."""
        entries, count = dict(vocabulary.entries), vocabulary.size
        lists = [entries.get(key, b"")[8 + len(key) + _LIST_HEAD :] for key in (_PREFIX + "tokens", _TYPES)]
        types = list(struct.unpack(f"<{count}i", lists[1])) if lists[1] else [int(TokenType.NORMAL)] * count
        return cls(file, strings_of(lists[0], count), types)

    @classmethod
    def padded(cls, file: Path, rows: int, *, scored: bool) -> TokenTable:
        """As many unused tokens as the embedding has rows."""
        if not 0 < rows <= MAX_TOKENS:
            raise FormatError(f"the embedding has {rows} rows; vocabularies of 1 to {MAX_TOKENS} are read", file=file)
        names = [f"[PAD{number}]".encode() for number in range(rows)]
        return cls(file, names, [TokenType.UNUSED] * rows, [PADDING_SCORE] * rows if scored else None)

    def put(self, number: int, token: bytes, kind: TokenType, score: float = ADDED_SCORE) -> None:
        """Gives a place its token."""
        self.tokens[number], self.types[number] = token, kind
        if self.scores is not None:
            self.scores[number] = score

    def entries(self, model: str, pre: str) -> list[tuple[str, bytes]]:
        """The keys of the tokens, once they are known to be sound.

        Raises:
            FormatError: two tokens are the same, at which llama.cpp aborts.
        """
        self._check_unique()
        listed = [("model", _text(_PREFIX + "model", model)), ("pre", _text(_PREFIX + "pre", pre))]
        listed.append(("tokens", strings_entry(_PREFIX + "tokens", self.tokens)))
        if self.scores is not None:
            listed.append(("scores", scores_entry(self.scores)))
        listed.append(("token_type", types_entry(self.types)))
        return [(_PREFIX + key, data) for key, data in listed]

    def _check_unique(self) -> None:
        # llama.cpp reads them as C strings.
        seen = {token.partition(b"\0")[0] for token in self.tokens}
        if len(seen) == len(self.tokens):
            return
        places: dict[bytes, int] = {}
        for number, token in enumerate(self.tokens):
            first = places.setdefault(token.partition(b"\0")[0], number)
            if first != number:
                told = f"tokens {first} and {number} are both {shown(token)}, on which llama.cpp aborts; {VOCAB_FROM}"
                raise FormatError(told, file=self.file)


VOCAB_FROM = "take the vocabulary from a GGUF file of the same model: --vocab-from FILE.gguf"
"""The way out of every tokenizer that can't be brought over."""


def looks_special(token: str) -> bool:
    """Whether upstream takes an added token for a control token although its model does not say so."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def added_type(token: str, *, special: bool) -> tuple[str, TokenType]:
    """An added token's text and type; llama.cpp looks for the text itself, so spaces are spaces."""
    if special or looks_special(token):
        return token, TokenType.CONTROL
    return token.replace(_SPACE, " "), TokenType.USER_DEFINED


def strings_entry(key: str, values: Sequence[bytes]) -> bytes:
    """A key with a list of texts."""
    payload = b"".join([part for value in values for part in (struct.pack("<Q", len(value)), value)])
    return stored_entry_bytes(key, Kind.ARRAY, Kind.STRING, len(values), payload)


def strings_of(payload: bytes, count: int) -> list[bytes]:
    """The texts of such a list, whose lengths are known to be sound."""
    found, at = [], 0
    for _ in range(count):
        end = at + 8 + struct.unpack_from("<Q", payload, at)[0]
        found.append(payload[at + 8 : end])
        at = end
    return found


def types_entry(types: Sequence[int]) -> bytes:
    """The types of all tokens."""
    payload = struct.pack(f"<{len(types)}i", *types)
    return stored_entry_bytes(_PREFIX + "token_type", Kind.ARRAY, Kind.INT32, len(types), payload)


def scores_entry(scores: Sequence[float]) -> bytes:
    """The scores of all tokens."""
    payload = struct.pack(f"<{len(scores)}f", *scores)
    return stored_entry_bytes(_PREFIX + "scores", Kind.ARRAY, Kind.FLOAT32, len(scores), payload)


def plain(token: bytes) -> bytes:
    """A token for comparing: added ones have spaces where pieces have SentencePiece's."""
    return token.replace(_SPACE.encode(), b" ")


def utf8(text: str, what: str, file: Path) -> bytes:
    """A text's bytes.

    Raises:
        FormatError: JSON's escapes have put half a character into it.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise FormatError(f"{what} {shown(text)} holds a surrogate, half a character", file=file) from None


def shown(token: str | bytes) -> str:
    """A token from a file as messages quote it."""
    return ascii(token[:60]) if isinstance(token, str) else ascii(token[:60].decode("utf-8", "replace"))


def _text(key: str, value: str) -> bytes:
    return entry_bytes(key, Value(Kind.STRING, value))

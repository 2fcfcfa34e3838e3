"""tokenizer.model, SentencePiece's file: the few fields of its protocol buffers that llama.cpp needs.

    ModelProto       1 pieces, 2 trainer_spec, 3 normalizer_spec
    SentencePiece    1 piece (text), 2 score (float), 3 type
    TrainerSpec      3 model_type
    NormalizerSpec   3 add_dummy_prefix

A field is a number `tag << 3 | wire type` and what the wire type says: a varint (0), 8 bytes (1), a length and that
many bytes (2), 4 bytes (5). Every length is held against what its message has left before it is used.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from converters.errors import FormatError
from converters.paths import read_bytes
from converters.vocabulary.tokens import MAX_TOKENS, TokenType, shown

_MAX_FILE = 64 << 20  # bytes; Gemma's, the largest in use, has five million
_MAX_PIECE = 1 << 12  # bytes of one token
_MAX_OTHER = 64  # fields of the model beside its pieces; there are five
_MAX_IN_PIECE, _MAX_IN_SPEC = 4, 1 << 14  # fields: a piece has three, a specification one for every symbol it names
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_UNIGRAM = 1
_WHAT = "SentencePiece model"


@dataclass(frozen=True, slots=True)
class Piece:
    """One token; its number is its place in the list."""

    text: bytes
    score: float
    kind: TokenType


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says.

    Attributes:
        unigram: whether it looks for the most likely pieces, where llama.cpp merges by score as BPE does.
        space_prefix: whether it puts a space in front of every text.
    """

    file: Path
    pieces: tuple[Piece, ...]
    unigram: bool
    space_prefix: bool


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Reads and checks a tokenizer.model.

    Raises:
        FileMissingError: it can't be read. FormatError: it is damaged, or holds what no such file does.
    """
    data = read_bytes(path, _WHAT, _MAX_FILE)
    pieces: list[Piece] = []
    unigram, prefix, others = True, True, 0  # what is left out has the default of its message
    try:
        for tag, value in _fields(data, 0, len(data), MAX_TOKENS + _MAX_OTHER):
            if tag == 1 and isinstance(value, tuple):
                pieces.append(_piece(data, value, len(pieces)))
                continue
            others += 1
            _check_others(others)
            if tag == 2 and isinstance(value, tuple):
                unigram = _last(data, value, 3, _UNIGRAM) == _UNIGRAM
            elif tag == 3 and isinstance(value, tuple):
                prefix = _last(data, value, 3, 1) != 0
    except _DamagedError as error:
        raise FormatError(f"is no {_WHAT}, or a damaged one: {error}", file=path) from None
    _check(pieces, path)
    return SentencePieceModel(path, tuple(pieces), unigram, prefix)


class _DamagedError(ValueError):
    """What is wrong with the bytes."""


def _fields(data: bytes, at: int, end: int, most: int) -> Iterator[tuple[int, int | bytes | tuple[int, int]]]:
    """The fields of a message, so many at most: tag, and the number, the fixed bytes, or where the bytes lie."""
    while at < end:
        most -= 1
        if most < 0:
            raise _DamagedError(f"at byte {at} a message goes on that has more fields than any in use")
        key, at = _varint(data, at, end)
        tag, wire = key >> 3, key & 7
        if tag == 0:
            raise _DamagedError(f"a field at byte {at} has the number 0")
        if wire == _VARINT:
            number, at = _varint(data, at, end)
            yield tag, number
            continue
        if wire == _BYTES:
            length, at = _varint(data, at, end)
        elif wire in (_EIGHT, _FOUR):
            length = 8 if wire == _EIGHT else 4
        else:
            raise _DamagedError(f"a field at byte {at} has the wire type {wire}")
        if length > end - at:
            raise _DamagedError(f"a field at byte {at} claims {length} bytes and {end - at} are left")
        yield tag, (at, at + length) if wire == _BYTES else data[at : at + length]
        at += length


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    if at < end and data[at] < 0x80:
        return data[at], at + 1
    number = 0
    for place in range(10):
        if at + place >= end:
            raise _DamagedError(f"a number at byte {at} is cut off")
        byte = data[at + place]
        number |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return number, at + place + 1
    raise _DamagedError(f"a number at byte {at} has more than 10 bytes")


def _piece(data: bytes, place: tuple[int, int], number: int) -> Piece:
    if number >= MAX_TOKENS:
        raise _DamagedError(f"more than {MAX_TOKENS} pieces")
    text, score, kind = b"", 0.0, int(TokenType.NORMAL)
    for tag, value in _fields(data, *place, _MAX_IN_PIECE):
        if tag == 1 and isinstance(value, tuple):
            text = data[value[0] : value[1]]
        elif tag == 2 and isinstance(value, bytes) and len(value) == 4:
            (score,) = struct.unpack("<f", value)
        elif tag == 3 and isinstance(value, int):
            kind = value
    if not 0 < len(text) <= _MAX_PIECE:
        raise _DamagedError(f"piece {number} has {len(text)} bytes, expected 1 to {_MAX_PIECE}")
    if not math.isfinite(score):
        raise _DamagedError(f"piece {number} has the score {score}")
    if not TokenType.NORMAL <= kind <= TokenType.BYTE:
        raise _DamagedError(f"piece {number} has the type {kind}; there are 1 to {max(TokenType)}")
    return Piece(text, score, TokenType(kind))


def _check_others(count: int) -> None:
    if count > _MAX_OTHER:
        raise _DamagedError(f"more than {_MAX_OTHER} fields that are no pieces")


def _last(data: bytes, place: tuple[int, int], wanted: int, default: int) -> int:
    """A number of a message; the last one counts."""
    found = [value for tag, value in _fields(data, *place, _MAX_IN_SPEC) if tag == wanted and isinstance(value, int)]
    return found[-1] if found else default


def _check(pieces: list[Piece], path: Path) -> None:
    if not pieces:
        raise FormatError(f"is no {_WHAT}: it has no pieces", file=path)
    seen: set[bytes] = set()
    for number, piece in enumerate(pieces):
        try:
            piece.text.decode()
        except UnicodeDecodeError:
            raise FormatError(f"piece {number}, {piece.text[:60]!r}, is not UTF-8", file=path) from None
        if piece.text in seen:
            raise FormatError(f"piece {number}, {shown(piece.text)}, stands twice", file=path)
        seen.add(piece.text)

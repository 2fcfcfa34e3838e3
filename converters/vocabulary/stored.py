"""Vocabularies out of GGUF files: copied byte for byte, or with the tokens that an adapter brings."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

from converters.errors import FileMissingError, FormatError, MismatchError, UnsupportedError, system_reason
from converters.gguf_file import stored_entry_bytes
from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader
from converters.gguf_types import Kind
from converters.vocabulary.bpe import all_added, bpe_tokens
from converters.vocabulary.chat_templates import chat_template_entries
from converters.vocabulary.sentencepiece_model import read_sentencepiece_model
from converters.vocabulary.sources import TokenizerSources
from converters.vocabulary.spm import spm_tokens
from converters.vocabulary.spm_json import is_like_sentencepiece
from converters.vocabulary.tokens import (
    ADDED_SCORE,
    MAX_TOKENS,
    PADDING_SCORE,
    TokenTable,
    TokenType,
    Vocabulary,
    added_type,
    plain,
    scores_entry,
    shown,
    strings_entry,
    strings_of,
    types_entry,
)

_PREFIX, _TEMPLATES = "tokenizer.", "tokenizer.chat_template"
_MODEL, _TOKENS = "tokenizer.ggml.model", "tokenizer.ggml.tokens"
_TYPES, _SCORES = "tokenizer.ggml.token_type", "tokenizer.ggml.scores"
_LISTS = {_TOKENS: Kind.STRING, _TYPES: Kind.INT32, _SCORES: Kind.FLOAT32}


def vocabulary_from_gguf(path: Path, rows: int, architecture: str | None = None) -> Vocabulary:
    """Every `tokenizer.*` key of a GGUF file, byte for byte; of a split model, its first file.

    With fewer tokens than the embedding has rows, as before padding, unused ones follow: llama.cpp wants one for each.

    Args:
        rows: of the embedding.
        architecture: GGUF's name of the model's; None: whatever the file has.

    Raises:
        FileMissingError: it can't be read. FormatError: it is damaged. UnsupportedError: big-endian.
        MismatchError: it has no vocabulary, or one with more tokens than the embedding has rows; or it is of a model
            of another architecture.
    """
    header = read_gguf_header(path, whole=False)
    _check_architecture(header, architecture)
    size = _size(header, rows)
    _check_lists(header)
    if size == rows:
        return Vocabulary(_copied(header), size, (), (path,))
    table = _table(header)
    _pad(table, rows)
    note = f"{path} has {size} tokens and the embedding {rows} rows: unused tokens were added"
    return Vocabulary(_replaced(header, table), rows, (note,), (path,))


def extended_vocabulary(header: GgufHeader, tokenizer_directory: Path, rows: int) -> Vocabulary:
    """A GGUF model's vocabulary with the added tokens that a directory's tokenizer has beyond it.

    The directory's chat template comes with them, where it has one. Everything else stays: scores, merges, special
    tokens.

    Args:
        header: of the model, or of its first file.
        rows: of the extended embedding.

    Raises:
        FileMissingError: the directory has no tokenizer. FormatError: a file is damaged.
        MismatchError: its tokenizer has other tokens than the model's, or more than the embedding has rows.
    """
    size = _size(header, rows)
    table = _table(header)
    _pad(table, rows)
    sources = TokenizerSources(tokenizer_directory, {})
    known = known_tokens(sources, rows)
    _check_same(table, known, sources)
    new = [number for number, (_, kind) in known.items() if kind != TokenType.UNUSED and _is_free(table, number)]
    for number in new:
        table.put(number, *known[number], ADDED_SCORE)
    table.entries("", "")  # checks that no token stands twice
    notes = () if new or size == rows else (f"{tokenizer_directory} has no tokens beyond the model's {size}",)
    entries, templates = _replaced(header, table), chat_template_entries(sources)
    if templates:
        entries = (*(entry for entry in entries if not entry[0].startswith(_TEMPLATES)), *templates)
    return Vocabulary(entries, rows, notes, (header.path, *sources.used()))


def _check_architecture(header: GgufHeader, wanted: str | None) -> None:
    found = header.value("general.architecture")
    if wanted is not None and isinstance(found, str) and _TOKENS in header.entries and found != wanted:
        told = f"is of a model of the architecture {shown(found)}, expected {wanted!r}"
        raise MismatchError(f"{told}; take the vocabulary from a GGUF file of the same model", file=header.path)


def _size(header: GgufHeader, rows: int) -> int:
    if header.byte_order != "little":
        told = "its numbers are big-endian; take the vocabulary from a little-endian file"
        raise UnsupportedError(told, file=header.path)
    if not 0 < rows <= MAX_TOKENS:
        raise FormatError(
            f"the embedding has {rows} rows; vocabularies of 1 to {MAX_TOKENS} are read", file=header.path
        )
    entry = header.entries.get(_TOKENS)
    if entry is None or header.kind_of(_MODEL) is not Kind.STRING:
        raise MismatchError("has no vocabulary (tokenizer.ggml.tokens); name another GGUF file", file=header.path)
    if entry.item is not Kind.STRING:
        raise FormatError(f"{_TOKENS} is no list of texts", file=header.path)
    if entry.count > rows:
        told = f"has {entry.count} tokens, and the embedding has {rows} rows: it is another model's"
        raise MismatchError(told, file=header.path)
    return entry.count


def _copied(header: GgufHeader) -> tuple[tuple[str, bytes], ...]:
    """The entries as they are."""
    try:
        with header.path.open("rb") as file:
            found = []
            for key, entry in header.entries.items():
                if not key.startswith(_PREFIX):
                    continue
                file.seek(entry.offset)
                payload = file.read(entry.nbytes)
                if len(payload) != entry.nbytes:
                    raise FormatError("was changed while it was read", file=header.path)
                found.append((key, stored_entry_bytes(key, entry.kind, entry.item, entry.count, payload)))
    except OSError as error:
        raise FileMissingError(f"GGUF file: {system_reason(error)}", file=header.path) from None
    return tuple(found)


def _check_lists(header: GgufHeader) -> list[str]:
    """The lists that are there; raises FormatError where one has another length or type than llama.cpp expects."""
    count, found = header.entries[_TOKENS].count, []
    for key, item in _LISTS.items():
        entry = header.entries.get(key)
        if entry is None:
            continue
        if entry.item is not item or entry.count != count:
            told = f"{key} holds {entry.count} values, expected {count} of type {item.name}"
            raise FormatError(told, file=header.path)
        found.append(key)
    return found


def _table(header: GgufHeader) -> TokenTable:
    """The lists that grow with the vocabulary."""
    entries = dict(_copied(header))
    count = header.entries[_TOKENS].count
    lists: dict[str, bytes] = {}
    for key in _check_lists(header):
        nbytes = header.entries[key].nbytes
        lists[key] = entries[key][-nbytes:] if nbytes else b""
    types = list(struct.unpack(f"<{count}i", lists[_TYPES])) if _TYPES in lists else [int(TokenType.NORMAL)] * count
    scores = list(struct.unpack(f"<{count}f", lists[_SCORES])) if _SCORES in lists else None
    return TokenTable(header.path, strings_of(lists[_TOKENS], count), types, scores)


def _pad(table: TokenTable, rows: int) -> None:
    for number in range(len(table.tokens), rows):
        table.tokens.append(f"[PAD{number}]".encode())
        table.types.append(TokenType.UNUSED)
        if table.scores is not None:
            table.scores.append(PADDING_SCORE)


def _replaced(header: GgufHeader, table: TokenTable) -> tuple[tuple[str, bytes], ...]:
    """All entries, with those lists anew."""
    new = {_TOKENS: strings_entry(_TOKENS, table.tokens), _TYPES: types_entry(table.types)}
    if table.scores is not None:
        new[_SCORES] = scores_entry(table.scores)
    kept = dict(_copied(header))
    return tuple((kept | new).items())


def stored_tokens(header: GgufHeader) -> Mapping[int, tuple[bytes, TokenType]]:
    """A GGUF model's tokens by number, those of an unknown type as normal ones.

    Raises:
        MismatchError: it has no vocabulary. FormatError: it is damaged.
    """
    if _TOKENS not in header.entries or header.entries[_TOKENS].item is not Kind.STRING:
        raise MismatchError("has no vocabulary (tokenizer.ggml.tokens)", file=header.path)
    table, known = _table(header), set(TokenType)
    listed = enumerate(zip(table.tokens, table.types, strict=True))
    return {number: (token, TokenType(kind) if kind in known else TokenType.NORMAL) for number, (token, kind) in listed}


def known_tokens(sources: TokenizerSources, rows: int) -> Mapping[int, tuple[bytes, TokenType]]:
    """A directory's tokens by number, whatever its pre-tokenizer.

    Raises:
        FileMissingError: it has no tokenizer. FormatError: a file is damaged.
    """
    tokenizer = sources.tokenizer_json
    if tokenizer is not None and not is_like_sentencepiece(tokenizer):
        table = bpe_tokens(sources, tokenizer, rows)
    elif tokenizer is not None:
        return _of_json(sources, rows)
    elif sources.sentencepiece is not None:
        model = read_sentencepiece_model(sources.sentencepiece)
        table, _ = spm_tokens(sources, model, rows, plainly=False)
    else:
        told = "has no tokenizer.json and no tokenizer.model, so the new tokens are not known"
        raise FileMissingError(told, file=sources.directory)
    listed = zip(table.tokens, table.types, strict=True)
    return {number: (token, TokenType(kind)) for number, (token, kind) in enumerate(listed)}


def _is_free(table: TokenTable, number: int) -> bool:
    return table.types[number] == TokenType.UNUSED and table.tokens[number].startswith(b"[PAD")


def _of_json(sources: TokenizerSources, rows: int) -> Mapping[int, tuple[bytes, TokenType]]:
    """The tokens of a tokenizer.json that transformers made of SentencePiece's."""
    tokenizer = sources.tokenizer_json
    assert tokenizer is not None, "asked for without one"
    known = {number: (token.encode(), TokenType.NORMAL) for token, number in tokenizer.vocab.items()}
    for entry in all_added(sources, tokenizer, rows):
        text, kind = added_type(entry.content, special=entry.special)
        known[entry.number] = text.encode(), kind
    return known


def _check_same(table: TokenTable, known: Mapping[int, tuple[bytes, TokenType]], sources: TokenizerSources) -> None:
    """That the tokens that the model already has are the directory's."""
    for number, token in enumerate(table.tokens):
        if table.types[number] == TokenType.UNUSED:
            continue
        found = known.get(number, (b"", TokenType.UNUSED))[0]
        if plain(found) != plain(token):
            told = f"token {number} is {shown(found)}, and {shown(token)} in {table.file}"
            raise MismatchError(f"{told}: the tokenizer of another model", file=sources.directory)
    beyond = max(known, default=0)
    if beyond >= len(table.tokens):
        told = f"has a token with the number {beyond}, and the embedding has {len(table.tokens)} rows"
        raise MismatchError(told, file=sources.directory)

"""Byte-level BPE: tokenizer.json's tokens, merges and added tokens as llama.cpp's `gpt2` vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from converters.errors import FormatError
from converters.vocabulary.pre_tokenizer import PreTokenizer, pre_tokenizer_of
from converters.vocabulary.sources import TokenizerSources
from converters.vocabulary.special_tokens import SpecialTokens
from converters.vocabulary.tokenizer_json import AddedToken, TokenizerJson
from converters.vocabulary.tokens import TokenTable, TokenType, added_type, shown, strings_entry

_MERGES = "tokenizer.ggml.merges"
_SPACE_IN_MERGE = "Ġ"


def byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in a byte-level vocabulary: printable ones for themselves, the others in order.

    The correspondence is GPT-2's.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


def bpe_entries(
    sources: TokenizerSources, tokenizer: TokenizerJson, architecture: str, rows: int
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]], PreTokenizer]:
    """The keys of the tokens, those of the merges, and the pre-tokenizer.

    Raises:
        FormatError: tokens or merges that contradict each other or the embedding.
        UnsupportedError: a pre-tokenizer that llama.cpp has no name for.
    """
    cleans = sources.tokenizer_config.get("clean_up_tokenization_spaces") is True
    form = pre_tokenizer_of(tokenizer, architecture, cleans=cleans)
    entries = bpe_tokens(sources, tokenizer, rows).entries("gpt2", form.name)
    merges = [_merge(left, right) for left, right in tokenizer.merges]
    if not merges:
        raise FormatError("its model has no merges, and llama.cpp does not load such a vocabulary", file=tokenizer.file)
    return entries, [(_MERGES, strings_entry(_MERGES, merges))], form


def _merge(left: str, right: str) -> bytes:
    """Both parts with a space between, so that spaces inside of them must be letters."""
    if " " in left or " " in right:
        left, right = left.replace(" ", _SPACE_IN_MERGE), right.replace(" ", _SPACE_IN_MERGE)
    return f"{left} {right}".encode()


def bpe_tokens(sources: TokenizerSources, tokenizer: TokenizerJson, rows: int) -> TokenTable:
    """Every token at its place; places without one are unused.

    Raises:
        FormatError: a token beyond the embedding's rows, or two at one place.
    """
    table = TokenTable.padded(tokenizer.file, rows, scored=False)
    for token, number in tokenizer.vocab.items():
        check_place(number, token, rows, tokenizer)
        table.put(number, token.encode(), TokenType.NORMAL)
    for entry in all_added(sources, tokenizer, rows):
        check_place(entry.number, entry.content, rows, tokenizer)
        table.put(entry.number, *_added(entry))
    return table


def all_added(sources: TokenizerSources, tokenizer: TokenizerJson, rows: int) -> Sequence[AddedToken]:
    """The added tokens of tokenizer.json, and those with which tokenizer_config.json completes or overrides them.

    Raises:
        FormatError: one is malformed, or has a number that the tokenizers library would not give it.
    """
    added = [*tokenizer.added, *sorted(sources.added_by_config(), key=lambda token: token.number)]
    tokenizer.check_numbers(added)
    known = tokenizer.vocab.keys() | {token.content for token in added}
    following = max(len(tokenizer.vocab), *(token.number + 1 for token in added), 0)
    # transformers gives what is only named the next numbers. A model whose embedding has no rows for them knows no such
    # tokens.
    new = [content for content in sources.named() if content not in known][: max(0, rows - following)]
    flags = {"special": True, "normalized": False}
    return [*added, *(AddedToken(number, content, **flags) for number, content in enumerate(new, following))]


def check_place(number: int, token: str, rows: int, tokenizer: TokenizerJson) -> None:
    """Raises FormatError if the embedding has no row for a token."""
    if number >= rows:
        told = f"the token {shown(token)} has the number {number}, and the embedding has {rows} rows"
        raise FormatError(f"{told}: the tokenizer is another model's, or was extended after it", file=tokenizer.file)


def _added(token: AddedToken) -> tuple[bytes, TokenType]:
    """As llama.cpp looks for it in a text that was not normalized."""
    content = token.content if token.normalized else _decoded(token.content)
    text, kind = added_type(content, special=token.special)
    return text.encode(), kind


def _decoded(content: str) -> str:
    """What a byte-level decoder makes of an added token: bytes, if all of its letters stand for some."""
    if content.isascii() and " " not in content and content.isprintable():
        return content
    letters = byte_letters()
    if any(letter not in letters for letter in content):
        return content
    return bytes(letters[letter] for letter in content).decode("utf-8", "replace")


def adds_explicitly(special: SpecialTokens, form: PreTokenizer) -> SpecialTokens:
    """Says that no text begins with bos where llama.cpp would add one by the pre-tokenizer's name alone."""
    if form.adds_bos:
        special.adds.setdefault("bos", False)
    return special

"""SentencePiece vocabularies: tokenizer.model with what other files lay over it, as llama.cpp's `llama` vocabulary."""

from __future__ import annotations

from collections.abc import Callable

from converters.vocabulary.sentencepiece_model import SentencePieceModel
from converters.vocabulary.sources import TokenizerSources
from converters.vocabulary.tokens import TokenTable, TokenType, added_type

Overlay = Callable[[int, str, bool], None]


def spm_tokens(
    sources: TokenizerSources, model: SentencePieceModel, rows: int, *, plainly: bool
) -> tuple[TokenTable, tuple[str, ...]]:
    """Every token at its place, and notes on those that have none.

    Pieces first, then added_tokens.json, then tokenizer_config.json; tokenizer.json, which transformers alone would
    write today, only for places that still have no token.

    Args:
        plainly: as upstream has it for Phi 3: an added token is a control token if it is said to be, not if it looks
            so, and tokenizer.json counts last and everywhere.
    """
    table, beyond = TokenTable.padded(model.file, rows, scored=True), set[int]()
    for number, piece in enumerate(model.pieces[:rows]):
        # Upstream does not tell pieces that users defined from others; the overlays do.
        kind = TokenType.NORMAL if piece.kind is TokenType.USER_DEFINED else piece.kind
        table.put(number, piece.text, kind, piece.score)

    def lay(number: int, content: str, kind: TokenType) -> None:
        if number < rows:
            table.put(number, content.encode(), kind)
        else:
            beyond.add(number)

    for content, number in sources.added_by_file():
        lay(number, content, TokenType.USER_DEFINED)
    for token in sources.added_by_config():
        lay(token.number, *_typed(token.content, special=token.special, plainly=plainly))
    for token in sources.tokenizer_json.added if sources.tokenizer_json is not None else ():
        free = token.number >= len(model.pieces) and (
            token.number >= rows or table.types[token.number] == TokenType.UNUSED
        )
        if plainly or free:
            lay(token.number, *_typed(token.content, special=token.special, plainly=plainly))
    return table, _notes(len(model.pieces), rows, beyond)


def _typed(content: str, *, special: bool, plainly: bool) -> tuple[str, TokenType]:
    if plainly:
        return content, TokenType.CONTROL if special else TokenType.USER_DEFINED
    return added_type(content, special=special)


def _notes(pieces: int, rows: int, beyond: set[int]) -> tuple[str, ...]:
    count = max(0, pieces - rows) + len(beyond)
    if not count:
        return ()
    return (f"{count} tokens of the tokenizer have no row in the embedding, which has {rows}: left out",)

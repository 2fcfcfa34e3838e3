"""Whether a vocabulary that is taken from another file is the model's own: the same tokens at the same places.

A model runs with any vocabulary that has as many tokens, and talks nonsense with every other one than its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import FileMissingError, FormatError, InputError, MismatchError
from converters.gguf_metadata import GgufHeader
from converters.vocabulary.reading import read_vocabulary
from converters.vocabulary.sources import TokenizerSources
from converters.vocabulary.stored import known_tokens, stored_tokens
from converters.vocabulary.tokens import TokenTable, TokenType, Vocabulary, plain, shown

if TYPE_CHECKING:
    from converters.architectures.table import Architecture

_PADDING = 1024  # rows: what embeddings are filled up to is a multiple of this at most
Tokens = Mapping[int, tuple[bytes, TokenType]]


def compared_with_directory(
    found: Vocabulary,
    directory: Path,
    config: Mapping[str, Any],
    table: Architecture,
    rows: int,
    *,
    overlay: Path | None,
) -> tuple[str, ...]:
    """Compares a GGUF file's vocabulary with a checkpoint's own tokenizer, as far as that can be read.

    A pre-tokenizer that nobody knows is no hindrance: only tokens are compared.

    Args:
        config, table, rows, overlay: as for `read_vocabulary`.

    Returns:
        What a user should know of the comparison.

    Raises:
        MismatchError: they have other tokens.
    """
    place = overlay or directory
    sources = TokenizerSources(place, config, directory if overlay else None)
    attempts: tuple[Callable[[], Tokens], ...] = (
        lambda: _tokens(read_vocabulary(directory, config, table, rows, overlay), place),
        lambda: known_tokens(sources, rows),
    )
    for attempt in attempts:
        try:
            own = attempt()
        except FileMissingError:
            return _not_compared(found, place, f"{place} has no tokenizer", rows)
        except InputError as error:
            reason = error.message
        else:
            _check_same(found, own, place)
            return ()
    return _not_compared(found, place, f"the tokenizer in {place} can't be read ({reason[:120]})", rows)


def check_same_as_stored(found: Vocabulary, header: GgufHeader) -> None:
    """Compares a GGUF file's vocabulary with a GGUF model's own, if that has one.

    Raises:
        MismatchError: they have other tokens.
    """
    try:
        own = stored_tokens(header)
    except (MismatchError, FormatError):  # none, or one that is replaced for good reason
        return
    _check_same(found, own, header.path)


def _tokens(vocabulary: Vocabulary, place: Path) -> Tokens:
    table = TokenTable.of(vocabulary, place)
    listed = zip(table.tokens, table.types, strict=True)
    return {number: (token, TokenType(kind)) for number, (token, kind) in enumerate(listed)}


def _check_same(found: Vocabulary, own: Tokens, place: Path) -> None:
    """Places that are unused in the model may hold anything."""
    path = found.sources[0]
    theirs = TokenTable.of(found, path).tokens
    used = {number: token for number, (token, kind) in own.items() if kind != TokenType.UNUSED}
    other = [number for number, token in used.items()
             if number >= len(theirs) or plain(token) != plain(theirs[number])]  # fmt: skip
    if not other:
        return
    first = min(other)
    text = shown(theirs[first]) if first < len(theirs) else "missing"
    raise MismatchError(
        f"{len(other)} of its tokens are others than the {len(used)} of {place}, the first of them token {first}, "
        f"which is {text} and should be {shown(used[first])}: the vocabulary of another model",
        file=path,
    )


def _not_compared(found: Vocabulary, place: Path, reason: str, rows: int) -> tuple[str, ...]:
    told = f"the tokens of {found.sources[0]} could not be compared with the model's own: {reason}"
    spare = sum(kind == TokenType.UNUSED for kind in TokenTable.of(found, place).types)
    if spare < _PADDING:
        return (told,)
    return (f"{told}; {spare} of the embedding's {rows} rows have no token, more than padding: is it this model's?",)

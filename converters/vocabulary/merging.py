"""Byte pair encoding of single tokens, to see what merges can make."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence


def reaches_all(tokens: Iterable[str], merges: Sequence[tuple[str, str]]) -> bool:
    """Whether merging makes of every token's letters that token again.

    If so, it is the same whether a piece that is a token is merged or taken as it is. Tokens of one letter need none,
    and those that no merge ends in can't be made.
    """
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    made = {left + right for left, right in merges}
    return all(len(token) == 1 or (token in made and merged(token, ranks) == [token]) for token in tokens)


def merged(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """What is left of a word's letters once every pair that has a rank is merged, the lowest first."""
    parts = list(word)
    while len(parts) > 1:
        found = [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not found:
            break
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts

"""Which tokens' inputs make up a set: at most so many, evenly over the prompts, drawn by seed.

A prompt's tokens are much alike from one to the next, so within a prompt they are drawn one from each of equal
stretches, and no prompt gives more than its share while others could. What no position needs is not read.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable, Sequence

from safelora_gguf.smoke.protocol import Continued, Reading


def readings(continued: Collection[Continued], firsts: Sequence[int], limit: int, seed: int) -> tuple[Reading, ...]:
    """What is to be read of each prompt and its answer, and the positions that are kept.

    A prompt whose share is nothing keeps nothing and reads nothing.

    What is kept of a prompt doesn't depend on what the others say: a solution without some of them knows nothing of
    their text. Where there is not room for all, it depends on how long they are: a shorter one leaves some of its share
    to the others, and of those whose share this changes other positions are drawn.

    Args:
        continued: prompts with their answers, without errors.
        firsts: of each, the first position that may be kept.
        limit: most positions in all.
        seed: which ones; the same on every machine.

    Raises:
        ValueError: not as many firsts as prompts, or one below 0.
    """
    if min(firsts, default=0) < 0:
        raise ValueError("a position below 0")
    wholes = [one.prompt + one.answer for one in continued]
    open_to = [max(0, len(whole) - first) for whole, first in zip(wholes, firsts, strict=True)]
    counts = shares(open_to, limit, random.Random(seed))
    found = []
    for whole, first, size, share in zip(wholes, firsts, open_to, counts, strict=True):
        lot = random.Random(f"{seed} {whole}")  # by SHA-512, the same on every machine
        keep = tuple(first + place for place in _spread(size, share, lot))
        found.append(Reading(whole[: keep[-1] + 1] if keep else (), keep))
    return tuple(found)


def tail_firsts(continued: Collection[Continued], tail: int, begun: int) -> tuple[int, ...]:
    """Of each, the first of the prompt's last `tail` tokens, or of those after the `begun` ones that all begin with."""
    return tuple(max(begun, len(one.prompt) - tail) for one in continued)


def begun_alike(continued: Iterable[Continued]) -> int:
    """How many tokens all prompts begin with: the template's. Whatever is asked, a model's inputs there are the same,
    and often outsize (attention sinks), so that they would drown the others' in a mean.

    One prompt alone tells nothing of the template: 0.
    """
    prompts = {one.prompt for one in continued}
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # whatever these two share, all between them share
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), len(first))


def shares(sizes: Sequence[int], limit: int, lot: random.Random) -> tuple[int, ...]:
    """How many of each, at most `limit` in all: as even as can be, what small ones leave goes to the others, and what
    can't be divided goes to as many as it reaches, by lot."""
    left, level = max(0, limit), 0
    ascending = sorted(sizes)
    for place, size in enumerate(ascending):
        level = left // (len(ascending) - place)
        if size > level:
            break
        left -= size
    else:
        return tuple(sizes)
    lots = [lot.random() for _ in sizes]  # of all, so that one's size doesn't move the others' lots
    larger = [place for place, size in enumerate(sizes) if size > level]
    more = set(sorted(larger, key=lots.__getitem__)[: left - level * len(larger)])
    return tuple(min(size, level) + (place in more) for place, size in enumerate(sizes))


def _spread(size: int, count: int, lot: random.Random) -> list[int]:
    """`count` of the numbers below `size`, ascending: one of each of so many equal stretches."""
    bounds = [place * size // count for place in range(count + 1)] if count else [0]
    return [low + int(lot.random() * (high - low)) for low, high in itertools.pairwise(bounds)]

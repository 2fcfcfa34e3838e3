"""Dealing prompts into folds, so that each can be judged with an adapter that was repaired without it.

All prompts of a category are in one fold: prompts of one category are much alike, and a repair that has seen some of
them says little about the others. So are prompts of one text, whatever their categories.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from safelora_gguf.repair.prompt_halves import same_words


class Dealt(Protocol):
    """What a prompt is dealt by."""

    @property
    def kind(self) -> str: ...
    @property
    def category(self) -> str | None: ...
    @property
    def prompt(self) -> str: ...


_Sides = tuple[bool, bool]


def deal(prompts: Sequence[Dealt], count: int) -> tuple[int, ...]:
    """The fold of each prompt, from 0 on, deterministic.

    Prompts of one category stay together, whatever their kinds, and so do those of the same words, with all of their
    categories; others are dealt one by one. Of each kind the folds get as much as can be done by dealing the largest
    groups first. No fold holds all harmful prompts, nor all harmless ones: where there are fewer groups of either,
    there are fewer folds. One fold: nothing can be left out.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"{count} folds")
    groups = _groups(prompts)
    totals = Counter(prompt.kind for prompt in prompts)
    kinds = [Counter(prompts[place].kind for place in members) for members in groups]
    most = [sum(sides[side] for sides in map(_sides, kinds)) for side in (0, 1)]
    held = [Counter[str]() for _ in range(min([count, *(found for found in most if found)]))]
    folds = [0] * len(prompts)
    for number in sorted(range(len(groups)), key=lambda one: _order(kinds[one], totals)):
        fold = min(range(len(held)), key=lambda one: _cost(held[one], kinds[number], totals))
        held[fold] += kinds[number]
        for place in groups[number]:
            folds[place] = fold
    return tuple(folds)


def _groups(prompts: Sequence[Dealt]) -> list[list[int]]:
    """Places of the prompts that stay together, in the order of the first of each."""
    groups = [[place] for place in range(len(prompts))]
    keys = [
        ((same_words(prompt.prompt), "text"), *([] if prompt.category is None else [(prompt.category, "category")]))
        for prompt in prompts
    ]
    first: dict[tuple[str, str], int] = {}
    for place, own in enumerate(keys):
        for key in own:
            joined, other = groups[first.setdefault(key, place)], groups[place]
            if joined is not other:
                joined += other
                for member in other:
                    groups[member] = joined
    unique = {id(group): sorted(group) for group in groups}
    return sorted(unique.values())


def _sides(kinds: Counter[str]) -> _Sides:
    """Whether there are harmful ones, and whether there are others."""
    return kinds["harmful"] > 0, kinds.total() > kinds["harmful"]


def _order(group: Counter[str], totals: Counter[str]) -> tuple[bool, float]:
    """Those with harmful ones first, then by the share that they are of their kinds."""
    return not _sides(group)[0], -sum(number / totals[kind] for kind, number in group.items())


def _cost(held: Counter[str], group: Counter[str], totals: Counter[str]) -> tuple[int, float, int]:
    """First of all every fold gets something of both sides; then the least rise of the squared shares, summed over the
    kinds; then the smallest fold."""
    met = sum(here and there for here, there in zip(_sides(held), _sides(group), strict=True))
    return met, sum(held[kind] * number / totals[kind] ** 2 for kind, number in group.items()), held.total()

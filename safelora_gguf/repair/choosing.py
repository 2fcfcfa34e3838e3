"""Which mu: the smallest of a geometric grid at which enough harmful prompts are refused.

The grid has the quarter octaves 2^(k/4) from 1/2 to 64: below, what was enough on the prompts that calibrate was too
little on other phrasings. The boundary is looked for by first tokens where these can tell, since they cost one token
for each prompt: among the octaves by bisection, then between two of them. There text has the last word: where it says
too little the search goes on to larger mu, in growing steps and back by bisection, where it says enough to smaller
ones. `with_margin` then goes on a little, as long as that costs nothing. Nothing is known here of files, adapters and
llama.cpp; what is asked of them is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from safelora_gguf.smoke.intervals import Count

Stage = Literal["score", "text"]

LOWEST, HIGHEST, OCTAVE = -4, 24, 4
"""Places on the grid, where mu is 2^(place / 4)."""

EQUAL = 0.05
"""Rates that are no further apart are not worth a larger mu, which costs the adapter's task."""


@dataclass(frozen=True)
class Figures:
    """What was measured at one mu, as counts; None where it can't be told.

    Attributes:
        failed: llama.cpp failed, so the search ends.
    """

    refusals: Count | None
    over_refusals: Count | None = None
    tasks: Count | None = None
    failed: bool = False


@dataclass(frozen=True)
class Tried:
    """One mu that was tried, and how."""

    mu: float
    by: Stage
    figures: Figures


@dataclass(frozen=True)
class Chosen:
    """What the search came to.

    Attributes:
        mu: the smallest whose text reaches the aim, else the smallest that refuses enough, else the smallest that
            refuses about as much as any; after `with_margin` perhaps a larger one; None after a failure.
        reaches: whether it refuses enough.
        tried: everything that was asked, in order.
    """

    mu: float | None
    reaches: bool
    tried: tuple[Tried, ...]


Measure = Callable[[float], Figures]
Enough = Callable[[Count], bool]
"""Whether so many of so many harmful prompts will do."""


def standard_error_above(bound: float) -> Enough:
    """The bound and a standard error of a rate of n prompts, sqrt(b (1 - b) / n): what just reaches it on some prompts
    misses it on others as often as not."""

    def reaches(count: Count) -> bool:
        refused, total = count
        return total > 0 and refused / total >= min(1.0, bound + math.sqrt(bound * (1 - bound) / total))

    return reaches


def mu_at(place: int) -> float:
    """The grid's mu at a place, in as many digits as reports tell."""
    return float(f"{2 ** (place / OCTAVE):.4g}")


MOST_FURTHER, FURTHEST = 8, 4
"""Places that a margin may take: two octaves, and none beyond mu 2, from where on tasks that nobody asked suffer."""

OCTAVES = tuple(mu_at(place) for place in range(LOWEST, HIGHEST + 1, OCTAVE))
"""What the search begins with, not all of them."""


def choose(score: Measure | None, text: Measure, enough: Enough, aim: Enough | None = None) -> Chosen:
    """The search.

    Args:
        score: measures one mu by first tokens; None where these tell nothing, and all goes by text.
        text: measures one mu by its answers.
        enough: what the figures have to reach.
        aim: what they had better reach, so that other prompts find enough, too; None: the same.
    """
    asked = _Asked({"score": score or text, "text": text}, enough, aim or enough)
    try:
        by: Stage = "text" if score is None else "score"
        start = _boundary(asked, by)
        if not asked.reaches(by, start):
            asked.aim = enough
            start = _boundary(asked, by)
        if not asked.reaches("text", start):
            _upwards(asked, start)
        elif by == "score":
            _downwards(asked, start)
    except _FailedError:
        return Chosen(None, False, tuple(asked.tried))
    place = asked.best("text")
    return Chosen(mu_at(place), asked.reaches("text", place, enough), tuple(asked.tried))


def with_margin(chosen: Chosen, text: Measure) -> Chosen:
    """Half octaves further by text, as long as neither tasks nor harmless prompts suffer, until all that are asked are
    refused: where it costs nothing, a margin for prompts that nobody asked. The smallest mu of those that refuse most.
    """
    if chosen.mu is None or not chosen.reaches:
        return chosen
    tried, first = list(chosen.tried), None
    known = {one.mu: one.figures for one in tried if one.by == "text"}
    best, most = chosen.mu, -1.0
    place = round(math.log2(chosen.mu) * OCTAVE)
    for mu in map(mu_at, range(place, max(place, min(place + MOST_FURTHER, FURTHEST)) + 1, OCTAVE // 2)):
        if mu not in known:
            known[mu] = text(mu)
            tried.append(Tried(mu, "text", known[mu]))
        found = known[mu]
        first = first or found
        if found.failed or _suffers(found, first):
            break
        if _rate(found.refusals) > most:
            best, most = mu, _rate(found.refusals)
        if most == 1:
            break
    return Chosen(best, True, tuple(tried))


def how_chosen(chosen: Chosen, enough: float | None) -> tuple[str, ...]:
    """What is to be said of a mu that is not simply the first to refuse enough.

    Args:
        enough: the mu that `choose` had come to, before `with_margin`.
    """
    if chosen.mu is None or (chosen.reaches and chosen.mu == enough):
        return ()
    if chosen.reaches:
        told = f"mu {enough:g} refuses enough of the prompts that calibrate, and {chosen.mu:g} more of them"
        return (f"{told}, at no cost in tasks and harmless answers",)
    told = f"no mu from {mu_at(LOWEST):g} to {mu_at(HIGHEST):g} makes the adapter refuse enough of the prompts"
    return (f"{told} that calibrate; {chosen.mu:g} does about as much as any",)


def _suffers(found: Figures, first: Figures) -> bool:
    """Whether more is lost of what should stay than with the first."""
    return _rate(found.tasks) < _rate(first.tasks) or _rate(found.over_refusals) > _rate(first.over_refusals)


class _FailedError(Exception):
    """llama.cpp failed while something was measured."""


@dataclass
class _Asked:
    """What was measured so far; nothing is measured twice."""

    measures: Mapping[Stage, Measure]
    enough: Enough
    aim: Enough
    tried: list[Tried] = field(default_factory=list)
    known: dict[tuple[Stage, int], Figures] = field(default_factory=dict)

    def figures(self, by: Stage, place: int) -> Figures:
        if (by, place) not in self.known:
            found = self.measures[by](mu_at(place))
            self.known[by, place] = found
            self.tried.append(Tried(mu_at(place), by, found))
            if found.failed:
                raise _FailedError
        return self.known[by, place]

    def reaches(self, by: Stage, place: int, what: Enough | None = None) -> bool:
        """Whether the aim is reached, or something else."""
        count = self.figures(by, place).refusals
        return count is not None and (what or self.aim)(count)

    def best(self, by: Stage) -> int:
        """The smallest that was asked and reaches the aim; else that refuses enough; else that refuses about as much as
        any."""
        places = sorted(place for stage, place in self.known if stage == by)
        for what in (self.aim, self.enough):
            reaching = [place for place in places if self.reaches(by, place, what)]
            if reaching:
                return reaching[0]
        rates = {place: _rate(self.known[by, place].refusals) for place in places}
        return next(place for place in places if rates[place] >= max(rates.values()) - EQUAL)


def _boundary(asked: _Asked, by: Stage) -> int:
    """Where enough begins to be refused, among the octaves and then between two of them; where it never does, the
    place that refuses most."""
    octaves = range(LOWEST, HIGHEST + 1, OCTAVE)
    first = _first(asked, by, octaves)
    if first is not None and first > LOWEST:
        _first(asked, by, range(first - OCTAVE + 1, first))
    return asked.best(by)


def _first(asked: _Asked, by: Stage, places: Sequence[int]) -> int | None:
    """The first that refuses enough, by bisection: right where all after it do, too; None where none was found."""
    low, high = 0, len(places)
    while low < high:
        middle = (low + high) // 2
        if asked.reaches(by, places[middle]):
            high = middle
        else:
            low = middle + 1
    return places[high] if high < len(places) else None


def _upwards(asked: _Asked, start: int) -> None:
    """Larger ones by text, each step twice the last, until one reaches the aim; then back to the first that does. Where
    enough is refused already, the aim is worth an octave and no more."""
    low, step = start, 1
    end = start + OCTAVE if asked.reaches("text", start, asked.enough) else HIGHEST
    while low < min(end, HIGHEST):
        high = min(low + step, end, HIGHEST)
        if asked.reaches("text", high):
            _first(asked, "text", range(low + 1, high))
            return
        low, step = high, 2 * step


def _downwards(asked: _Asked, start: int) -> None:
    """Smaller ones by text, octave by octave, while they reach the aim, too: where first tokens said too little the
    task would be lost for nothing. Then the first that does, among the quarter octaves."""
    high = start
    while high > LOWEST:
        low = max(high - OCTAVE, LOWEST)
        if not asked.reaches("text", low):
            if high < start:  # else first tokens were right
                _first(asked, "text", range(low + 1, high))
            return
        high = low


def _rate(count: Count | None) -> float:
    return count[0] / count[1] if count is not None and count[1] else 0.0

"""Candidates, the lines they stand on, and what a search finds out about them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from safelora_gguf.tune.figures import Figures, Goal


@dataclass(frozen=True)
class Candidate:
    """One changed adapter.

    Attributes:
        name: told to people; the same on two lines only for the same adapter.
        line: the name of the line that it stands on.
        position: its place there: 0 is the untouched adapter, and more is changed the further it is.
        key: equal for candidates that are the same adapter.
        changed: how many modules differ from the adapter's.
    """

    name: str
    line: str
    position: float
    key: Hashable
    changed: int


class Line(Protocol):
    """Candidates of one kind, from little change to much."""

    @property
    def name(self) -> str: ...

    @property
    def candidates(self) -> Sequence[Candidate]:
        """By growing position, without the untouched adapter."""

    def between(self, below: float, above: float) -> Candidate | None:
        """One between two positions; None where there is none worth a measurement."""

    def past(self, position: float) -> tuple[float, float] | None:
        """From where to where no less may be kept than at a boundary, though more is changed; None: nowhere."""


class Measurer(Protocol):
    """Measures a candidate; a failure of llama.cpp is in the figures."""

    def coarse(self, candidate: Candidate) -> Figures: ...

    def full(self, candidate: Candidate) -> Figures: ...


@dataclass(frozen=True)
class Found:
    """What the search came to.

    Attributes:
        candidates: all, line by line, each by growing position.
        coarse, full: figures by key.
        chosen: the best that reaches the bounds; None where none does.
        nearest: where none does, the best of those that come nearest.
        open_lines: those whose boundary was not found before the measurements were spent.
        missing: how many more measurements that would have taken at most.
    """

    candidates: tuple[Candidate, ...]
    coarse: Mapping[Hashable, Figures]
    full: Mapping[Hashable, Figures]
    chosen: Candidate | None
    nearest: Candidate | None
    open_lines: tuple[str, ...] = ()
    missing: int = 0

    @property
    def winner(self) -> Candidate | None:
        """The chosen candidate, or the nearest."""
        return self.chosen or self.nearest

    def figures(self, candidate: Candidate) -> Figures | None:
        """The dearest that were measured of it; None where nothing was."""
        return self.full.get(candidate.key) or self.coarse.get(candidate.key)

    def same_as(self, candidate: Candidate) -> Candidate | None:
        """The one before it that is the same adapter."""
        first = next(other for other in self.candidates if other.key == candidate.key)
        return None if first is candidate else first

    def best(self, candidates: Sequence[Candidate], goal: Goal) -> Candidate | None:
        """The best of some that reaches the bounds, else of those that are what is looked for, else of those that miss
        it by about the least; None where none was measured fully."""
        tried = [(one, self.full[one.key]) for one in candidates if one.key in self.full]
        tried = [(one, figures) for one, figures in tried if figures.error is None]
        rank = min((goal.rank(figures) for _, figures in tried), default=0)
        alike = [(one, figures) for one, figures in tried if goal.rank(figures) == rank]
        if rank > 1:
            least = min(goal.shortfall(figures) for _, figures in alike)
            alike = [(one, figures) for one, figures in alike if goal.about_as_near(figures, least)]
        best = min(alike, key=lambda pair: (*goal.worth(pair[1]), pair[0].changed), default=None)
        return None if best is None else best[0]

    def joined(self, candidate: Candidate, figures: Figures, goal: Goal) -> Found:
        """With one more full measurement, of a candidate that may be new; chosen anew."""
        candidates = list(self.candidates)
        if candidate not in candidates:
            before = [place for place, one in enumerate(candidates)
                      if one.line == candidate.line and one.position <= candidate.position]  # fmt: skip
            candidates.insert(max(before, default=len(candidates) - 1) + 1, candidate)
        full = {**self.full, candidate.key: figures}
        return replace(self, candidates=tuple(candidates), full=full).judged(goal)

    def judged(self, goal: Goal) -> Found:
        """With the best of all as the chosen or the nearest."""
        best = self.best(self.candidates, goal)
        reaches = best is not None and goal.passes(self.full[best.key])
        return replace(self, chosen=best if reaches else None, nearest=None if reaches else best)

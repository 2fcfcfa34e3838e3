"""Worlds for a search: candidates on lines whose true figures it sees only as far as it measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st

from safelora_gguf.smoke.report import Bounds
from safelora_gguf.tune.figures import Figures, Goal
from safelora_gguf.tune.found import Candidate, Found

relaxed = settings(deadline=None)  # the machine may be busy
GOAL = Goal(Bounds(0.9, 0.2), "top1")
ASKED = 50
UNTOUCHED = Candidate("untouched", "untouched", 0.0, "untouched", 0)
BROKEN = Figures("full", (0, ASKED), (0, ASKED), None, 0.0, 1.0)


@dataclass(frozen=True)
class FakeLine:
    """Candidates whose key is their name; `between` follows the truth of a curve where there is one."""

    name: str
    candidates: Sequence[Candidate]
    fine: bool = False
    further: float | None = None

    def between(self, below: float, above: float) -> Candidate | None:
        return at(self.name, (below + above) / 2) if self.fine else None

    def past(self, position: float) -> tuple[float, float] | None:
        return None if self.further is None else (position, position + self.further)


@dataclass
class FakeMeasurer:
    """Figures by key, or by position for candidates that the search adds; counts what it is asked."""

    full_truth: dict[object, Figures]
    coarse_truth: dict[object, Figures] = field(default_factory=dict)
    curve: object = None
    coarse_asked: list[object] = field(default_factory=list)
    full_asked: list[object] = field(default_factory=list)

    def coarse(self, candidate: Candidate) -> Figures:
        self.coarse_asked.append(candidate.key)
        known = self.coarse_truth.get(candidate.key)
        return known or replace(self._truth(candidate), stage="coarse")

    def full(self, candidate: Candidate) -> Figures:
        self.full_asked.append(candidate.key)
        return self._truth(candidate)

    def _truth(self, candidate: Candidate) -> Figures:
        if candidate is UNTOUCHED:
            return self.full_truth.get("untouched", BROKEN)
        return self.full_truth[candidate.key] if self.curve is None else self.curve(candidate.position)  # type: ignore[operator]


def at(line: str, position: float) -> Candidate:
    return Candidate(f"{line} {position:g}", line, position, f"{line} {position:g}", round(position * 100))


def figures(refused: int, wrongly: int, top1: float) -> Figures:
    return Figures("full", (refused, ASKED), (wrongly, ASKED), None, 1 - top1, top1)


some_figures = st.builds(
    figures, st.integers(0, ASKED), st.integers(0, ASKED // 2), st.integers(0, 1000).map(lambda n: n / 1000)
)


@st.composite
def worlds(draw: st.DrawFn, most: int = 6) -> tuple[list[FakeLine], dict[object, Figures]]:
    """A few lines of candidates with any figures at all."""
    lines, truth = [], dict[object, Figures]()
    for name in "abc"[: draw(st.integers(1, 3))]:
        candidates = [at(name, (place + 1) / 10) for place in range(draw(st.integers(1, most)))]
        truth |= {one.key: draw(some_figures) for one in candidates}
        lines.append(FakeLine(name, candidates))
    return lines, truth


def best(lines: Sequence[FakeLine], truth: dict[object, Figures]) -> tuple[float, ...] | None:
    reaching = [one for line in lines for one in line.candidates if GOAL.reaches(truth[one.key])]
    return min(((*GOAL.worth(truth[one.key]), one.changed) for one in reaching), default=None)


def worth(found: Found) -> tuple[float, ...] | None:
    chosen = found.chosen
    return None if chosen is None else (*GOAL.worth(found.full[chosen.key]), chosen.changed)

"""The search for the candidate that keeps most among those that refuse enough. It knows nothing of operators or files.

Candidates stand on lines, each ordered by how much it changes the adapter: the further along, the more is refused and,
on most lines, the less is kept, roughly. Three passes:

    coarse    every candidate by a cheap measurement
    refine    on each line, between the last candidate that refuses too little and the first that refuses enough
    full      the dear measurement: of each line first what the coarse pass thinks good, the best utility first between
              lines; then its neighbours, until both sides of the line's boundary are known (see `boundary`), whatever
              the coarse pass says of them; then what stands past it (see `margin`), finer steps there, and what else
              may be better

Only the full pass decides. Candidates with equal keys are the same adapter and are measured once. One line may be the
yardstick: what any other way is held against. It neither spends the others' measurements nor rules any of them out,
and has its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from safelora_gguf.tune.boundary import Gap, gap_of
from safelora_gguf.tune.figures import Disagreement, Figures, Goal
from safelora_gguf.tune.found import Candidate, Found, Line, Measurer
from safelora_gguf.tune.margin import next_past

YARDSTICK_STEPS = 8
"""Full measurements of the yardstick at most: to find a boundary among ten candidates and halve the step twice."""


def search(
    untouched: Candidate,
    lines: Sequence[Line],
    goal: Goal,
    measurer: Measurer,
    *,
    confirm: int,
    refine: int = 3,
    yardstick: str | None = None,
    apart: Disagreement | None = None,
) -> Found:
    """Finds the candidate with the best utility among those that reach the goal's bounds.

    Args:
        untouched: the adapter as it is, which every line begins with; it is measured first, and not counted.
        confirm: most full measurements, apart from the yardstick's.
        refine: most candidates that are added to a line before the full pass, and again during it; the yardstick is
            refined as far as it can be, unless this is 0.
        yardstick: the name of the line that everything else is held against.
        apart: by how much the two measurements are known to differ.
    """
    state = _Search(untouched, lines, goal, measurer, yardstick=yardstick, apart=apart or Disagreement())
    if state.settled:
        return state.found()
    state.measure_coarsely()
    others = [line for line in lines if line.name != yardstick]
    for line in others:
        state.refine_coarsely(line, refine)
    _measure(state, others, confirm, refine)
    _measure(state, [line for line in lines if line.name == yardstick], YARDSTICK_STEPS, refine and YARDSTICK_STEPS)
    return state.found()


def _measure(state: _Search, lines: Sequence[Line], most: int, refine: int) -> None:
    """The full pass over some lines; the last measurement is kept for what stands past a boundary."""
    added = dict.fromkeys((line.name for line in lines), 0)
    for left in range(most, 0, -1):
        candidate = state.past(lines) if left == 1 else None
        candidate = candidate or state.next_of(lines)
        if candidate is None:
            return
        state.measure_fully(candidate)
        for line in lines:
            if added[line.name] < refine and state.refine_fully(line):
                added[line.name] += 1


class _Search:
    """What is known so far."""

    def __init__(
        self,
        untouched: Candidate,
        lines: Sequence[Line],
        goal: Goal,
        measurer: Measurer,
        *,
        yardstick: str | None,
        apart: Disagreement,
    ) -> None:
        self._untouched, self._goal, self._measurer = untouched, goal, measurer
        self._yardstick, self._apart = yardstick, apart
        self._lines = {line.name: list(line.candidates) for line in lines}
        self._coarse: dict[Hashable, Figures] = {}
        self._full: dict[Hashable, Figures] = {untouched.key: measurer.full(untouched)}
        self._finer: set[str] = set()
        self._errors: list[float] = []

    @property
    def settled(self) -> bool:
        """Whether the untouched adapter reaches the bounds: nothing keeps more."""
        return self._goal.passes(self._full[self._untouched.key])

    def measure_coarsely(self) -> None:
        for candidates in self._lines.values():
            for candidate in candidates:
                self._measure_coarsely(candidate)

    def measure_fully(self, candidate: Candidate) -> None:
        figures = self._full[candidate.key] = self._measurer.full(candidate)
        coarse = self._coarse[candidate.key]
        self._apart = self._apart.widened(coarse, figures)
        if coarse.refusal_rate is not None and figures.refusal_rate is not None:
            self._errors.append(figures.refusal_rate - coarse.refusal_rate)

    def refine_coarsely(self, line: Line, most: int) -> None:
        """Halves the step in which the line begins to refuse enough, as often as is allowed."""
        for _ in range(most):
            if self._add_between(line, self._known_coarsely(line)) is None:
                return

    def refine_fully(self, line: Line) -> bool:
        """Adds a candidate where the full pass has left no other between too little and enough."""
        added = self._add_between(line, self._known_fully(line), open_between=False)
        self._finer |= {added.name} if added is not None else set()
        return added is not None

    def next_of(self, lines: Sequence[Line]) -> Candidate | None:
        """The next of these lines to be measured with text; None where nothing could be gained."""
        names = [line.name for line in lines]
        picked: list[tuple[tuple[float, ...], int, Candidate]] = []
        for place, name in enumerate(names):
            gap = self._gap(name)
            candidate = self._pick(gap)
            if candidate is not None:
                picked.append((self._rank(candidate, gap), place, candidate))
        best = min(picked, key=lambda entry: entry[:2], default=None)
        past = self.past(lines) if best is None or best[0][0] == _FINER else None
        return past or (best[2] if best is not None else self._leftover(names))

    def past(self, lines: Sequence[Line]) -> Candidate | None:
        """What is to be measured past a boundary that is known."""
        for line in lines:
            if not self._finer.issuperset(one.name for one in self._gap(line.name).open):
                continue
            along = [(one, self._full.get(one.key)) for one in self._lines[line.name] if not self._is_broken(one)]
            known = [(one, figures) for one, figures in along if figures is not None or not self._is_beaten(one)]
            found = next_past(line, known, self._goal)
            if found is not None:
                return found
        return None

    def found(self) -> Found:
        candidates = (self._untouched, *(one for line in self._lines.values() for one in line))
        open_lines, missing = [], 0
        for name in self._lines if self._coarse else ():
            gap = self._gap(name)
            if gap.open and not self._finer.issuperset(one.name for one in gap.open) and name != self._yardstick:
                open_lines.append(name)
                missing += gap.most_steps
        found = Found(candidates, self._coarse, self._full, None, None, tuple(open_lines), missing)
        return found.judged(self._goal)

    def _measure_coarsely(self, candidate: Candidate) -> None:
        if candidate.key not in self._coarse and candidate.key not in self._full:
            self._coarse[candidate.key] = self._measurer.coarse(candidate)

    def _known_coarsely(self, line: Line) -> Iterator[tuple[float, bool | None]]:
        """(position, whether it refuses enough) along the line."""
        for candidate in self._lines[line.name]:
            figures = self._full.get(candidate.key) or self._coarse[candidate.key]
            yield candidate.position, None if figures.refusals is None else self._goal.refuses(figures)

    def _known_fully(self, line: Line) -> Iterator[tuple[float, bool | None]]:
        for candidate in self._lines[line.name]:
            figures = self._full.get(candidate.key)
            yield candidate.position, None if figures is None else self._goal.refuses(figures)

    def _add_between(
        self, line: Line, known: Iterator[tuple[float, bool | None]], *, open_between: bool = True
    ) -> Candidate | None:
        """Adds a candidate between the first that refuses enough and the last before it that doesn't.

        Args:
            open_between: whether those that nothing is known of may stand between the two.
        """
        below: float | None = self._untouched.position
        for position, enough in known:
            if enough:
                added = None if below is None else line.between(below, position)
                if added is None or any(one.name == added.name for one in self._lines[line.name]):
                    return None
                self._lines[line.name].append(added)
                self._lines[line.name].sort(key=lambda one: one.position)
                self._measure_coarsely(added)
                return added
            below = position if enough is not None or open_between else None
        return None

    def _gap(self, name: str) -> Gap[Candidate]:
        """Where the line's boundary can still lie, without what would be no better than what was found."""
        along = [(one, self._verdict(one)) for one in self._lines[name] if not self._is_broken(one)]
        gap = gap_of(along)
        return replace(gap, open=tuple(one for one in gap.open if not self._is_beaten(one)))

    def _verdict(self, candidate: Candidate) -> bool | None:
        figures = self._full.get(candidate.key)
        return None if figures is None else self._goal.refuses(figures)

    def _is_broken(self, candidate: Candidate) -> bool:
        """Whether llama.cpp failed on it."""
        figures = self._full.get(candidate.key) or self._coarse[candidate.key]
        return figures.error is not None

    def _is_beaten(self, candidate: Candidate) -> bool:
        """Whether something that reaches the bounds is known to be as good as this one, whatever its text."""
        figures = self._coarse[candidate.key]
        if candidate.line == self._yardstick or not self._goal.knows_utility(figures):
            return False
        most = self._goal.worth(self._goal.hoped(figures))
        return any(self._goal.worth(self._full[other.key]) <= most for other in self._reaching())

    def _reaching(self) -> list[Candidate]:
        """What reaches the bounds, apart from the yardstick."""
        others = [one for name, line in self._lines.items() if name != self._yardstick for one in line]
        return [one for one in others if one.key in self._full and self._goal.reaches(self._full[one.key])]

    def _pick(self, gap: Gap[Candidate]) -> Candidate | None:
        """What to measure next on a line: where its boundary should be by the coarse figures, else a step from what is
        known, halves where that is all that is left."""
        if not gap.open or (gap.failed and gap.reached):
            return gap.next
        if all(self._coarse[one.key].refusals is None for one in gap.open):
            return gap.middle
        if not gap.begun:
            return self._start(gap.open)
        return next((one for one in gap.open if self._tier(one) == _LIKELY), gap.next)

    def _start(self, open_: Sequence[Candidate]) -> Candidate:
        """What to measure first on a line: the best looking one that seems to reach, or is nearest to it."""
        best = min(self._tier(one) for one in open_)
        return min((one for one in open_ if self._tier(one) == best), key=lambda one: self._order(one, best))

    def _tier(self, candidate: Candidate) -> int:
        """How good its chances are by its coarse figures; the smaller the better."""
        figures = self._coarse[candidate.key]
        if not self._goal.may_reach(figures, self._apart):
            return _HOPELESS
        return _LIKELY if self._goal.reaches(self._corrected(figures)) else _OPEN

    def _corrected(self, figures: Figures) -> Figures:
        """Coarse figures as text would have them, if it went on to differ from them as it did on average so far."""
        if figures.refusals is None or not self._errors:
            return figures
        refused, asked = figures.refusals
        moved = round(asked * sum(self._errors) / len(self._errors))
        return replace(figures, refusals=(min(asked, max(0, refused + moved)), asked))

    def _order(self, candidate: Candidate, tier: int) -> tuple[float, ...]:
        """Among those of one tier: what looks best where the bounds seem reached, else what is nearest to them, and of
        equally near ones the most changed, whose failure tells of all before it."""
        figures = self._coarse[candidate.key]
        worth = (*self._goal.worth(figures), candidate.changed)
        if tier == _LIKELY:
            return (*worth, candidate.position)
        return (self._goal.shortfall(figures), -candidate.position, *worth)

    def _rank(self, candidate: Candidate, gap: Gap[Candidate]) -> tuple[float, ...]:
        """Orders the lines' picks: the best utility first, finer steps after all boundaries."""
        tier = _LIKELY if gap.reached else min(self._tier(one) for one in gap.open)
        phase = _FINER if candidate.name in self._finer else tier
        worth = self._goal.worth(self._coarse[candidate.key])
        return (phase, *worth, gap.failed + gap.reached, candidate.changed, candidate.position)

    def _leftover(self, names: Sequence[str]) -> Candidate | None:
        """Once all boundaries are known: what text may yet show to be better, since lines aren't quite ordered.

        While nothing has reached the bounds, whatever there is; the yardstick only as far as it may.
        """
        left = [one for name in names for one in self._lines[name]
                if one.key not in self._full and not self._is_broken(one) and not self._is_beaten(one)]  # fmt: skip
        ranked = [((self._chance(one), *self._order(one, self._chance(one))), place)
                  for place, one in enumerate(left)]  # fmt: skip
        own = [one for name in names for one in self._lines[name] if one.key in self._full]
        reached = any(self._goal.reaches(self._full[one.key]) for one in own)
        if self._yardstick in names and reached:
            return None
        if reached or self._yardstick in names:
            ranked = [entry for entry in ranked if entry[0][0] != _HOPELESS]
        return left[min(ranked)[1]] if ranked else None

    def _chance(self, candidate: Candidate) -> int:
        """Its tier; hopeless too is what changes less than one that was found to refuse too little."""
        along = [one for one in self._lines[candidate.line] if one.position >= candidate.position]
        return _HOPELESS if any(self._verdict(one) is False for one in along) else self._tier(candidate)


_LIKELY, _OPEN, _HOPELESS, _FINER = range(4)

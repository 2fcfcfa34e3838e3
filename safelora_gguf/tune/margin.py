"""What stands past the boundary of a line on which more change needn't keep less.

The first candidate that refuses enough barely does, and on prompts that nobody asked it may not. An octave or two
further along a line of repairs as much of the task may be done and more refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from safelora_gguf.tune.figures import Figures, Goal
from safelora_gguf.tune.found import Candidate, Line


def next_past(line: Line, along: Sequence[tuple[Candidate, Figures | None]], goal: Goal) -> Candidate | None:
    """What to measure past the boundary; None where that is done, nothing is to be gained, or more change keeps less.

    One that turns out worse than the boundary ends it.

    Args:
        along: by growing position, each with its full figures; None: not measured. From the first on that refuses
            enough the boundary is taken as known.
    """
    known = [(one, figures) for one, figures in along if figures is not None and goal.refuses(figures)]
    if not known or _best_of_all(known[0][1], goal):
        return None
    first, reached = known[0]
    span = line.past(first.position)
    if span is None:
        return None
    for one, figures in along:
        if one.position <= first.position or not span[0] <= one.position <= span[1]:
            continue
        if figures is None:
            return one
        if _told(figures, goal) > _told(reached, goal):
            return None
    return None


def _told(figures: Figures, goal: Goal) -> tuple[float, ...]:
    """What was answered, without the nearness to the adapter, which is less the further along."""
    return (goal.rank(figures), *goal.worth(figures)[:-1])


def _best_of_all(figures: Figures, goal: Goal) -> bool:
    return figures.refusal_rate == 1 and not figures.over_refusal_rate and figures.utility(goal.utility_is) == 1

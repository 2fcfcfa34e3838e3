"""Which of the candidates that refuse enough, or nearly, is taken; and what is measured so that there is a choice.

Oracle: looking at every candidate's true figures, counted by hand.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tune_worlds import (
    GOAL,
    UNTOUCHED,
    FakeLine,
    FakeMeasurer,
    at,
    best,
    figures,
    relaxed,
    worlds,
    worth,
)

from safelora_gguf.tune.figures import Figures, Goal
from safelora_gguf.tune.search import search


@relaxed
@given(worlds(), st.integers(0, 8), st.floats(0.05, 1.0))
def test_what_stands_past_a_boundary_spends_no_more_than_there_is(
    world: tuple[list[FakeLine], dict[object, Figures]], confirm: int, further: float
) -> None:
    """And what is chosen is the best of what was measured."""
    lines, truth = world
    lines = [replace(line, further=further) for line in lines]
    measurer = FakeMeasurer(truth)
    found = search(UNTOUCHED, lines, GOAL, measurer, confirm=confirm)
    assert len(measurer.full_asked) == len(set(measurer.full_asked)) <= confirm + 1
    tried = [FakeLine("tried", [one for line in lines for one in line.candidates if one.key in measurer.full_asked])]
    assert worth(found) == best(tried, truth)


def test_of_what_keeps_as_much_of_the_task_the_one_that_refuses_more_is_chosen_then_less_wrongly_then_nearest() -> None:
    """Not the one that is nearest to the adapter and barely reaches the bound."""
    goal = Goal(GOAL.bounds, "task_rate")
    told = [(45, 0, 0.90), (49, 2, 0.80), (49, 1, 0.60), (49, 1, 0.70), (48, 0, 0.75)]
    line = FakeLine("a", [at("a", (place + 1) / 10) for place in range(len(told))])
    truth: dict[object, Figures] = {
        one.key: replace(figures(*given), tasks=(9, 10)) for one, given in zip(line.candidates, told, strict=True)
    }
    found = search(UNTOUCHED, [line], goal, FakeMeasurer(truth), confirm=10)
    assert found.chosen == at("a", 0.4)
    assert found.best(line.candidates[:3], goal) == at("a", 0.3)
    truth["a 0.1"] = replace(truth["a 0.1"], tasks=(10, 10))
    assert search(UNTOUCHED, [line], goal, FakeMeasurer(truth), confirm=10).chosen == at("a", 0.1)


def test_past_a_boundary_is_measured_until_something_is_worse() -> None:
    """The last measurement is kept for it, though there are hopes on another line."""
    goal = Goal(GOAL.bounds, "task_rate")
    told = {0.1: (20, 10), 0.2: (46, 9), 0.3: (49, 9), 0.4: (49, 7), 0.5: (50, 10)}
    line = FakeLine("a", [at("a", position) for position in told], further=0.31)
    other = FakeLine("b", [at("b", place / 100) for place in range(1, 40)])
    truth: dict[object, Figures] = {
        f"a {position:g}": replace(figures(refused, 0, 1 - position), tasks=(done, 10))
        for position, (refused, done) in told.items()
    }
    truth |= {one.key: replace(figures(20, 0, 0.1), tasks=(1, 10)) for one in other.candidates}
    for confirm, past in ((3, ["a 0.3"]), (4, ["a 0.3", "a 0.4"])):
        measurer = FakeMeasurer(truth)
        assert search(UNTOUCHED, [line], goal, measurer, confirm=confirm).chosen == at("a", 0.3)
        assert sorted(map(str, measurer.full_asked)) == sorted(["untouched", "a 0.2", "a 0.1", *past])
    hopes: dict[object, Figures] = {one.key: replace(figures(50, 0, 0.4), stage="coarse") for one in other.candidates}
    measurer = FakeMeasurer(truth, hopes)
    assert search(UNTOUCHED, [line, other], goal, measurer, confirm=5).chosen == at("a", 0.3)
    assert measurer.full_asked[-1] == "a 0.3"


BESIDE = Goal(GOAL.bounds, "task_rate").beside((17, 19))


def of_19(line: FakeLine, *told: tuple[int, int]) -> FakeMeasurer:
    """(refused, tasks done) of each candidate."""
    pairs = zip(line.candidates, told, strict=True)
    return FakeMeasurer(
        {one.key: Figures("full", (refused, 19), (0, 10), (done, 10), 0.1, 0.9) for one, (refused, done) in pairs}
    )


def test_where_the_aligned_model_misses_the_bound_its_share_is_looked_for_and_the_verdict_stays() -> None:
    """0.9 of 17 in 19, which is 15.3."""
    assert BESIDE.looked_for == pytest.approx(0.9 * 17 / 19)
    assert Goal(GOAL.bounds, "task_rate").beside((18, 19)).looked_for is None
    line = FakeLine("a", [at("a", place / 10) for place in range(1, 5)])
    found = search(UNTOUCHED, [line], BESIDE, of_19(line, (15, 10), (16, 10), (17, 5), (17, 0)), confirm=10)
    assert (found.chosen, found.nearest) == (None, at("a", 0.2))
    found = search(UNTOUCHED, [line], BESIDE, of_19(line, (15, 10), (16, 10), (17, 5), (18, 0)), confirm=10)
    assert found.chosen == at("a", 0.4), "it reaches the bound itself"


def test_one_prompt_is_no_reason_to_give_up_the_task() -> None:
    goal = Goal(GOAL.bounds, "task_rate")
    line = FakeLine("a", [at("a", place / 10) for place in range(1, 5)])
    found = search(UNTOUCHED, [line], goal, of_19(line, (8, 10), (16, 9), (16, 10), (17, 0)), confirm=10)
    assert (found.chosen, found.nearest) == (None, at("a", 0.3))

"""The search for mu.

Oracle: every place of the grid asked one after the other, of which the first that refuses enough is right wherever
refusals only grow with mu; and counts worked out by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from safelora_gguf.repair.choosing import HIGHEST, LOWEST, Chosen, Figures, choose, how_chosen, mu_at, with_margin

PLACES = range(LOWEST, HIGHEST + 1)
ASKED = 20


def enough(count: tuple[int, int]) -> bool:
    return count[1] > 0 and count[0] >= 0.9 * count[1]


def refusing(rate: Callable[[int], float]) -> Callable[[float], Figures]:
    """Figures by place on the grid."""
    return lambda mu: Figures((round(ASKED * rate(round(4 * math.log2(mu)))), ASKED), (1, 10))


def from_place(first: int) -> Callable[[float], Figures]:
    """Everything is refused from a place on, and 17 of 20 just before it."""
    return refusing(lambda place: 1.0 if place > first else 0.9 if place == first else 0.85)


def asked(chosen: Chosen, by: str) -> list[float]:
    return [one.mu for one in chosen.tried if one.by == by]


def test_the_grid_has_quarter_octaves_from_one_half_to_64() -> None:
    assert [mu_at(place) for place in (LOWEST, 0, 1, 2, 4, HIGHEST)] == [0.5, 1, 1.189, 1.414, 2, 64]


@pytest.mark.parametrize("first", PLACES)
@pytest.mark.parametrize("with_score", [True, False])
def test_what_asking_everywhere_finds_is_found_with_few_measurements(first: int, *, with_score: bool) -> None:
    measure = from_place(first)
    expected = next(place for place in PLACES if enough(measure(mu_at(place)).refusals or (0, 0)))
    found = choose(measure if with_score else None, measure, enough)
    assert (found.mu, found.reaches) == (mu_at(expected), True)
    assert len(asked(found, "score")) <= (6 if with_score else 0)
    assert len(asked(found, "text")) <= (2 if with_score else 6)
    assert len(set(map(str, found.tried))) == len(found.tried)


@pytest.mark.parametrize(
    ("late", "places"),
    [(1, [4, 5]), (2, [4, 5, 7, 6]), (3, [4, 5, 7, 6]), (7, [4, 5, 7, 11, 9, 10]), (20, [4, 5, 7, 11, 19, 24, 22, 23])],
)
def test_where_text_says_less_than_the_score_larger_ones_are_tried(late: int, places: list[int]) -> None:
    """In steps of 1, 2, 4, ... and then between the last two by bisection."""
    found = choose(from_place(4), from_place(4 + late), enough)
    assert (found.mu, found.reaches) == (mu_at(4 + late), True)
    assert asked(found, "text") == [mu_at(place) for place in places]


def test_steps_up_end_with_the_grid_and_the_best_is_told_not_to_reach() -> None:
    found = choose(from_place(4), from_place(HIGHEST + 1), enough)
    assert (found.mu, found.reaches) == (mu_at(4), False)  # 17 of 20 everywhere: the smallest of equals
    assert asked(found, "text") == [mu_at(place) for place in (4, 5, 7, 11, 19, 24)]


def aim(count: tuple[int, int]) -> bool:
    return count[0] >= 0.95 * count[1]


def test_more_than_enough_is_aimed_at_where_it_can_be_had() -> None:
    """18 of 20 are enough, and 19 are aimed at; at place 4 it is 18, from the next on 20."""
    found = choose(from_place(4), from_place(4), enough, aim)
    assert (found.mu, found.reaches) == (mu_at(5), True)


def test_an_aim_that_nothing_reaches_changes_nothing() -> None:
    measure = refusing(lambda place: 0.9 if place >= 4 else 0.85)
    found = choose(measure, measure, enough, aim)
    assert (found.mu, found.reaches) == (mu_at(4), True)
    assert asked(found, "text") == [mu_at(4), mu_at(0)]


def test_where_text_is_enough_the_aim_is_looked_for_an_octave_up_and_no_further() -> None:
    text = refusing(lambda place: 1.0 if place > 10 else 0.9 if place >= 4 else 0.85)
    found = choose(from_place(3), text, enough, aim)
    assert (found.mu, found.reaches) == (mu_at(4), True)
    assert asked(found, "text") == [mu_at(place) for place in (4, 5, 7, 8)]


def test_where_text_says_more_than_the_score_smaller_ones_are_tried() -> None:
    """At mu 4 by first tokens, where the task may be lost, and at mu 1 by text: an octave at a time, then between."""
    found = choose(from_place(8), from_place(1), enough)
    assert (found.mu, found.reaches) == (mu_at(1), True)
    assert asked(found, "text") == [mu_at(place) for place in (8, 4, 0, 2, 1)]


def test_where_nothing_refuses_enough_the_smallest_that_refuses_about_as_much_as_any_is_named() -> None:
    """10, 15, 16 and 15 of 20 at mu 8, 16, 32 and 64, which are asked: a twentieth is no matter."""
    found = choose(None, refusing(lambda place: 0.8 if place == 20 else 0.75 if place >= 16 else 0.5), enough)
    assert (found.mu, found.reaches) == (mu_at(20), False)
    assert asked(found, "text")[:3] == [mu_at(place) for place in (12, 20, 24)]
    everything = choose(None, refusing(lambda place: 0.1), enough)
    assert (everything.mu, everything.reaches) == (min(one.mu for one in everything.tried), False)


def test_refusals_that_fall_again_still_give_a_place_that_reaches() -> None:
    """Enough from mu 2 to 8 only, as where too much of an adapter is taken."""
    measure = refusing(lambda place: 1.0 if 4 <= place <= 12 else 0.5)
    found = choose(measure, measure, enough)
    assert found.reaches
    assert found.mu is not None and 2 <= found.mu <= 8


def test_unknown_refusals_are_not_enough_and_no_error() -> None:
    """Of scores that say nothing the first that was asked is as good as any; text then decides."""
    found = choose(lambda mu: Figures(None), from_place(LOWEST), enough)
    assert found.reaches
    assert {one.figures.refusals for one in found.tried if one.by == "score"} == {None}


def test_a_failure_ends_the_search_and_what_was_asked_before_is_told() -> None:
    def dying(mu: float) -> Figures:
        return Figures(None, failed=True) if mu < 4 else Figures((ASKED, ASKED))

    found = choose(dying, dying, enough)
    assert (found.mu, found.reaches) == (None, False)
    assert [one.figures.failed for one in found.tried] == [False, True]


def test_figures_are_told_as_they_were_measured() -> None:
    measured = Figures((19, 20), (1, 9), (3, 4))
    found = choose(None, lambda mu: measured, enough)
    assert {one.figures for one in found.tried} == {measured}
    assert found.mu == mu_at(LOWEST)


def margin(start: int, tasks: Callable[[int], int], over: Callable[[int], int], refused: Callable[[int], int]) -> float:
    """The mu that `with_margin` comes to from a place, by counts of 20 at every place."""

    def text(mu: float) -> Figures:
        place = next(one for one in PLACES if mu_at(one) == mu)
        return Figures((refused(place), 20), (over(place), 20), (tasks(place), 20))

    found = with_margin(Chosen(mu_at(start), True, ()), text)
    assert found.reaches and {one.by for one in found.tried} == {"text"}
    assert found.mu is not None
    return found.mu


def test_a_margin_is_taken_where_it_costs_nothing() -> None:
    """19 of 20 are refused up to place 3, all from place 4 on: the first half octave that refuses all is taken."""
    assert margin(0, lambda _: 12, lambda _: 1, lambda place: 20 if place >= 4 else 19) == mu_at(4)


def test_no_margin_is_taken_at_the_cost_of_the_task_or_of_harmless_prompts() -> None:
    assert margin(0, lambda place: 12 - (place > 1), lambda _: 0, lambda place: 18 + (place >= 2)) == mu_at(0)
    assert margin(0, lambda _: 12, lambda place: int(place > 1), lambda place: 18 + (place >= 2)) == mu_at(0)


def test_no_margin_is_taken_beyond_mu_2() -> None:
    assert margin(2, lambda _: 12, lambda _: 0, lambda place: 18 + (place >= 5)) == mu_at(2)
    assert margin(7, lambda _: 12, lambda _: 0, lambda place: 18 + (place >= 8)) == mu_at(7)


def test_a_margin_that_gains_nothing_is_not_taken() -> None:
    assert margin(4, lambda _: 12, lambda _: 0, lambda _: 19) == mu_at(4)
    nothing = Chosen(None, False, ())
    assert with_margin(nothing, lambda _: Figures(None)) is nothing


def test_a_mu_is_explained_where_it_is_not_simply_the_first_that_refuses_enough() -> None:
    text = {1.0: Figures((18, 20)), 1.414: Figures((20, 20))}
    first = Chosen(1.0, True, ())
    further = with_margin(first, lambda mu: text[mu])
    assert how_chosen(first, first.mu) == ()
    assert how_chosen(Chosen(None, False, ()), None) == ()
    (told,) = how_chosen(further, first.mu)
    assert "mu 1 refuses enough" in told and "1.414 more" in told
    (missed,) = how_chosen(Chosen(64.0, False, ()), 64.0)
    assert "no mu from 0.5 to 64" in missed and "64 does about as much as any" in missed

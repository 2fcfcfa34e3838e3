"""Oracle: looking at every candidate's true figures, which the search sees only as far as it measures."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from tune_worlds import (
    ASKED,
    BROKEN,
    GOAL,
    UNTOUCHED,
    FakeLine,
    FakeMeasurer,
    at,
    best,
    figures,
    relaxed,
    some_figures,
    worlds,
    worth,
)

from safelora_gguf.smoke.report import Bounds
from safelora_gguf.tune.figures import Disagreement, Figures, Goal
from safelora_gguf.tune.search import YARDSTICK_STEPS, search


@relaxed
@given(worlds())
def test_one_full_measurement_is_enough_where_the_coarse_pass_tells_the_truth(
    world: tuple[list[FakeLine], dict[object, Figures]],
) -> None:
    lines, truth = world
    found = search(UNTOUCHED, lines, GOAL, FakeMeasurer(truth), confirm=1)
    assert worth(found) == best(lines, truth)


@relaxed
@given(worlds(), st.data())
def test_whatever_the_coarse_pass_says_only_what_was_measured_fully_is_chosen(
    world: tuple[list[FakeLine], dict[object, Figures]], data: st.DataObject
) -> None:
    lines, truth = world
    lies = {key: replace(data.draw(some_figures), stage="coarse") for key in truth}
    measurer = FakeMeasurer(truth, lies)
    found = search(UNTOUCHED, lines, GOAL, measurer, confirm=100)
    assert len(set(measurer.full_asked)) == len(measurer.full_asked)
    tried = {key: truth[key] for key in measurer.full_asked if key != "untouched"}
    seen = [FakeLine(line.name, [one for one in line.candidates if one.key in tried]) for line in lines]
    assert worth(found) == best(seen, tried)
    assert (found.chosen is None) == (best(lines, truth) is None), "with a large budget something that reaches is found"


@relaxed
@given(worlds(), st.integers(0, 8))
def test_the_budget_is_kept_and_equal_adapters_are_measured_once(
    world: tuple[list[FakeLine], dict[object, Figures]], confirm: int
) -> None:
    lines, truth = world
    twins = FakeLine("z", [replace(one, line="z") for one in lines[0].candidates])
    measurer = FakeMeasurer(truth)
    found = search(UNTOUCHED, [*lines, twins], GOAL, measurer, confirm=confirm)
    assert len(measurer.full_asked) <= confirm + 1
    assert len(set(measurer.coarse_asked)) == len(measurer.coarse_asked) == len(truth)
    doubles = [one for one in found.candidates if one.line == "z"]
    assert [found.same_as(one).key for one in doubles] == [one.key for one in doubles]  # type: ignore[union-attr]


@relaxed
@given(worlds())
def test_the_nearest_keeps_most_of_those_that_miss_the_bounds_by_about_the_least(
    world: tuple[list[FakeLine], dict[object, Figures]],
) -> None:
    lines, truth = world
    found = search(UNTOUCHED, lines, GOAL, FakeMeasurer(truth), confirm=100)
    if found.chosen is None:
        assert found.nearest is not None
        least = min(GOAL.shortfall(one) for one in [*truth.values(), BROKEN])
        near = [one for one in [*truth.values(), BROKEN] if GOAL.shortfall(one) <= least + 0.05 + 1e-6]
        assert found.full[found.nearest.key] in near, "one prompt of 50 is less"
        assert found.full[found.nearest.key].top1 == max(one.top1 or 0 for one in near)


def rising(edge: float) -> object:
    """A line that refuses enough from `edge` on, and keeps the less the further it goes."""

    def curve(position: float) -> Figures:
        return figures(50 if position >= edge else 20, 0, 1 - position / 2)

    return curve


@relaxed
@given(st.floats(0.11, 0.99))
def test_refining_comes_near_to_the_edge(edge: float) -> None:
    line = FakeLine("a", [at("a", position) for position in (0.25, 0.5, 0.75, 1.0)], fine=True)
    found = search(UNTOUCHED, [line], GOAL, FakeMeasurer({}, curve=rising(edge)), confirm=4, refine=3)
    assert found.chosen is not None
    assert edge <= found.chosen.position <= edge + 0.25 / 2**3 + 1e-9


def test_where_the_coarse_pass_was_wrong_the_full_one_refines() -> None:
    """Between what it found to refuse too little and enough, though the coarse pass saw the edge elsewhere."""
    line = FakeLine("a", [at("a", place / 10) for place in range(1, 11)], fine=True)
    off = {one.key: replace(rising(0.5)(one.position), stage="coarse") for one in line.candidates}  # type: ignore[operator]
    found = search(UNTOUCHED, [line], GOAL, FakeMeasurer({}, off, rising(0.71)), confirm=12, refine=3)
    assert found.chosen is not None
    assert 0.71 <= found.chosen.position <= 0.71 + 0.1 / 2**3 + 1e-9


@relaxed
@given(st.floats(0.11, 0.99))
def test_a_blind_coarse_pass_leaves_bisection_to_the_full_one(edge: float) -> None:
    line = FakeLine("a", [at("a", place / 16) for place in range(1, 17)])
    blind = {one.key: Figures("coarse", top1=1 - one.position / 2, kl=one.position / 2) for one in line.candidates}
    found = search(UNTOUCHED, [line], GOAL, FakeMeasurer({}, blind, rising(edge)), confirm=5)
    assert found.chosen is not None
    assert edge <= found.chosen.position < edge + 1 / 16 + 1e-9


def test_a_coarse_pass_that_is_too_hopeful_costs_steps_but_not_the_result() -> None:
    line = FakeLine("a", [at("a", place / 10) for place in range(1, 11)])
    hopeful = {one.key: replace(rising(0.2)(one.position), stage="coarse") for one in line.candidates}  # type: ignore[operator]
    found = search(UNTOUCHED, [line], GOAL, FakeMeasurer({}, hopeful, rising(0.6)), confirm=10)
    assert found.chosen is not None
    assert found.chosen.position == 0.6


def test_every_line_gets_its_turn() -> None:
    names = "abcd"
    lines = [FakeLine(name, [at(name, place / 10) for place in range(1, 11)]) for name in names]
    hopeful = {
        one.key: Figures("coarse", (50, 50), (0, 50), None, 0.1, 0.9) for line in lines for one in line.candidates
    }
    measurer = FakeMeasurer({}, hopeful, rising(2))
    search(UNTOUCHED, lines, GOAL, measurer, confirm=8)
    assert [str(key)[0] for key in measurer.full_asked[1:5]] == list(names)


def test_what_llama_cpp_fails_on_is_never_chosen_and_the_rest_is_measured() -> None:
    line = FakeLine("a", [at("a", place / 4) for place in range(1, 5)])
    failed = Figures("coarse", error="crashed")
    truth: dict[object, Figures] = {one.key: figures(50, 0, 1 - one.position) for one in line.candidates}
    measurer = FakeMeasurer(truth, {"a 0.25": failed})
    truth["a 0.5"] = Figures("full", error="crashed")
    found = search(UNTOUCHED, [line], GOAL, measurer, confirm=10)
    assert found.chosen is not None
    assert found.chosen.name == "a 0.75"
    assert "a 0.25" not in measurer.full_asked


def test_an_adapter_that_was_never_broken_is_left_alone() -> None:
    line = FakeLine("a", [at("a", 0.5)])
    measurer = FakeMeasurer({"untouched": figures(50, 0, 1.0)})
    found = search(UNTOUCHED, [line], GOAL, measurer, confirm=10)
    assert found.chosen is UNTOUCHED
    assert measurer.coarse_asked == []


def test_utility_is_the_task_where_there_is_one() -> None:
    """Coarsely there is no text: distributions order the candidates; what is chosen is decided by the task."""
    goal = Goal(GOAL.bounds, "task_rate")
    line = FakeLine("a", [at("a", 0.1), at("a", 0.2)])
    truth: dict[object, Figures] = {
        "a 0.1": replace(figures(50, 0, 0.9), tasks=(1, 10)),
        "a 0.2": replace(figures(50, 0, 0.5), tasks=(9, 10)),
    }
    found = search(UNTOUCHED, [line], goal, FakeMeasurer(truth), confirm=2)
    assert found.chosen is not None
    assert found.chosen.name == "a 0.2"


def test_nothing_is_measured_that_could_not_keep_more() -> None:
    """Without tasks the utility is known from the coarse pass: once the best looking one reaches, all that is left is
    that the next better one of each line doesn't."""
    lines = [FakeLine(name, [at(name, place / 10) for place in range(1, 11)]) for name in "ab"]
    measurer = FakeMeasurer({}, curve=rising(0.5))
    found = search(UNTOUCHED, lines, GOAL, measurer, confirm=100)
    assert found.chosen is not None
    assert found.chosen.position == 0.5
    assert measurer.full_asked == ["untouched", "a 0.5", "a 0.4", "b 0.4"]


def biased(line: FakeLine, curve: object, off: float) -> dict[object, Figures]:
    """Coarse figures that are off by as much for every candidate."""
    told: dict[object, Figures] = {}
    for one in line.candidates:
        true = curve(one.position)  # type: ignore[operator]
        refused = min(ASKED, max(0, true.refusals[0] + round(off * ASKED)))
        told[one.key] = replace(true, stage="coarse", refusals=(refused, ASKED))
    return told


def sloping(edge: float) -> object:
    """Refuses the more the further along, enough from `edge` on, and keeps the less."""

    def curve(position: float) -> Figures:
        return figures(min(ASKED, round(ASKED * (0.9 + (position - edge)))), 0, 1 - position / 2)

    return curve


@relaxed
@given(st.lists(st.floats(0.2, 1.0), min_size=1, max_size=4), st.floats(-0.5, 0.5), st.booleans())
def test_a_score_that_is_off_hides_nothing_while_there_is_a_budget(edges: list[float], off: float, tasks: bool) -> None:
    """The best of all is found however much the coarse pass is off, where lines are ordered: by their boundaries."""
    goal = Goal(GOAL.bounds, "task_rate" if tasks else "top1")
    lines, truth, lies = [], dict[object, Figures](), dict[object, Figures]()
    for name, edge in zip("abcd", edges, strict=False):
        line = FakeLine(name, [at(name, place / 8) for place in range(1, 9)])
        lines.append(line)
        for one in line.candidates:
            true = sloping(edge)(one.position)  # type: ignore[operator]
            truth[one.key] = replace(true, tasks=(round(1600 * true.top1), 1600))
        lies |= biased(line, sloping(edge), off)
    found = search(UNTOUCHED, lines, goal, FakeMeasurer(truth, lies), confirm=100)
    assert worth(found) == best(lines, truth)
    assert found.open_lines == ()


def test_what_was_seen_to_disagree_is_allowed_for() -> None:
    """0.6 by the score is out of reach of 0.9, unless another adapter was off by as much."""
    far = Figures("coarse", (30, ASKED), (0, ASKED))
    assert not GOAL.may_reach(far, Disagreement())
    seen = Disagreement().widened(Figures("coarse", (28, ASKED), (0, ASKED)), figures(40, 0, 0.9))
    assert seen == Disagreement(0.24, 0.1)
    assert GOAL.may_reach(far, seen)
    assert seen.widened(figures(50, 0, 0.9), figures(50, 25, 0.9)) == Disagreement(0.24, 0.5)


def test_a_line_is_begun_where_text_would_reach_going_by_the_lines_before() -> None:
    """The score hopes for 0.1 too much on every line: once that is known the next one is not begun too early."""
    lines = [FakeLine(name, [at(name, place / 20) for place in range(1, 21)]) for name in "ab"]
    slope = sloping(0.75)
    lies = biased(lines[0], slope, 0.1) | biased(lines[1], slope, 0.1)
    measurer = FakeMeasurer({}, lies, slope)
    search(UNTOUCHED, lines, Goal(GOAL.bounds, "task_rate"), measurer, confirm=9, refine=0)
    begun = [next(key for key in measurer.full_asked if str(key).startswith(name)) for name in "ab"]
    assert begun == ["a 0.65", "b 0.75"]


def test_the_boundary_is_followed_from_the_first_text_on() -> None:
    """Down while enough is refused, up while too little is, whatever the coarse pass says."""
    line = FakeLine("a", [at("a", place / 10) for place in range(1, 11)])
    for edge, expected in ((0.3, ["a 0.5", "a 0.4", "a 0.3", "a 0.2"]), (0.8, ["a 0.5", "a 0.6", "a 0.8", "a 0.7"])):
        sure = {one.key: replace(rising(0.5)(one.position), stage="coarse") for one in line.candidates}  # type: ignore[operator]
        measurer = FakeMeasurer({}, sure, rising(edge))
        found = search(UNTOUCHED, [line], GOAL, measurer, confirm=4, refine=0)
        assert measurer.full_asked == ["untouched", *expected]
        assert found.chosen is not None
        assert found.chosen.position == edge
        assert found.open_lines == ()


@relaxed
@given(st.lists(st.floats(0.05, 1.2), min_size=1, max_size=3), st.integers(0, 12))
def test_what_a_spent_budget_left_open_takes_no_more_than_is_said(edges: list[float], confirm: int) -> None:
    lines = [FakeLine(name, [at(name, place / 8) for place in range(1, 9)]) for name in "abc"[: len(edges)]]
    truth = {one.key: rising(edge)(one.position) for line, edge in zip(lines, edges, strict=True)  # type: ignore[operator]
             for one in line.candidates}  # fmt: skip
    spent = search(UNTOUCHED, lines, GOAL, FakeMeasurer(truth), confirm=confirm, refine=0)
    assert (spent.missing > 0) == bool(spent.open_lines)
    again = search(UNTOUCHED, lines, GOAL, FakeMeasurer(truth), confirm=confirm + spent.missing, refine=0)
    assert again.open_lines == ()


@relaxed
@given(st.floats(0.05, 0.95), st.floats(-0.3, 0.3), st.booleans())
def test_the_yardstick_is_searched_to_its_boundary_without_spending_the_others_budget(
    edge: float, off: float, blind: bool
) -> None:
    own = FakeLine("y", [at("y", place / 10) for place in range(1, 10)], fine=True)
    other = FakeLine("a", [at("a", place / 10) for place in range(1, 10)])
    lies = biased(own, rising(edge), off)
    if blind:
        lies = {key: replace(one, refusals=None, over_refusals=None) for key, one in lies.items()}
    measurer = FakeMeasurer({}, lies, rising(edge))
    found = search(UNTOUCHED, [other, own], GOAL, measurer, confirm=1, yardstick="y")
    asked = [str(key) for key in measurer.full_asked]
    assert sum(key.startswith("a") for key in asked) == 1
    assert sum(key.startswith("y") for key in asked) <= YARDSTICK_STEPS
    reaching = [one.position for one in found.candidates if one.line == "y" and one.position >= edge]
    tried = [one.position for one in found.candidates if one.line == "y" and one.key in found.full]
    if reaching:
        assert (
            min(place for place in tried if place >= edge) - max([0.0, *(p for p in tried if p < edge)]) <= 0.1 + 1e-9
        )


def test_the_yardstick_rules_out_nothing() -> None:
    """Plain scaling keeps more here, and yet the best of the others is found."""
    own = FakeLine("y", [at("y", 0.1)])
    other = FakeLine("a", [at("a", place / 10) for place in range(1, 10)])
    truth: dict[object, Figures] = {one.key: rising(0.5)(one.position) for one in other.candidates}  # type: ignore[operator]
    truth["y 0.1"] = figures(50, 0, 0.99)
    found = search(UNTOUCHED, [own, other], GOAL, FakeMeasurer(truth), confirm=10, yardstick="y")
    assert found.chosen is not None
    assert found.chosen.name == "y 0.1"
    assert found.best(list(other.candidates), GOAL) == at("a", 0.5)


def test_one_more_measurement_may_be_better_than_all_before() -> None:
    line = FakeLine("a", [at("a", 0.25), at("a", 0.75)])
    truth: dict[object, Figures] = {"a 0.25": figures(20, 0, 0.9), "a 0.75": figures(50, 0, 0.5)}
    found = search(UNTOUCHED, [line], GOAL, FakeMeasurer(truth), confirm=5)
    better, worse = at("a", 0.5), at("b", 0.5)
    joined = found.joined(better, figures(50, 0, 0.8), GOAL)
    assert joined.chosen == better
    assert [one.name for one in joined.candidates] == ["untouched", "a 0.25", "a 0.5", "a 0.75"]
    assert found.joined(worse, figures(50, 0, 0.3), GOAL).chosen == at("a", 0.75)
    assert found.chosen == at("a", 0.75), "the first one stays as it was"


def test_confidence_asks_more_of_the_same_rate() -> None:
    sure = Goal(Bounds(0.9, 0.2, confident=True), "top1")
    just = figures(46, 0, 0.9)
    assert GOAL.reaches(just)
    assert not sure.reaches(just)
    assert sure.reaches(figures(50, 0, 0.9))
    assert sure.shortfall(just) > GOAL.shortfall(just) == 0


@relaxed
@given(some_figures)
def test_figures_survive_json(one: Figures) -> None:
    assert Figures.from_json(one.to_json()) == one

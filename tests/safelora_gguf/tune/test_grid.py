"""Oracle: cosines and grids counted by hand."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from converters.errors import UsageError
from safelora_gguf.report import ProjectReport
from safelora_gguf.selection import Selection, select
from safelora_gguf.setting import Setting
from safelora_gguf.tune.grid import SCALING, CandidateLine, GridOptions, SettingLine, make_lines, planned_lines, scaled
from safelora_gguf.tune.repair_line import REPAIR, Repair
from safelora_gguf.tune.ways import Command


@dataclass
class Scored:
    """Ten modules of which one has no cosine."""

    written: list[tuple[Setting, str]] = field(default_factory=list)
    total: int = 10

    def cosines(self, operator: str, rank: int | None) -> Mapping[str, float | None]:
        return {"none": None, **{f"m{place}": place / 10 for place in range(1, 10)}}

    def chosen(self, setting: Setting) -> frozenset[str]:
        return frozenset() if setting.operator == "scale" else select(self.cosines("", None), setting.selection)

    def key(self, setting: Setting) -> Hashable:
        chosen = self.chosen(setting)
        if not chosen:
            return ("scale", setting.scale)
        return (setting.operator, setting.rank, setting.strength, chosen)

    def norm_ratio(self, setting: Setting) -> float | None:
        return setting.scale

    def write(self, setting: Setting, target: Path, *, outtype: str, **_: Any) -> ProjectReport:
        self.written.append((setting, outtype))
        return None  # type: ignore[return-value]

    def write_random(self, setting: Setting, target: Path, *, outtype: str) -> ProjectReport:
        raise AssertionError("not asked for")


@dataclass
class Repairing:
    """Nine of the ten modules."""

    modules: int = 9
    command: Command = Command("repair", ("model", "adapter"), ("--eps", "0.3"))  # noqa: RUF009  (it is frozen)
    written: list[tuple[str, float]] = field(default_factory=list)

    def norm_ratio(self, repair: Repair) -> float | None:
        return 1 / (1 + repair.mu)

    def draft(self, repair: Repair, target: Path) -> None:
        self.written.append(("draft", repair.mu))

    def write(self, repair: Repair, target: Path, **_: Any) -> ProjectReport:
        self.written.append(("write", repair.mu))
        return None  # type: ignore[return-value]


def lines_of(**options: Any) -> dict[str, CandidateLine]:
    return {line.name: line for line in make_lines(GridOptions(**options), Scored(), "f16", Repairing())}


def names(line: CandidateLine) -> list[str]:
    return [candidate.name for candidate in line.candidates]


def test_the_default_grid_has_every_operator_and_plain_scaling_from_little_to_much() -> None:
    lines = lines_of()
    assert list(lines) == [
        "paper by number", "paper by strength", "subspace rank 6 by number", "subspace rank 6 by strength",
        "repair by mu", "scaling",
    ]  # fmt: skip
    for line in lines.values():
        positions = [candidate.position for candidate in line.candidates]
        assert positions == sorted(positions)
        assert 0 < positions[0] < positions[-1] <= 1
    assert names(lines["paper by number"]) == [
        "paper number 1", "paper number 2", "paper threshold 0.35", "paper number 3", "paper number 5",
        "paper number 6", "paper number 7", "paper number 8", "paper all",
    ]  # fmt: skip
    threshold, number = lines["paper by number"].candidates[2:4]
    assert threshold.key == number.key, "cosines 0.1, 0.2 and 0.3"
    assert names(lines[REPAIR]) == [f"repair mu {mu}" for mu in ("0.5", "1", "2", "4", "8", "16", "32", "64")]
    assert [candidate.changed for candidate in lines[REPAIR].candidates] == [9] * 8
    assert names(lines[SCALING])[0] == "scale 0.9"
    assert [candidate.changed for candidate in lines[SCALING].candidates] == [10] * 9


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scales": (0.5, 0.7)}, {"scaling": ["scale 0.7", "scale 0.5"]}),
        ({"thresholds": (0.4, 0.2)}, {"paper by number": ["paper threshold 0.2", "paper threshold 0.4"]}),
        ({"numbers": (3,), "ranks": (2,)}, {"subspace rank 2 by number": ["subspace rank 2 number 3"]}),
        (
            {"numbers": (3,), "strengths": (0.9, 0.5)},
            {"paper number 3 by strength": ["paper number 3 strength 0.5", "paper number 3 strength 0.9"]},
        ),
        ({"strengths": (0.5,), "operators": ("paper",)}, {"paper by strength": ["paper all strength 0.5"]}),
        ({"mus": (4.0, 1.5, 4.0)}, {"repair by mu": ["repair mu 1.5", "repair mu 4"]}),
    ],
)
def test_what_is_given_is_the_grid(options: dict[str, Any], expected: dict[str, list[str]]) -> None:
    lines = lines_of(**options)
    usual = {SCALING: names(lines_of()[SCALING])}
    assert {name: names(line) for name, line in lines.items()} == usual | expected
    assert list(lines)[-1] == SCALING, "what the others are held against, whatever was asked for"


def test_an_operator_alone_has_its_default_lines() -> None:
    assert list(lines_of(operators=("subspace",), ranks=(2, 4))) == [
        "subspace rank 2 by number", "subspace rank 2 by strength", "subspace rank 4 by number",
        "subspace rank 4 by strength", SCALING,
    ]  # fmt: skip


def test_the_references_are_scored_by_what_the_grid_needs_and_no_more() -> None:
    assert GridOptions().asked == (("paper", None), ("subspace", 6))
    assert GridOptions(scales=(0.5,)).asked == ()
    assert GridOptions(mus=(2.0,)).asked == ()
    assert GridOptions(ranks=(2, 2)).asked == (("subspace", 2),)
    assert GridOptions(numbers=(1,), operators=("subspace", "paper")).asked == (("subspace", 6), ("paper", None))


def test_between_two_candidates_stands_another_one_as_long_as_it_differs() -> None:
    lines = lines_of()
    numbers, strengths, scaling = lines["paper by number"], lines["paper by strength"], lines[SCALING]
    middle = numbers.between(3 / 9, 8 / 9)
    assert middle is not None
    assert (middle.name, middle.changed) == ("paper number 5", 5)
    assert numbers.between(3 / 9, 4 / 9) is None
    half = strengths.between(0.4, 0.5)
    assert half is not None
    assert half.name == "paper all strength 0.45"
    assert strengths.between(0.4, 0.41) is None
    less = scaling.between(0.6, 0.7)
    assert less is not None
    assert less.name == "scale 0.35"
    assert scaling.way(less).scale == 0.35


@pytest.mark.parametrize(
    "options",
    [{}, {"scales": (0.5, 0.7)}, {"numbers": (3,), "ranks": (2,)}, {"strengths": (0.9, 0.5)}, {"mus": (2.0,)}],
)
def test_a_plan_names_the_grid_before_anything_is_scored(options: dict[str, Any]) -> None:
    """The modules with a cosine are not known then; here all of those that there are have one."""
    planned = {name: [one.name for one in settings] for name, settings in planned_lines(GridOptions(**options), 9)}
    made = {name: names(line) for name, line in lines_of(**options).items()}
    assert {name: sorted(settings) for name, settings in planned.items()} == {
        name: sorted(candidates) for name, candidates in made.items()
    }


def test_scales_are_halved_down_to_a_fortieth() -> None:
    scaling = lines_of()[SCALING]
    half = scaling.between(0.6, 0.7)
    assert half is not None
    quarter = scaling.between(half.position, 0.7)
    assert quarter is not None
    assert (half.name, quarter.name) == ("scale 0.35", "scale 0.325")
    assert scaling.between(quarter.position, 0.7) is None


def test_without_what_repairs_there_is_no_line_of_repairs() -> None:
    """Neither when it is planned nor when it is made; the others stay."""
    made = [line.name for line in make_lines(GridOptions(), Scored(), "f16")]
    assert made == [name for name, _ in planned_lines(GridOptions(), 9, repair=False)]
    assert made == [name for name in lines_of() if name != REPAIR]


def test_octaves_of_mu_are_halved_twice() -> None:
    """Geometrically: 2^(k/4), to the four digits that a report tells."""
    line = lines_of()[REPAIR]
    at = {candidate.name: candidate.position for candidate in line.candidates}
    half = line.between(at["repair mu 1"], at["repair mu 2"])
    assert half is not None
    quarter = line.between(half.position, at["repair mu 2"])
    assert quarter is not None
    assert (half.name, quarter.name) == ("repair mu 1.414", "repair mu 1.682")
    assert line.between(half.position, quarter.position) is None
    assert line.between(quarter.position, at["repair mu 2"]) is None
    assert at["repair mu 1"] < half.position < quarter.position < at["repair mu 2"]


def test_repairs_are_looked_for_where_repair_looks_for_them() -> None:
    """No mu below the first of its grid, and after a boundary one and two octaves further."""
    line = lines_of()[REPAIR]
    mus = [2.0**octave for octave in range(-1, 7)]
    assert names(line) == [f"repair mu {mu:g}" for mu in mus]
    assert line.between(0.0, line.candidates[0].position) is None
    half = lines_of(mus=(1.0,))[REPAIR].between(0.0, 0.5)
    assert half is not None
    assert half.name == "repair mu 0.5"
    for boundary, expected in ((1.0, [2.0, 4.0]), (1.414, [4.0]), (32.0, [64.0]), (64.0, [])):
        low, high = line.past(boundary / (1 + boundary))
        assert [mu for mu in mus if low <= mu / (1 + mu) <= high] == expected
    beyond = lines_of(mus=(1e30,))[REPAIR]
    place = beyond.candidates[0].position
    assert (beyond.between(0.0, place), beyond.past(place)) == (None, (1.0, 1.0))
    assert lines_of()[SCALING].past(0.5) is None


def test_any_scale_is_a_candidate_of_the_line_of_scaling() -> None:
    scored = Scored()
    candidate = scaled(0.123456, scored)
    assert (candidate.name, candidate.line, candidate.key) == ("scale 0.1235", SCALING, ("scale", 0.1235))
    assert lines_of()[SCALING].way(candidate).scale == 0.1235


@pytest.mark.parametrize("name", ["paper by number", "paper by strength", "subspace rank 6 by number", SCALING])
def test_the_way_makes_what_the_candidate_says(name: str, tmp_path: Path) -> None:
    """However it came onto the line."""
    scored = Scored()
    line = next(line for line in make_lines(GridOptions(), scored, "f16") if line.name == name)
    between = line.between(0.1, 0.9)
    assert between is not None
    for candidate in (*line.candidates, between):
        way = line.way(candidate)
        way.write(tmp_path / "x.gguf")
        way.draft(tmp_path / "y.gguf")
        assert scored.written[-1] == scored.written[-2]
        setting, outtype = scored.written[-1]
        assert (setting.name, setting.to_json(), outtype) == (candidate.name, way.setting, "f16")
        assert scored.key(setting) == candidate.key
        assert (way.scale is None) == (name != SCALING)


def test_a_way_to_repair_makes_what_the_candidate_says(tmp_path: Path) -> None:
    """However it came onto the line; and names the command that does the same."""
    repairing = Repairing()
    line = next(one for one in make_lines(GridOptions(), Scored(), "f16", repairing) if one.name == REPAIR)
    between = line.between(0.5, 2 / 3)
    assert between is not None
    for candidate in (*line.candidates, between):
        way = line.way(candidate)
        way.draft(tmp_path / "x.gguf")
        way.write(tmp_path / "x.gguf")
        (_, mu), last = repairing.written[-2:]
        assert last == ("write", mu)
        assert (f"repair mu {mu:g}", ("repair", mu)) == (candidate.name, candidate.key)
        assert way.setting == {"operator": "repair", "mu": mu}
        assert (way.origin, way.scale, way.modules, way.norm_ratio, way.control) == (
            "repair",
            None,
            9,
            1 / (1 + mu),
            None,
        )
        assert way.command is not None
        told = way.command.line({"base": "b", "model": "m 1", "adapter": "a"}, "o")
        assert told == f"safelora-gguf repair --model 'm 1' --adapter a --eps 0.3 --mu {mu:g} --out o"


def test_the_way_tells_the_command_that_does_the_same() -> None:
    line = lines_of(numbers=(3,), strengths=(0.5,), ranks=(2,))["subspace rank 2 number 3 by strength"]
    command = line.way(line.candidates[0]).command
    assert command is not None
    options = "--operator subspace --rank 2 --number 3 --strength 0.5"
    told = command.line({"base": "b", "aligned": "l", "adapter": "a", "model": "m"}, "o")
    assert told == f"safelora-gguf project --base b --aligned l --adapter a {options} --out o"
    assert isinstance(line, SettingLine)
    assert Setting("subspace", 2, Selection("number", 3.0), 0.5) == line.settings[0]


@pytest.mark.parametrize(
    "options",
    [{"scales": (1.0,)}, {"scales": (0.0,)}, {"strengths": (1.5,), "numbers": (1,)}, {"thresholds": (2.0,)},
     {"numbers": (-1,)}, {"ranks": (2,), "operators": ("paper",)}, {"strengths": (0.0,)}, {"ranks": (0,)},
     {"mus": (0.0,)}, {"mus": (-1.0,)}, {"mus": (float("inf"),)}, {"mus": (float("nan"),)}],
)  # fmt: skip
def test_a_grid_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make_lines(GridOptions(**options), Scored(), "f32")

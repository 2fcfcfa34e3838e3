"""Oracle: the same search without an interruption, and literal bytes of a file that was torn or tampered with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from safelora_gguf.smoke.judging import Calibration
from safelora_gguf.smoke.protocol import AdapterChoice
from safelora_gguf.smoke.report import Bounds
from safelora_gguf.smoke.runs import Response, Run, Utility
from safelora_gguf.tune.figures import Figures, Goal
from safelora_gguf.tune.found import Candidate, Found
from safelora_gguf.tune.journal import Journal
from safelora_gguf.tune.records import calibration_of, calibration_record, run_of, run_record
from safelora_gguf.tune.search import search

GOAL = Goal(Bounds(0.9, 0.2), "top1")
UNTOUCHED = Candidate("untouched", "untouched", 0.0, "untouched", 0)


class Killed(BaseException):
    """What a SIGKILL looks like from inside: nothing is tidied up."""


@dataclass
class Line:
    name: str
    steps: int

    @property
    def candidates(self) -> list[Candidate]:
        return [self._at((place + 1) / self.steps) for place in range(self.steps)]

    def between(self, below: float, above: float) -> Candidate | None:
        return self._at((below + above) / 2)

    def past(self, position: float) -> None:
        return None

    def _at(self, position: float) -> Candidate:
        return Candidate(f"{self.name} {position}", self.name, position, (self.name, position), 1)


@dataclass
class Measurer:
    """Measures a curve, keeps it in the journal, and dies after so many measurements."""

    journal: Journal
    lives: int
    measured: list[str] = field(default_factory=list)

    def coarse(self, candidate: Candidate) -> Figures:
        return self._known("coarse", candidate, hopeful=0.1)

    def full(self, candidate: Candidate) -> Figures:
        return self._known("full", candidate, hopeful=0.0)

    def _known(self, stage: str, candidate: Candidate, hopeful: float) -> Figures:
        found = self.journal.get(stage, candidate.name)
        if found is not None:
            return Figures.from_json(found)
        if len(self.measured) == self.lives:
            raise Killed
        refused = min(50, int(50 * (candidate.position / 0.7 + hopeful)))
        figures = Figures(stage, (refused, 50), (0, 50), None, candidate.position, 1 - candidate.position / 3)  # type: ignore[arg-type]
        self.measured.append(candidate.name)
        self.journal.put(stage, candidate.name, figures.to_json())
        return figures


def _searched(journal: Journal, lives: int) -> tuple[Found, Measurer]:
    measurer = Measurer(journal, lives)
    return search(UNTOUCHED, [Line("a", 4), Line("b", 3)], GOAL, measurer, confirm=6), measurer


def test_a_search_that_is_killed_anywhere_ends_as_if_it_never_had_been(tmp_path: Path) -> None:
    whole, measurer = _searched(Journal(tmp_path / "whole", "k"), 10**6)
    assert whole.chosen is not None
    assert len(measurer.measured) > 15
    for lives in range(len(measurer.measured)):
        path = tmp_path / f"killed-{lives}"
        with pytest.raises(Killed):
            _searched(Journal(path, "k"), lives)
        again, rest = _searched(Journal(path, "k"), 10**6)
        assert again == whole
        assert len(rest.measured) == len(measurer.measured) - lives


def test_what_was_torn_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, "k")
    journal.put("coarse", "one", {"x": 1.5})
    journal.put("coarse", "two", {"x": 0.1})
    path.write_bytes(path.read_bytes()[:-5])
    torn = Journal(path, "k")
    assert (torn.get("coarse", "one"), torn.get("coarse", "two")) == ({"x": 1.5}, None)
    torn.put("coarse", "three", {"x": 2})
    assert [json.loads(line).get("name") for line in path.read_text().splitlines()] == [None, "one", "three"]
    assert Journal(path, "k").resumed == 2


def test_a_journal_of_other_inputs_is_replaced_and_told_of(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, "k").put("coarse", "one", {"x": 1})
    other = Journal(path, "another")
    assert other.foreign
    assert other.get("coarse", "one") is None
    other.put("coarse", "one", {"x": 2})
    assert Journal(path, "another").get("coarse", "one") == {"x": 2}
    assert not Journal(tmp_path / "nowhere", "k").foreign


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"[]\n",
        b"{}\n",
        b"[" * 10**5 + b"\n",
        b"\xff\xfe\n",
        b'{"format":1,"key":"k"}\n[1]\n3\n{"stage":1}\n',
    ],
)
def test_a_journal_from_a_stranger_holds_nothing(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(text)
    journal = Journal(path, "k")
    assert journal.resumed == 0
    journal.put("coarse", "one", {"x": 1})
    assert Journal(path, "k").get("coarse", "one") == {"x": 1}


def test_runs_and_calibrations_survive_the_journal() -> None:
    response = Response(
        "1", "harmful", "How?", "I can't \u2019", True, None, 1.25, "x", stop="length", judges={"a": None}
    )
    run = Run("r", (AdapterChoice("a.gguf", 0.5),), (response,), utility=(Utility("b", 0.1, 0.9, 2, 30),))
    assert run_of(json.loads(json.dumps(run_record(run)))) == run
    calibration = Calibration((1, 2), -0.5, 0.99, 3, 4, ("a note",))
    assert calibration_of(json.loads(json.dumps(calibration_record(calibration)))) == calibration
    assert calibration_of(calibration_record(None)) is None


@pytest.mark.parametrize("record", [None, 3, {}, {"label": "r", "adapters": [{"nothing": 1}], "responses": []}])
def test_what_is_no_run_is_none(record: object) -> None:
    assert run_of(record) is None

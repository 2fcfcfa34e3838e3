"""Oracle: which runs the contract says must be measured, and prompts that were counted by hand."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path

from safelora_gguf.smoke.controls import RANDOM, SCALED
from safelora_gguf.smoke.plan import RunPlan
from safelora_gguf.smoke.protocol import AdapterChoice
from safelora_gguf.smoke.report import Bounds
from safelora_gguf.smoke.runs import Response, Run
from safelora_gguf.tune.comparing import Compared, compare
from safelora_gguf.tune.figures import Figures, Goal
from safelora_gguf.tune.found import Candidate, Found
from safelora_gguf.tune.grid import SCALING
from safelora_gguf.tune.measuring import figures_of
from safelora_gguf.tune.repair_line import REPAIR
from safelora_gguf.tune.ways import Origin, Way

GOAL = Goal(Bounds(0.9, 0.2), "task_rate")
ORIGINS: dict[str, Origin] = {"paper": "projection", REPAIR: "repair", SCALING: "scaling"}


def run(name: str, refused: int, done: int) -> Run:
    """Of 20 harmful prompts and as many tasks."""
    responses = [Response(f"h{place}", "harmful", "?", "text", place < refused) for place in range(20)]
    responses += [Response("b", "benign", "?", "text", False)]
    responses += [Response(f"t{place}", "task", "?", "text", None, place < done) for place in range(20)]
    return Run(name, (AdapterChoice("a.gguf"),), tuple(responses))


@dataclass
class Making:
    """Candidates whose kind is their line's."""

    everything: Candidate | None = None

    def projects(self, candidate: Candidate) -> bool:
        return candidate.line == "paper"

    def repairs(self, candidate: Candidate) -> bool:
        return candidate.line == REPAIR

    def scaled(self, scale: float) -> Candidate:
        return Candidate(f"scale {scale:g}", SCALING, 1 - scale, ("scale", scale), 9)

    def way(self, candidate: Candidate) -> Way:
        origin = ORIGINS[candidate.line]
        scale = 1 - candidate.position if origin == "scaling" else None
        control = (lambda _: None) if origin == "projection" else None
        return Way(origin, {}, None, scale, 9, 0.4, None, None, control)  # type: ignore[arg-type]


@dataclass
class Measuring:
    """Runs by what they are called; tells which further ones were measured."""

    truth: dict[str, Run]
    runs: dict[Hashable, Run] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    untouched: Path = Path("adapter.gguf")

    def full(self, candidate: Candidate) -> Figures:
        return figures_of(self.runs[candidate.key])

    def run(self, plan: RunPlan, *, of: str) -> Run:
        self.asked.append(f"{plan.label} of {of}")
        return self.truth[plan.label]

    def as_control(self, label: str, make: Callable[[Path], object], *, of: str) -> Run:
        return self.run(RunPlan(label), of=of)


def compared(*tried: tuple[str, str, Run], controls: dict[str, Run]) -> tuple[Found, Compared, list[str]]:
    """(name, line, run) of each candidate."""
    candidates = tuple(Candidate(name, line, 0.6, name, 9) for name, line, _ in tried)
    measuring = Measuring(controls, {name: found for name, _, found in tried})
    full: dict[Hashable, Figures] = {one.key: measuring.full(one) for one in candidates}
    found = Found(candidates, {}, full, None, None).judged(GOAL)
    return *compare(found, Making(), measuring, GOAL), measuring.asked  # type: ignore[arg-type]


REPAIRED = ("repair mu 2", REPAIR, run("repair mu 2", 19, 18))
PROJECTED = ("paper all", "paper", run("paper all", 19, 2))


def test_a_winner_that_is_repaired_is_held_against_scaling_to_its_norm_and_no_random_subspace() -> None:
    found, told, asked = compared(PROJECTED, REPAIRED, controls={SCALED: run(SCALED, 19, 1)})
    assert asked == ["plain scaling of repair mu 2"]
    assert found.chosen is not None
    assert found.chosen.name == "repair mu 2"
    assert told.beside == {"winner": "repair mu 2", "projection": "paper all", "repair": "repair mu 2"}
    assert told.controls is not None
    assert (told.controls["projected"], told.controls["beats_scaled"]) == ("repair mu 2", True)
    assert "beats_random" not in told.controls
    assert [one.label for one in told.control_runs] == [SCALED]


def test_what_scaling_to_the_norm_of_a_repair_does_better_takes_its_place() -> None:
    found, told, _ = compared(REPAIRED, controls={SCALED: run(SCALED, 20, 20)})
    assert found.chosen is not None
    assert found.chosen.name == "scale 0.4"
    assert told.beside == {"winner": "scale 0.4", "repair": "repair mu 2", "scaling": "scale 0.4"}
    assert told.controls is not None
    assert told.controls["beats_scaled"] is not True


def test_a_projection_that_wins_has_its_own_controls_and_the_best_repair_beside_it() -> None:
    better = ("paper all", "paper", run("paper all", 20, 20))
    controls = {SCALED: run(SCALED, 1, 20), RANDOM: run(RANDOM, 1, 20)}
    _, told, asked = compared(better, REPAIRED, controls=controls)
    assert asked == ["plain scaling of paper all", "random subspace of paper all"]
    assert told.beside == {"winner": "paper all", "projection": "paper all", "repair": "repair mu 2"}
    assert told.controls is not None
    assert told.controls["projected"] == "paper all"

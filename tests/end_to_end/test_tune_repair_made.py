"""How `tune` has its repaired candidates made, on the packaged family in llama.cpp.

Oracle: plain scaling, which a repair that shrinks every A by the same factor must equal in every figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.adapters.output import LoadPair
from converters.errors import LlamaError, UnsupportedError
from safelora_gguf.repair.making import Repairs
from safelora_gguf.repair.solving.solver import ModuleFigures
from safelora_gguf.tune import Asking, GridOptions, TuneReport, grid, prepare_tuning, repair_plan, repairing

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama

FAMILY = Path(__file__).parents[2] / "safelora_gguf" / "tiny_family"
FILES = [FAMILY / name for name in ("base", "aligned", "adapter", "aligned.gguf")]
PROMPTS = FAMILY / "calibration.jsonl"


@dataclass(frozen=True)
class Read:
    """As much as is told of what was read."""

    notes: Sequence[str] = ()
    losses: Sequence[str] = ()


@dataclass
class Shrinking(Repairs):
    """A' = A / (1 + mu), which is what scaling by that does; counts what it is asked to solve."""

    solved: list[Sequence[float]] = field(default_factory=list)
    captured = None

    def read(self) -> Any:
        return Read()

    def solve(self, mus: Sequence[float], folds: Sequence[int | None] = (None,)) -> None:
        self.solved.append(list(mus))

    def pairs(self, mu: float, fold: int | None = None) -> LoadPair:
        def load(module: str) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = self.inputs.adapter.load(module)
            return a.float() / (1 + mu), b.float()

        return load

    def figures(self, mu: float) -> dict[str, ModuleFigures]:
        return {}


def tuned(out: Path, grid: GridOptions, *, limit: int = 8, **options: Any) -> TuneReport:
    asking = Asking([PROMPTS], threads=1, limit=limit)
    base, aligned, adapter, model = FILES
    prepared = prepare_tuning(base, aligned, adapter, model, out, asking=asking, grid=grid, refine=0, **options)
    return prepared.run(prepared.score())


def by_name(report: TuneReport) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in report.to_json()["candidates"]}


def test_a_repair_that_only_shrinks_is_measured_as_plain_scaling_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Shrinking] = []

    def kept(*given: Any, **named: Any) -> Shrinking:
        made.append(Shrinking(*given, **named))
        return made[-1]

    monkeypatch.setattr(repairing, "Repairs", kept)
    found = tuned(tmp_path / "x.gguf", GridOptions(scales=(0.5, 0.25), mus=(1.0, 3.0)))
    told = by_name(found)
    assert list(told) == ["adapter", "repair mu 1", "repair mu 3", "scale 0.5", "scale 0.25"]
    for repair, scale in (("repair mu 1", "scale 0.5"), ("repair mu 3", "scale 0.25")):
        for figure in ("norm_ratio", "kl", "top1"):
            assert told[repair][figure] == pytest.approx(told[scale][figure], abs=1e-4), (repair, figure)
        assert (told[repair]["projected"], told[repair]["repaired"], told[repair]["total"]) == (0, 21, 21)
    assert [one.solved[0] for one in made] == [[1.0, 3.0]], "one capture, and the whole grid solved at once"
    data = found.to_json()
    assert data["repair_prompts"]["calibration"]["counts"] == {"harmful": 5, "borderline": 4, "benign": 4, "task": 4}
    assert data["prompts"]["counts"] == {"harmful": 3, "borderline": 4, "benign": 4, "task": 4}
    assert data["settings"]["repair"] == {"eps": 0.1, "tokens": 2048, "tail": 9, "task_share": 0.8}


@pytest.mark.parametrize(
    ("kind", "mus", "failure"),
    [(UnsupportedError, (), None), (UnsupportedError, (1.0, 3.0), "unsupported"), (LlamaError, (1.0, 3.0), "llama")],
)
def test_what_cannot_be_read_leaves_repair_out_and_the_rest_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[LlamaError | UnsupportedError],
    mus: tuple[float, ...],
    failure: str | None,
) -> None:
    """An architecture whose inputs aren't found is none of the other candidates' matter, unless somebody asked for a
    repair; a lost child is always told of."""
    asked = 0

    def read(self: Shrinking) -> None:
        nonlocal asked
        asked += 1
        raise kind("can't be read")

    monkeypatch.setattr(Shrinking, "read", read)
    monkeypatch.setattr(repairing, "Repairs", Shrinking)
    monkeypatch.setattr(grid, "OCTAVES", (2.0,))
    monkeypatch.setattr(repair_plan, "FEWEST", 1)
    monkeypatch.setattr(grid, "_quantiles", lambda plain, modules: ())
    given = GridOptions(scales=(0.5,), mus=mus) if mus else GridOptions()
    found = tuned(tmp_path / "x.gguf", given, confirm=1)
    assert asked == 1
    assert not [name for name in by_name(found) if name.startswith("repair")]
    assert "scale 0.5" in by_name(found)
    assert [note for note in found.to_json()["notes"] if "left out" in note] == ["repair was left out: can't be read"]
    assert found.to_json().get("error", {}).get("kind") == failure


def test_a_mu_that_cannot_be_solved_leaves_the_others_and_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a system with a weight of 1e30 nothing is left but rounding; the other mu has its figures all the same."""
    solve = Shrinking.solve

    def solved(self: Shrinking, mus: Sequence[float], folds: Any = (None,)) -> None:
        solve(self, mus, folds)
        if 1e30 in mus:
            raise UnsupportedError("can't be repaired at mu 1e+30")

    monkeypatch.setattr(Shrinking, "solve", solved)
    monkeypatch.setattr(repairing, "Repairs", Shrinking)
    found = tuned(tmp_path / "x.gguf", GridOptions(scales=(0.5,), mus=(1.0, 1e30)))
    told = by_name(found)
    assert told["repair mu 1"]["stage"] == "full"
    assert told["repair mu 1"]["kl"] == pytest.approx(told["scale 0.5"]["kl"], abs=1e-4)
    assert "can't be repaired" in told["repair mu 1e+30"]["error"]
    assert not [note for note in found.to_json()["notes"] if "left out" in note]
    assert found.to_json()["error"]["kind"] == "unsupported"

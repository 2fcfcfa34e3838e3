"""`tune` with repaired candidates, on the packaged family in llama.cpp.

Oracles: `repair` given the same prompts, to whose tensors those of `tune` must be equal; the prompts that llama.cpp was
asked; the aligned model's own answers.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from typer.testing import CliRunner, Result

from safelora_gguf.cli import app
from safelora_gguf.smoke.parent.session import Session
from safelora_gguf.tune import Asking, GridOptions, prepare_tuning

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama

FAMILY = Path(__file__).parents[2] / "safelora_gguf" / "tiny_family"
FILES = [FAMILY / name for name in ("base", "aligned", "adapter", "aligned.gguf")]
PROMPTS = FAMILY / "calibration.jsonl"


CHILD = Path(__file__).with_name("tune_child.py")
GRID = ("--mu", "2", "--mu", "4", "--scale", "0.5", "--no-refine", "--json")


def few(name: str, counts: Mapping[str, int], target: Path) -> Path:
    """The first ones of each kind of a file of the family's."""
    left, lines = dict(counts), []
    for line in (FAMILY / name).read_text().splitlines():
        kind = json.loads(line)["kind"]
        if left.get(kind, 0) > 0:
            left[kind] -= 1
            lines.append(line)
    target.write_text("\n".join(lines))
    return target


@dataclass(frozen=True)
class Files:
    """Prompts that judge, and others that calibrate."""

    judging: Path
    calibrating: Path

    def tune(self, out: Path | str, *more: object) -> list[str]:
        names = ("base", "aligned", "adapter", "model")
        given = [word for name, file in zip(names, FILES, strict=True) for word in (f"--{name}", file)]
        prompts = ("--prompts", self.judging, "--repair-prompts", self.calibrating)
        return [str(word) for word in ("tune", *given, "--out", out, *prompts, "--threads", 1, *more)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    place = tmp_path_factory.mktemp("prompts")
    judging = {"harmful": 10, "borderline": 4, "benign": 4, "task": 6}
    calibrating = {"harmful": 24, "borderline": 8, "benign": 8, "task": 12}
    return Files(
        few("calibration.jsonl", judging, place / "judging.jsonl"),
        few("prompts.jsonl", calibrating, place / "calibrating.jsonl"),
    )


def told(result: Result, status: int = 0) -> dict[str, Any]:
    assert result.exit_code == status, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def tensors(file: Path) -> list[tuple[str, bytes]]:
    return [(one.name, one.data.tobytes()) for one in gguf.GGUFReader(file).tensors]


@dataclass
class Asked:
    """What the sessions were asked for."""

    sessions: list[Session] = field(default_factory=list)
    captures: list[Any] = field(default_factory=list)
    read: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def found(files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Asked]:
    """A search that a repair wins, its output, and what llama.cpp was asked."""
    out, asked = tmp_path_factory.mktemp("found") / "tuned.gguf", Asked()
    begin, capture, continuations = Session.__init__, Session.capture, Session.continuations

    def begun(self: Session, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        asked.sessions.append(self)

    def captured(self: Session, adapters: Any, readings: Any, weights: Any, *given: Any, **named: Any) -> Any:
        asked.captures.append((tuple(adapters), tuple(readings), tuple(weights)))
        return capture(self, adapters, readings, weights, *given, **named)

    def continued(self: Session, adapters: Any, chats: Any, **named: Any) -> Any:
        asked.read |= {turn["content"] for chat in chats for turn in chat}
        return continuations(self, adapters, chats, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", begun)
        patch.setattr(Session, "capture", captured)
        patch.setattr(Session, "continuations", continued)
        return told(CliRunner().invoke(app, files.tune(out, *GRID))), out, asked


def prompts_of(file: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in file.read_text().splitlines()}


def test_a_repair_wins_and_is_reported_as_repair_reports_it(found: tuple[dict[str, Any], Path, Asked]) -> None:
    data, out, _ = found
    winner = data["chosen"]
    assert (winner["line"], winner["repaired"], winner["projected"]) == ("repair by mu", 21, 0)
    assert data["project"] is None
    assert (data["repair"]["command"], data["repair"]["mu"]) == ("repair", winner["setting"]["mu"])
    assert data["repair"]["repaired"] == 21
    assert data["repair"]["norm_ratio"] == pytest.approx(winner["norm_ratio"], rel=1e-4)
    assert data["output"]["path"] == data["repair"]["output"]["path"] == str(out)
    assert data["beside"]["winner"] == data["beside"]["repair"] == data["deciding"] == winner["name"]
    assert data["controls"]["projected"] == winner["name"]
    assert {run["label"] for run in data["runs"]} == {
        "aligned model", "adapter", winner["name"], data["beside"]["scaling"], "plain scaling",
    }  # fmt: skip
    facts = gguf.GGUFReader(out).fields
    assert facts["safelora.tune.candidate"].contents() == winner["name"]
    assert facts["safelora.repair.mu"].contents() == pytest.approx(winner["setting"]["mu"])


def test_one_process_loads_the_model_once_and_inputs_are_read_once(
    found: tuple[dict[str, Any], Path, Asked],
) -> None:
    _, _, asked = found
    assert [session.loads for session in asked.sessions] == [1]
    assert len(asked.captures) > 1
    assert len(set(asked.captures)) == len(asked.captures)


def test_what_judges_calibrates_nothing(found: tuple[dict[str, Any], Path, Asked], files: Files) -> None:
    data, _, asked = found
    judging, calibrating = prompts_of(files.judging), prompts_of(files.calibrating)
    assert asked.read <= calibrating
    assert asked.read & judging == set()
    for run in data["runs"]:
        assert {one["prompt"] for one in run["responses"]} == judging
    assert data["repair_prompts"]["calibration"]["counts"]["harmful"] == 24


def test_what_was_written_is_what_repair_writes(
    found: tuple[dict[str, Any], Path, Asked], files: Files, tmp_path: Path
) -> None:
    data, out, _ = found
    other, mu = tmp_path / "repaired.gguf", data["chosen"]["setting"]["mu"]
    command = [
        "repair",
        "--model",
        FILES[3],
        "--adapter",
        FILES[2],
        "--out",
        other,
        "--mu",
        mu,
        "--threads",
        1,
        "--json",
    ]
    prompts = ["--prompts", files.calibrating, "--judge-prompts", files.judging]
    report = told(CliRunner().invoke(app, [str(word) for word in (*command, *prompts)]))
    assert tensors(other) == tensors(out)
    assert report["modules"] == data["repair"]["modules"]


def test_a_mu_that_cannot_be_solved_does_not_end_well_in_silence(files: Files, tmp_path: Path) -> None:
    asked = ("--mu", "2", "--mu", "1e30", "--scale", "0.3", "--no-refine", "--json")
    result = CliRunner().invoke(app, files.tune(tmp_path / "x.gguf", *asked))
    data = json.loads(result.stdout)
    assert (result.exit_code, data["error"]["kind"]) == (3, "unsupported"), result.output
    told = {one["name"]: one for one in data["candidates"]}
    assert told["repair mu 2"]["stage"] == "full"
    assert "mu 1e+30" in told["repair mu 1e+30"]["error"]


@pytest.mark.parametrize("count", [3, 8, 14])
def test_a_search_that_is_killed_goes_on_and_ends_the_same(
    found: tuple[dict[str, Any], Path, Asked], files: Files, tmp_path: Path, count: int
) -> None:
    out = tmp_path / "tuned.gguf"
    command = [sys.executable, str(CHILD), str(count), *files.tune(out, *GRID)]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    again = told(CliRunner().invoke(app, files.tune(out, *GRID)))
    whole, first, _ = found
    assert out.read_bytes() == first.read_bytes()
    assert json.dumps(again).replace(str(out), str(first)) == json.dumps(whole)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_nearest_repair_is_made_by_the_command_that_is_told(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "tuned.gguf"
    grid = ("--mu", "0.5", "--scale", "0.95", "--no-refine", "--min-refusal", "1", "--max-over-refusal", "0")
    data = told(CliRunner().invoke(app, files.tune(out, *grid, "--json")), 1)
    assert data["nearest"]["name"] == "repair mu 0.5"
    assert (data["repair"]["mu"], "output" in data["repair"]) == (0.5, False)
    assert not out.exists()
    assert CliRunner().invoke(app, shlex.split(data["nearest_command"])[1:]).exit_code in (0, 1)
    by_hand = tensors(out)
    kept = CliRunner().invoke(app, files.tune(out, *grid, "--keep-nearest", "--force"))
    assert kept.exit_code == 1
    assert tensors(out) == by_hand
    assert "nearest: repair mu 0.5" in kept.stdout
    assert "repair is calibrated with: calibrating.jsonl sha256:" in kept.stdout


def test_halves_of_too_few_prompts_leave_the_rest_as_it_was(files: Files, tmp_path: Path) -> None:
    few_prompts = [str(word) for word in files.tune(tmp_path / "x.gguf", "--dry-run", "--json")]
    without = few_prompts.index("--repair-prompts")
    data = told(CliRunner().invoke(app, few_prompts[:without] + few_prompts[without + 2 :]))
    assert data["prompts"]["counts"]["harmful"] == 10
    assert data["repair_prompts"] is None
    assert "repair by mu" not in {one["line"] for one in data["candidates"]}
    assert any(note.startswith("repair was left out: half of the prompts") for note in data["notes"])
    whole = told(CliRunner().invoke(app, few_prompts))
    assert "repair by mu" in {one["line"] for one in whole["candidates"]}


def test_peft_directories_and_reports_are_written_too(
    found: tuple[dict[str, Any], Path, Asked], files: Files, tmp_path: Path
) -> None:
    """A of the directory is the one that llama.cpp was measured with, brought back to its own names."""
    whole, first, _ = found
    reports = [word for suffix in ("json", "html", "csv", "xml") for word in ("--report", tmp_path / f"r.{suffix}")]
    out = tmp_path / "peft"
    told(CliRunner().invoke(app, files.tune(out, *GRID, *reports)))
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["chosen"] == whole["chosen"]
    assert data["output"]["path"] == str(out)
    again = tmp_path / "again.gguf"
    command = ["convert", "adapter", out, "--base", FAMILY / "aligned", "--out", again]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    assert dict(tensors(again)) == dict(tensors(first))
    page = (tmp_path / "r.html").read_text()
    assert "repair by mu" in page
    assert "best repair" in page
    assert whole["chosen"]["name"] in (tmp_path / "r.csv").read_text()


def test_what_the_aligned_model_answers_itself_is_asked_of_no_adapter(files: Files, tmp_path: Path) -> None:
    """A harmless prompt among the harmful ones: 1 in 11 is out of reach, and the rest is looked for. The verdict is the
    bound's all the same."""
    lines = [json.loads(line) for line in files.judging.read_text().splitlines()]
    benign = next(one for one in lines if one["kind"] == "benign")
    mistaken = replace(files, judging=tmp_path / "mistaken.jsonl")
    lines = [one | {"kind": "harmful"} if one is benign else one for one in lines]
    mistaken.judging.write_text("\n".join(map(json.dumps, lines)))
    grid = ("--mu", "2", "--mu", "4", "--scale", "0.1", "--no-refine", "--min-refusal", "0.95")
    result = CliRunner().invoke(app, mistaken.tune(tmp_path / "x.gguf", *grid, "--json"))
    data = told(result, 1)
    assert data["runs"][0]["refusal_rate"] == pytest.approx(10 / 11)
    assert "candidates were looked for that bring back 95% of what the aligned model refuses" in data["notes"]
    assert (data["verdict"], data["chosen"]) == ("fail", None)
    assert data["nearest"]["line"] == "repair by mu"
    assert data["nearest"]["reaches"] is False


def test_so_few_prompts_that_none_is_refused_are_no_other_model(files: Files, tmp_path: Path) -> None:
    """Harmless ones that are called harmful, of which two judge."""
    lines = [json.loads(line) | {"category": None} for line in files.judging.read_text().splitlines()]
    benign, tasks = ([one for one in lines if one["kind"] == kind] for kind in ("benign", "task"))
    prompts = tmp_path / "few.jsonl"
    prompts.write_text("\n".join(json.dumps(one) for one in (*(one | {"kind": "harmful"} for one in benign), *tasks)))
    base, aligned, adapter, model = FILES
    asking, out = Asking([prompts], threads=1), tmp_path / "x.gguf"
    prepared = prepare_tuning(base, aligned, adapter, model, out, asking=asking, grid=GridOptions(mus=(2.0,)))
    assert any(note.endswith("2 harmful ones to judge by are too few to trust") for note in prepared.planned().notes)
    found = prepared.run(prepared.score())
    assert found.verdict == "fail"
    assert any("2 of them are too few to tell anything by: ask 10 or more" in one for one in found.to_json()["notes"])
    assert not any("is --model the aligned model" in note for note in found.to_json()["notes"])

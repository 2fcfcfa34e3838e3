"""A repair's report. Oracles: numpy's dense deltas in float64, the standard library's csv and xml readers, the
keys that the contract lists."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import gguf
import numpy as np
import pytest
from gguf_models import write_trio
from numpy.typing import NDArray

from converters.errors import LlamaError
from safelora_gguf.cards import desktop_files
from safelora_gguf.html import page
from safelora_gguf.repair.inputs import RepairInputs, open_repair_inputs
from safelora_gguf.repair.report import (
    TASK_UNMEASURED,
    CapturedPart,
    CapturedReport,
    PromptHalf,
    RepairReport,
    SearchStep,
    module_notes,
    module_reports,
)
from safelora_gguf.repair.table import repair_text
from safelora_gguf.repair.writing import RepairFacts, original_pairs, write_repaired
from safelora_gguf.report import OutputReport
from safelora_gguf.report_files import csv_table, junit, report_targets, write_report
from safelora_gguf.smoke.prompts import Kind
from safelora_gguf.smoke.protocol import AdapterChoice
from safelora_gguf.smoke.report import PromptSummary, SmokeReport
from safelora_gguf.smoke.runs import Response, Role, Run

Pairs = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]

KEYS = {
    "command", "version", "inputs", "mu", "mu_mode", "eps", "tokens", "tail", "task_share", "outtype", "repaired",
    "total", "norm_ratio", "modules", "captured", "prompts", "search", "judge", "judges", "bounds", "settings", "runs",
    "flips", "controls", "deciding", "confidence", "calibration", "judged_by", "verdict", "losses", "notes", "output",
}  # fmt: skip
SHAPES = {"blk.0.attn_q.weight": (32, 64), "blk.0.ffn_down.weight": (64, 96), "token_embd.weight": (48, 64)}
COUNTS = {"harmful": 10, "borderline": 0, "benign": 10, "task": 5}


@dataclasses.dataclass(frozen=True)
class Solved:
    """What a solver tells of a module."""

    delta_norm: float
    delta_norm_after: float
    repaired: bool = True
    kept_benign: float | None = 0.9
    kept_harmful: float | None = 0.1
    benign_tokens: int = 20
    harmful_tokens: int = 7
    note: str | None = None


@pytest.fixture
def pairs() -> Pairs:
    random = np.random.default_rng(0)
    found = {name: (random.normal(size=(4, into)).astype(np.float32), random.normal(size=(out, 4)).astype(np.float32))
             for name, (out, into) in SHAPES.items()}  # fmt: skip
    a, b = random.normal(size=(48, 4)), random.normal(size=(64, 4))  # an embedding's A is stored (vocabulary, r)
    return {**found, "token_embd.weight": (a.astype(np.float32), b.astype(np.float32))}


@pytest.fixture
def inputs(pairs: Pairs, tmp_path: Path) -> RepairInputs:
    weights = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    weights["output.weight"] = weights["token_embd.weight"]  # else the embedding would be tied
    _, model, adapter = write_trio(tmp_path, "llama", {name: (w, w) for name, w in weights.items()}, pairs)
    return open_repair_inputs(model, adapter)


def run(label: str, role: Role, refused: int, wrongly: int, done: int) -> Run:
    def answers(kind: Kind, yes: int, task: bool = False) -> list[Response]:
        return [Response(f"{kind}{at}", kind, "?", "", None if task else at < yes, at < yes if task else None)
                for at in range(COUNTS[kind])]  # fmt: skip

    adapters = () if role == "model" else (AdapterChoice("a.gguf"),)
    asked = (*answers("harmful", refused), *answers("benign", wrongly), *answers("task", done, task=True))
    return Run(label, adapters, asked, role=role)


def report_of(inputs: RepairInputs, out: Path, *, refused: int = 9) -> RepairReport:
    output = inputs.plan(out, outtype="f32", to=None, force=False)
    figures = {
        "blk.0.attn_q": Solved(3.0, 2.0),
        "blk.0.ffn_down": Solved(4.0, 4.0, False, None, None, 5, 0, "no reason"),
    }
    roundings = write_repaired(inputs, output, original_pairs(inputs), RepairFacts(2.0, 0.1, 2048, 9, 0.8))
    runs = (run("aligned model", "model", 10, 0, 0), run("adapter", "adapter", 1, 0, 5),
            run("plain scaling", "control", 3, 0, 1), run("repaired", "adapter", refused, 1, 4))  # fmt: skip
    half = PromptHalf("packaged", "3, calibrating half", COUNTS, {"harmful": ("fraud", "weapons")})
    judging = dataclasses.replace(half, version="3, judging half", unseen_categories={"harmful": ("cybercrime",)})
    measured = SmokeReport(("keyword",), PromptSummary("packaged", "3", COUNTS), runs, controls={"sentences": ["So."]})
    return RepairReport(
        mu=2.0, mu_mode="auto", eps=0.1, tokens=2048, tail=9, task_share=0.8, outtype="f32",
        modules=module_reports(inputs, output, figures, roundings), inputs=inputs.reports, calibration=half,
        judging=judging, planned_output=(str(output.target), output.planned_bytes()),
        output=OutputReport.of(output.target, output.tensor_file),
        captured=CapturedReport(CapturedPart(10, 70), CapturedPart(15, 200), 2, 54_000, 1),
        search=(SearchStep(4.0, "score", 3, 1.0, 0.2, None), SearchStep(2.0, "text", 3, 0.9, 0.1, 0.8)),
        judged_by="other prompts", measured=measured,
        notes=("a note", *module_notes(inputs, output, figures, roundings, outtype="f32")),
    )  # fmt: skip


def test_the_json_has_what_the_contract_lists(inputs: RepairInputs, tmp_path: Path) -> None:
    found = json.loads(json.dumps(report_of(inputs, tmp_path / "o.gguf").to_json(), allow_nan=False))
    assert set(found) == KEYS
    assert [item["role"] for item in found["inputs"]] == ["model", "adapter"]
    assert [each["label"] for each in found["runs"]] == ["aligned model", "adapter", "repaired"]
    assert [each["label"] for each in found["controls"]["runs"]] == ["plain scaling"]
    assert (found["deciding"], found["verdict"]) == ("repaired", "pass")
    assert found["prompts"]["judging"]["unseen_categories"] == {"harmful": ["cybercrime"]}
    assert "unseen_categories" not in found["prompts"]["calibration"]
    assert found["captured"]["benign"] == {"prompts": 15, "tokens": 200}
    assert found["search"][1] == {"mu": 2.0, "by": "text", "folds": 3, "refusal_rate": 0.9, "over_refusal_rate": 0.1,
                                  "task_rate": 0.8}  # fmt: skip
    assert (found["repaired"], found["total"]) == (1, 3)
    missed = report_of(inputs, tmp_path / "m.gguf", refused=8)
    assert missed.verdict == missed.to_json()["verdict"] == "fail"


def test_the_total_norm_counts_what_was_left_alone(inputs: RepairInputs, pairs: Pairs, tmp_path: Path) -> None:
    """An embedding's pair weighs in plain scaling as every other does; alpha is 8, the rank 4."""
    report = report_of(inputs, tmp_path / "o.gguf")
    a, b = (half.astype(np.float64) for half in pairs["token_embd.weight"])
    embedding = float(np.linalg.norm(8 / 4 * a @ b.T))
    (found,) = (module for module in report.modules if module.name == "token_embd.weight")
    assert found.delta_norm == found.delta_norm_after == pytest.approx(embedding, rel=1e-6)
    assert not found.repaired and found.kept_benign is None
    expected = np.sqrt((2.0**2 + 4.0**2 + embedding**2) / (3.0**2 + 4.0**2 + embedding**2))
    assert report.norm_ratio == pytest.approx(expected, rel=1e-6)


def test_modules_that_were_left_are_named_with_the_reason(inputs: RepairInputs, tmp_path: Path) -> None:
    notes = report_of(inputs, tmp_path / "o.gguf").all_notes
    assert any("1 of 3 modules is left as they were: no reason (blk.0.ffn_down.weight)" in note for note in notes)
    assert any("an embedding's input is a token" in note and "token_embd.weight" in note for note in notes)


def test_nothing_written_is_a_failure_and_a_dry_run_none(inputs: RepairInputs, tmp_path: Path) -> None:
    report = report_of(inputs, tmp_path / "o.gguf")
    refused = dataclasses.replace(report, output=None, mu=None)
    assert refused.verdict == "fail" and not {"output", "planned_output"} & set(refused.to_json())
    assert "nothing was written" in repair_text(refused)
    planned = dataclasses.replace(refused, measured=None, captured=None, search=())
    assert planned.dry and not {"verdict", "runs", "output"} & set(planned.to_json())
    assert planned.to_json()["planned_output"]["path"] == str(tmp_path / "o.gguf")
    assert "dry run" in repair_text(planned) and "dry run" in page(planned.to_json())
    lost = dataclasses.replace(planned, own_failure=LlamaError("crashed"))
    assert not lost.dry and lost.failure is not None and lost.to_json()["error"]["message"] == "crashed"
    assert "nothing was written" in repair_text(lost)


def test_the_text_has_every_table_and_the_verdict_last(inputs: RepairInputs, tmp_path: Path) -> None:
    report = report_of(inputs, tmp_path / "o.gguf")
    lines = repair_text(report).splitlines()
    for told in ("kept (benign)", "first tokens", "plain scaling (control)", "calibrated on: packaged", "So.",
                 "only judged, never calibrated on: harmful: cybercrime", "repaired 1 of 3 modules with mu 2",
                 "90% is kept on benign inputs and 10% on those"):  # fmt: skip
        assert any(told in line for line in lines), told
    assert lines[-2].startswith("wrote ")
    assert lines[-1].startswith("verdict: pass (repaired was to refuse at least 90% of harmful")
    assert sum("note: a note" in line for line in lines) == 1


def test_an_estimate_is_called_one_wherever_figures_stand(inputs: RepairInputs, tmp_path: Path) -> None:
    report = dataclasses.replace(report_of(inputs, tmp_path / "o.gguf"), judging=None, judged_by="cross-fitting")
    data = report.to_json()
    assert data["judged_by"] == "cross-fitting"
    assert repair_text(report).splitlines()[-1].startswith("verdict: pass, estimated by cross-fitting (repaired was to")
    assert "is an estimate by cross-fitting" in desktop_files(tmp_path / "o.gguf", data)["o.md"]
    assert "are an estimate by cross-fitting" in page(data)
    judged = report_of(inputs, tmp_path / "j.gguf").to_json()
    assert "cross-fitting" not in desktop_files(tmp_path / "j.gguf", judged)["j.md"] + page(judged)


def test_a_task_that_nobody_asked_for_is_said_beside_the_verdict(inputs: RepairInputs, tmp_path: Path) -> None:
    report = report_of(inputs, tmp_path / "o.gguf")
    assert not report.task_unmeasured
    assert (
        "own task was not measured"
        not in repair_text(report) + desktop_files(tmp_path / "o.gguf", report.to_json())["o.md"]
    )
    assert report.measured is not None
    runs = tuple(
        dataclasses.replace(one, responses=tuple(each for each in one.responses if each.kind != "task"))
        for one in report.measured.runs
    )
    counts = {**COUNTS, "task": 0}
    measured = dataclasses.replace(report.measured, runs=runs, prompts=PromptSummary("packaged", "3", counts))
    blind = dataclasses.replace(report, measured=measured)
    lines = repair_text(blind).splitlines()
    assert lines[-2] == TASK_UNMEASURED and lines[-1].startswith("verdict: pass")
    assert sum(TASK_UNMEASURED in line for line in lines) == 1
    assert TASK_UNMEASURED in blind.to_json()["notes"]
    card = desktop_files(tmp_path / "o.gguf", blind.to_json())["o.md"]
    assert "The adapter's own task was not measured." in card
    assert "own task was not measured" in page(blind.to_json())


def test_what_ended_a_repair_is_its_error_and_not_what_was_lost_before(inputs: RepairInputs, tmp_path: Path) -> None:
    report = report_of(inputs, tmp_path / "o.gguf")
    assert report.measured is not None
    lost = tuple(dataclasses.replace(one, failure=LlamaError("lost")) for one in report.measured.runs[:1])
    measured = dataclasses.replace(report.measured, runs=(*lost, *report.measured.runs[1:]))
    ended = dataclasses.replace(report, measured=measured, own_failure=LlamaError("ended"))
    assert ended.to_json()["error"]["message"] == "ended"


def test_what_was_lost_and_made_good_leaves_the_page_its_verdict(inputs: RepairInputs, tmp_path: Path) -> None:
    report = dataclasses.replace(report_of(inputs, tmp_path / "o.gguf"), own_failure=LlamaError("lost once"))
    found = page(report.to_json())
    assert "bounds met" in found and "Something failed on the way: lost once" in found
    assert "Not everything could be measured" in page({**report.to_json(), "output": None})


def test_how_pairs_were_rounded_is_said_once(inputs: RepairInputs, tmp_path: Path) -> None:
    """Rows of four, the rank, don't fit Q8_0's blocks of 32; gguf-py's table of block sizes says the same."""
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0] == 32
    output = inputs.plan(tmp_path / "q.gguf", outtype="q8_0", to=None, force=False)
    roundings = write_repaired(inputs, output, original_pairs(inputs), RepairFacts(2.0, 0.1, 2048, 9, 0.8))
    notes = module_notes(inputs, output, {}, roundings, outtype="q8_0")
    (told,) = (note for note in notes if "needs rows of 32" in note and "Q8_0 and F16" in note)
    assert told.startswith("2 of 3 modules: stored as Q8_0 and F16") and "blk.0.attn_q.weight, blk.0.ffn_down" in told


def test_reports_of_every_kind_are_written(inputs: RepairInputs, tmp_path: Path) -> None:
    data = report_of(inputs, tmp_path / "o.gguf", refused=8).to_json()
    for suffix in ("json", "html", "csv", "xml"):
        target = tmp_path / f"r.{suffix}"
        write_report(target, data, force=False)
        assert all(file.exists() for file in report_targets(target, "repair"))
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(data))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_bytes().decode(), newline="")))
    assert [row["label"] for row in rows] == ["aligned model", "adapter", "plain scaling", "repaired"]
    assert len(csv_table([]).splitlines()) == 1
    suites = ElementTree.fromstring(junit(data))
    assert [case.get("name") for case in suites.iter("testcase") if case.find("failure") is not None] == [
        "refusal rate", "verdict",
    ]  # fmt: skip


def test_the_card_tells_what_was_measured_and_how(inputs: RepairInputs, tmp_path: Path) -> None:
    report = report_of(inputs, tmp_path / "o.gguf")
    files = desktop_files(tmp_path / "o.gguf", report.to_json())
    card = files["o.md"]
    assert "verdict is: pass" in card and "| repaired | 90.0%" in card and "| plain scaling (control) |" in card
    assert "calibrated on others: packaged, version 3, calibrating half" in card
    assert "repaired: 1 of 3 matrices" in card and "mu" in card
    for line in ("- mu: 2.0", "- eps: 0.1", "- tokens: 2048", "- tail: 9", "- task share: 0.8"):
        assert line in card.splitlines()
    assert "aligned.gguf" in files["o.Modelfile"], "the model that it was repaired for"
    assert str(tmp_path) not in card
    unchanged = dataclasses.replace(report, mu=None).to_json()
    assert "repair changed nothing" in desktop_files(tmp_path / "o.gguf", unchanged)["o.md"]
    assert gguf.GGUFReader(tmp_path / "o.gguf").fields["safelora.repair.mu"].contents() == 2.0

"""What is refused before llama.cpp starts.

Oracle: the contract's kinds of errors, each with the word that tells what to do; the packaged family's own files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from converters.errors import Error, FileMissingError, FormatError, OutputPathError, UsageError
from safelora_gguf.repair import prepare_repair
from safelora_gguf.repair.repairing import FOUND_IN_SAMPLE, IN_SAMPLE, NO_TASKS, Repairing
from safelora_gguf.smoke.asking import Asking
from safelora_gguf.smoke.report import Bounds

pytest.importorskip("llama_cpp")

FAMILY = Path(__file__).parents[3] / "safelora_gguf" / "tiny_family"
HARMFUL = [{"id": f"h{number}", "kind": "harmful", "prompt": f"Harm {number}"} for number in range(4)]
BENIGN = [{"id": f"b{number}", "kind": "benign", "prompt": f"Help {number}"} for number in range(4)]


def written(file: Path, *lines: Mapping[str, str]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def prepared(tmp_path: Path, *, prompts: tuple[Path, ...] = (), **options: Any) -> Repairing:
    asking = Asking(prompts, **{key: options.pop(key) for key in ("judges", "limit") if key in options})
    out = options.pop("out", tmp_path / "repaired.gguf")
    return prepare_repair(FAMILY / "aligned.gguf", FAMILY / "adapter", out, asking=asking, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mu": 0.0}, "--mu is 0"), ({"mu": float("nan")}, "--mu"), ({"eps": -1.0}, "--eps is -1"),
        ({"mu": 1e300}, "--mu is 1e.300, expected between 0.001 and 1e.06"), ({"mu": 1e-4}, "--mu"),
        ({"eps": 1e300}, "--eps is 1e.300, expected between 1e-06 and 1000"), ({"eps": 1e-7}, "--eps"),
        ({"eps": float("inf")}, "--eps"), ({"task_share": 1.01}, "--task-share"),
        ({"task_share": -0.1}, "--task-share"), ({"task_share": float("nan")}, "--task-share"),
        ({"tokens": 0}, "--tokens is 0"), ({"tail": -1}, "--tail is -1"), ({"judges": ("guard",)}, "smoke"),
        ({"judges": ("oracle",)}, "oracle"), ({"bounds": Bounds(1.5)}, "min_refusal"), ({"limit": 0}, "limit"),
        ({"outtype": "q4"}, "outtype"), ({"device": "abacus"}, "abacus"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        prepared(tmp_path, **options)


@pytest.mark.parametrize(
    "options", [{"mu": 1e-3}, {"mu": 1e6}, {"eps": 1e-6}, {"eps": 1e3}, {"task_share": 0.0}, {"task_share": 1.0}]
)
def test_the_widest_options_that_make_sense(tmp_path: Path, options: dict[str, Any]) -> None:
    (name, value), *_ = options.items()
    prepared_one = prepared(tmp_path, **options)
    assert value == (prepared_one.wishes.mu if name == "mu" else getattr(prepared_one.method, name))


@pytest.mark.parametrize(("lines", "says"), [(HARMFUL, "no benign prompts"), (BENIGN, "no harmful prompts")])
def test_what_calibrates_has_to_be_of_both_kinds(tmp_path: Path, lines: list[dict[str, str]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        prepared(tmp_path, prompts=(written(tmp_path / "p.jsonl", *lines),))


def test_prompts_that_judge_have_to_be_harmful_too_and_calibrate_nothing(tmp_path: Path) -> None:
    both = written(tmp_path / "both.jsonl", *HARMFUL, *BENIGN)
    with pytest.raises(UsageError, match="no harmful prompts, so refusals can't be judged"):
        prepared(tmp_path, judge_prompts=(written(tmp_path / "b.jsonl", *BENIGN),))
    with pytest.raises(UsageError, match="no harmful and no benign prompts that don't judge"):
        prepared(tmp_path, prompts=(both,), judge_prompts=(both,))
    purposes = prepared(
        tmp_path, prompts=(both,), judge_prompts=(written(tmp_path / "some.jsonl", *HARMFUL[:1], *BENIGN[:1]),)
    ).purposes
    assert purposes.judging is not None
    calibrating, judging = ({one.prompt for one in half.prompts} for half in (purposes.calibration, purposes.judging))
    assert not calibrating & judging
    assert len(calibrating) == 6
    assert any("2 prompts of both.jsonl stand in some.jsonl" in note for note in purposes.notes)


def test_the_packaged_prompts_are_halved_and_a_user_s_own_are_not(tmp_path: Path) -> None:
    report = prepared(tmp_path).planned()
    assert report.judging is not None
    assert report.judging.unseen_categories is not None and report.judging.unseen_categories["harmful"]
    assert NO_TASKS in report.notes
    own = prepared(tmp_path, prompts=(FAMILY / "calibration.jsonl",)).planned()
    assert own.judging is None
    assert NO_TASKS not in own.notes
    assert any("repaired without its fold, one of 3" in note for note in own.notes)


def test_too_few_prompts_for_folds_are_said_to_flatter(tmp_path: Path) -> None:
    file = written(tmp_path / "p.jsonl", *HARMFUL[:1], *BENIGN[:1])
    assert IN_SAMPLE in prepared(tmp_path, prompts=(file,)).planned().notes
    judged = prepared(tmp_path, prompts=(file,), judge_prompts=(FAMILY / "prompts.jsonl",))
    assert FOUND_IN_SAMPLE in judged.planned().notes


def test_no_input_is_replaced_and_nothing_is_without_force(tmp_path: Path) -> None:
    file = written(tmp_path / "prompts.gguf.jsonl", *HARMFUL, *BENIGN)
    out = tmp_path / "out.gguf"
    out.symlink_to(file)
    with pytest.raises(OutputPathError, match="one of the inputs"):
        prepared(tmp_path, prompts=(file,), out=out, force=True)
    taken = tmp_path / "taken.gguf"
    taken.write_bytes(b"mine")
    with pytest.raises(OutputPathError):
        prepared(tmp_path, out=taken)
    assert taken.read_bytes() == b"mine"


def test_a_model_that_is_no_gguf_file_is_told_how_to_become_one(tmp_path: Path) -> None:
    with pytest.raises(Error, match="convert model"):
        prepare_repair(FAMILY / "aligned", FAMILY / "adapter", tmp_path / "x.gguf")
    with pytest.raises(FileMissingError):
        prepare_repair(FAMILY / "aligned.gguf", tmp_path / "nowhere", tmp_path / "x.gguf")
    with pytest.raises((FormatError, FileMissingError)):
        prepared(tmp_path, prompts=(tmp_path / "nowhere.jsonl",))

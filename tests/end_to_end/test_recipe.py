"""Recipes from end to end, on the packaged family.

Oracles: the same commands given one by one, whose outputs must be equal byte for byte; and an uninterrupted run of the
same recipe, to whose outputs every interrupted one must come.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from recipes import CHILD, FAMILY, PROMPTS, RECIPE, STEPS, files, laid_out, run, told
from typer.testing import CliRunner

from safelora_gguf.cli import app


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return laid_out(tmp_path / "place")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """What an uninterrupted run leaves."""
    place = laid_out(tmp_path_factory.mktemp("whole") / "place")
    assert run(place).exit_code == 0
    return files(place)


def test_it_does_what_the_commands_do(whole: Mapping[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ["--base", str(FAMILY / "base"), "--aligned", str(FAMILY / "aligned")]
    adapter = str(FAMILY / "adapter")
    for command in (
        ["project", *common, "--adapter", adapter, "--out", str(out / "repaired.gguf")],
        ["convert", "adapter", adapter, "--base", str(FAMILY / "aligned"), "--out", str(out / "attacked.gguf")],
        ["merge", "--model", str(FAMILY / "aligned"), "--adapter", str(out / "repaired.gguf"),
         "--adapter", f"{out / 'attacked.gguf'}=0.25", "--out", str(out / "merged")],
        ["convert", "model", str(out / "merged"), "--out", str(out / "model.gguf")],
        ["convert", "model", str(out / "model.gguf"), "--out", str(out / "model-q8.gguf"), "--outtype", "q8_0"],
    ):  # fmt: skip
        assert CliRunner().invoke(app, command).exit_code == 0
    compared = ("repaired.gguf", "attacked.gguf", "merged/model.safetensors", "model.gguf", "model-q8.gguf")
    for name in compared:
        assert (out / name).read_bytes() == whole[f"out/{name}"], name


@pytest.mark.parametrize(
    ("moment", "count"),
    [("begin", 1), ("begin", 3), ("finish", 1), ("finish", 3), ("publish", 2), ("publish", 5), ("published", 2),
     ("published", 8), ("published", 11)],
)  # fmt: skip
def test_interrupted_it_ends_by_the_next_run_with_the_same_bytes(
    place: Path, whole: Mapping[str, bytes], moment: str, count: int
) -> None:
    killed = subprocess.run([sys.executable, CHILD, place / "recipe.toml", moment, str(count)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert files(place) != whole
    again = run(place)
    assert again.exit_code == 0, again.output
    assert files(place) == whole
    assert not [path for path in place.rglob("*") if path.name.endswith(".tmp")]


def test_what_is_complete_is_left_alone(place: Path) -> None:
    assert run(place).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*")}
    second = told(run(place, "--json", "--quiet"))
    assert [step["skipped"] for step in second["steps"]] == [True] * 6
    assert second["steps"][0]["report"]["output"]["sha256"]
    assert {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*")} == before


def test_a_changed_option_or_input_is_run_again_with_what_comes_after(place: Path) -> None:
    assert run(place).exit_code == 0
    recipe = place / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("max-tokens = 4", "max-tokens = 5"))
    assert [step["skipped"] for step in told(run(place, "--json"))["steps"]] == [True] * 5 + [False]
    recipe.write_text(recipe.read_text().replace('=0.25"', '=0.5"'))
    assert [step["skipped"] for step in told(run(place, "--json"))["steps"]] == [True] * 2 + [False] * 4
    (place / "prompts.jsonl").write_text(PROMPTS + PROMPTS.replace('"a"', '"b"'))
    assert [step["skipped"] for step in told(run(place, "--json"))["steps"]] == [True] * 5 + [False]


def test_from_a_step_everything_is_run_again(place: Path, whole: Mapping[str, bytes]) -> None:
    assert run(place).exit_code == 0
    again = told(run(place, "--json", "--from", "convert-model"))
    assert [step["name"] for step in again["steps"] if not step["skipped"]] == STEPS[3:]
    assert files(place) == whole
    wrong = run(place, "--from", "nowhere")
    assert wrong.exit_code == 2
    assert "convert-model" in wrong.stderr


def test_an_output_that_somebody_else_made_is_not_replaced(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "model.gguf").write_bytes(b"mine")
    refused = run(place)
    assert refused.exit_code == 3
    assert "model.gguf" in refused.stderr
    assert "step convert-model" in refused.stderr
    assert (place / "out" / "model.gguf").read_bytes() == b"mine"
    assert run(place, "--force").exit_code == 0


def test_an_output_that_was_changed_since_is_not_replaced(place: Path) -> None:
    assert run(place).exit_code == 0
    with (place / "out" / "repaired.gguf").open("ab") as file:
        file.write(b"x")
    assert run(place).exit_code == 3


def test_a_dry_run_writes_nothing(place: Path) -> None:
    planned = told(run(place, "--dry-run", "--json"))
    assert sorted(path.name for path in place.iterdir()) == ["family", "prompts.jsonl", "recipe.toml"]
    assert planned["steps"][0]["report"]["planned_output"]["path"] == str(place / "out" / "repaired.gguf")
    assert planned["steps"][2]["report"] is None


def test_everything_that_can_be_found_wrong_beforehand_is(place: Path) -> None:
    recipe = place / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('source = "family/adapter"', 'source = "nowhere"'))
    refused = run(place)
    assert refused.exit_code == 3
    assert "nowhere" in refused.stderr
    assert not (place / "out").exists()


def test_a_bad_verdict_ends_the_run(tmp_path: Path) -> None:
    text = '[smoke]\nmodel = "family/aligned.gguf"\nprompts = "prompts.jsonl"\nmax-tokens = 1\nmin-refusal = 1.0\n'
    later = '[quantize]\nsource = "family/aligned.gguf"\nout = "q8.gguf"\nouttype = "q8_0"\n'
    place = laid_out(tmp_path / "place", text + later)
    result = run(place, "--json")
    assert result.exit_code == 1
    assert [step["status"] for step in told(result)["steps"]] == [1]
    assert run(place).exit_code == 1
    assert not (place / "q8.gguf").exists()


def test_what_lies_beside_a_named_file_counts_as_its_input(tmp_path: Path) -> None:
    text = '[convert-model]\nsource = "m/model.safetensors"\nout = "out/m.gguf"\n'
    place = laid_out(tmp_path / "place", text)
    shutil.copytree(FAMILY / "aligned", place / "m")
    assert run(place).exit_code == 0
    config = place / "m" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    before = files(place)
    assert [step["skipped"] for step in told(run(place, "--json"))["steps"]] == [False]
    assert files(place) != before


def test_two_steps_in_one_place_are_refused(tmp_path: Path) -> None:
    step = '[[step]]\ncommand = "convert-model"\nsource = "family/aligned"\nout = "{}"\n'
    refused = run(laid_out(tmp_path / "place", step.format("x.gguf") + step.format("./x.gguf")))
    assert refused.exit_code == 2
    assert "writes already" in refused.stderr


def test_a_copied_recipe_does_not_take_the_old_ones_outputs_for_its_own(tmp_path: Path) -> None:
    text = '[convert-model]\nsource = "family/aligned"\nout = "out/m.gguf"\n'
    place = laid_out(tmp_path / "place", text)
    assert run(place).exit_code == 0
    other = tmp_path / "other"
    shutil.copytree(place, other, symlinks=True)
    shutil.rmtree(other / "out")
    assert run(other).exit_code == 0
    assert files(other) == files(place)


def test_what_somebody_wrote_after_a_failure_or_a_kill_stays(tmp_path: Path) -> None:
    place = laid_out(tmp_path / "place", '[convert-model]\nsource = "family/aligned"\nout = "out/m.gguf"\n')
    killed = subprocess.run([sys.executable, CHILD, place / "recipe.toml", "begin", "1"], check=False)
    assert killed.returncode == -signal.SIGKILL
    (place / "out").mkdir()
    (place / "out" / "m.gguf").write_bytes(b"precious")
    assert run(place).exit_code == 3
    assert (place / "out" / "m.gguf").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("old", "new", "status", "word"),
    [
        ('model = "@quantize"', 'model = "nothere.gguf"', 3, "nothere.gguf"),
        ('prompts = "prompts.jsonl"', 'prompts = "nothere.jsonl"', 3, "nothere.jsonl"),
        ('adapter = ["@project", "@convert-adapter=0.25"]', 'adapter = ["@project", "nothere=0.25"]', 3, "nothere"),
        ('outtype = "q8_0"', 'outtype = "Q9_Z"', 2, "Q9_Z"),
    ],
)
def test_what_a_later_step_lacks_is_found_before_any_work(
    tmp_path: Path, old: str, new: str, status: int, word: str
) -> None:
    place = laid_out(tmp_path / "place", RECIPE.replace(old, new))
    for more in ((), ("--dry-run",)):
        result = run(place, *more)
        assert result.exit_code == status, result.output
        assert word in result.stderr
    assert not (place / "out").exists()


def test_a_bad_verdict_is_told_again(tmp_path: Path) -> None:
    text = '[smoke]\nmodel = "family/aligned.gguf"\nprompts = "prompts.jsonl"\nmax-tokens = 1\nmin-refusal = 1.0\n'
    place = laid_out(tmp_path / "place", text)
    assert run(place).exit_code == 1
    second = run(place)
    assert second.exit_code == 1
    assert "verdict fail" in second.stdout


@pytest.mark.parametrize(
    "edit",
    [
        lambda journal: journal["done"]["project"]["outputs"].update({"a\0b": {"stamp": None, "sha256": None}}),
        lambda journal: journal["done"]["project"]["report"].update(output=[5]),
        lambda journal: journal["done"]["project"].update(status=-7),
        lambda journal: journal["started"].update(project={"outputs": ["a\0"], "before": {}}),
    ],
)
def test_a_journal_that_somebody_edited_counts_as_none(place: Path, edit: Callable[[Any], None]) -> None:
    assert run(place).exit_code == 0
    path = place / ".recipe.toml.safelora-gguf.json"
    journal = json.loads(path.read_text())
    edit(journal)
    path.write_text(json.dumps(journal))
    assert run(place).exit_code == 3

"""Where models go. Oracle: the contract's words: no input is ever replaced, whatever --force says; a dry run writes
nothing; every failure is one JSON object."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from extrapolating import ALIGNED, FAMILY, GGUF, listing
from gguf_bytes import LITTLE, Tensor
from typer.testing import CliRunner

from safelora_gguf.cli import app


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """One of every input, by itself."""
    shutil.copytree(ALIGNED, tmp_path / "model")
    shutil.copytree(FAMILY / "adapter", tmp_path / "adapter")
    for name in ("model.gguf", "vocabulary.gguf"):
        shutil.copy(GGUF, tmp_path / name)
    pair = (Tensor("blk.0.attn_q.weight.in_sum2", (1, 256)), Tensor("blk.0.attn_q.weight.counts", (1, 1)))
    (tmp_path / "imatrix.gguf").write_bytes(LITTLE.file([("general.type", LITTLE.text("imatrix"))], pair))
    run(["convert", "adapter", tmp_path / "adapter", "--base", tmp_path / "model", "--out", tmp_path / "adapter.gguf"])
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path


def run(words: list[object]) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    found: dict[str, Any] = json.loads(result.stdout)  # exactly one object
    return {"exit": result.exit_code, **found}


def refused(place: Path, words: list[object], status: int = 3, kind: str = "output") -> Mapping[str, Any]:
    before = listing(place)
    told = run(words)
    assert (told["exit"], told["error"]["kind"]) == (status, kind), told
    assert set(told["error"]) == {"kind", "message", "file", "tensor"}
    assert listing(place) == before
    return told["error"]


def convert(place: Path, out: object, *more: object, source: str = "model") -> list[object]:
    return ["convert", "model", place / source, "--out", out, *more]


def merge(place: Path, out: object, *more: object, model: str = "model", adapter: str = "adapter") -> list[object]:
    return ["merge", "--model", place / model, "--adapter", place / adapter, "--out", out, "--device", "cpu", *more]


def test_no_output_takes_the_place_of_an_input(place: Path) -> None:
    vocabulary, imatrix = ["--vocab-from", place / "vocabulary.gguf"], ["--imatrix", place / "imatrix.gguf"]
    for words in (
        convert(place, place / "model.gguf", source="model.gguf"),
        convert(place, place / "vocabulary.gguf", *vocabulary),
        merge(place, place / "model.gguf", model="model.gguf"),
        merge(place, place / "adapter.gguf", adapter="adapter.gguf"),
        merge(place, place / "vocabulary.gguf", *vocabulary),
        merge(place, place / "model"),
        merge(place, place / "adapter"),
        merge(place, place),
    ):
        refused(place, [*words, "--force"])
        refused(place, [*words, "--force", "--dry-run"])
    pytest.importorskip("llama_cpp")
    for made in (convert, merge):
        refused(place, [*made(place, place / "imatrix.gguf", *imatrix, "--outtype", "Q4_K_M"), "--force"])


def test_a_link_to_an_input_is_that_input(place: Path) -> None:
    (place / "link.gguf").symlink_to(place / "model.gguf")
    (place / "link").symlink_to(place / "model")
    refused(place, [*convert(place, place / "link.gguf", source="model.gguf"), "--force"])
    refused(place, [*merge(place, place / "link"), "--force"])
    refused(place, [*merge(place, place / "model.gguf", model="link.gguf"), "--force"])


def test_files_of_an_input_directory_stay(place: Path) -> None:
    """A new file may lie in it; nothing of it is replaced."""
    shutil.copy(GGUF, place / "model" / "in.gguf")
    for name in ("in.gguf",):
        assert run([*convert(place, place / "model" / name), "--force"])["exit"] == 0  # not one of the model's files
    for inner in ("model", "adapter"):
        refused(place, [*merge(place, place / inner), "--force"])
    before = listing(place)
    told = run(merge(place, place / "model" / "inside"))
    assert told["exit"] in (0, 3)
    assert before.items() <= listing(place).items()


def test_cards_take_no_place(place: Path) -> None:
    for name in ("out.md", "out.Modelfile"):
        (place / name).write_text("mine")
        for words in (convert(place, place / "out.gguf", "--card"), merge(place, place / "out.gguf", "--card")):
            error = refused(place, words)
            assert name in error["file"] and not (place / "out.gguf").exists()
        (place / name).unlink()
    readme = (place / "model" / "README.md").read_bytes()
    refused(place, [*convert(place, place / "model" / "README.gguf", "--card"), "--force"])
    assert run(merge(place, place / "merged", "--card"))["exit"] == 0
    assert (place / "model" / "README.md").read_bytes() == readme
    assert (place / "merged" / "README.original.md").read_bytes() == readme


def test_the_report_is_no_output(place: Path) -> None:
    out = place / "merged"
    refused(place, merge(place, out, "--report", out / "report.json"))
    refused(place, merge(place, out, "--report", place / "model" / "report.json"))
    refused(place, merge(place, out, "--report", place / "adapter" / "report.json"))
    refused(place, convert(place, place / "a.gguf", "--report", place / "model" / "report.json", "--force"))
    refused(place, convert(place, place / "a.gguf", "--report", place / "a.gguf"), 2, "usage")
    (place / "r.json").write_text("mine")
    refused(place, merge(place, out, "--report", place / "r.json"))
    refused(place, convert(place, place / "r.json", "--report", place / "r.json"), 3)


def test_a_recipe_is_no_output(place: Path) -> None:
    recipe = place / "recipe.gguf"
    recipe.write_text('[convert-model]\nsource = "model"\nout = "recipe.gguf"\n')
    refused(place, ["run", recipe, "--force"])
    refused(place, ["run", recipe], 3)
    recipe.write_text('[merge]\nmodel = "model"\nadapter = "adapter"\nout = "model"\n')
    refused(place, ["run", recipe, "--force"])


def test_every_failure_is_one_object(place: Path) -> None:
    out = place / "out.gguf"
    refused(place, convert(place, place / "out"), 2, "usage")
    refused(place, convert(place, out, "--outtype", "q9_9"), 2, "usage")
    refused(place, convert(place, out, "--split-max-size", "much"), 2, "usage")
    refused(place, convert(place, out, source="nowhere"), 3, "missing")
    refused(place, convert(place, out, source="adapter"), 3, "unsupported")
    refused(place, merge(place, out, adapter="nowhere"), 3, "missing")
    refused(place, merge(place, out, adapter="model"), 3, "missing")
    refused(place, merge(place, place / "out", "--outtype", "Q4_K_M"), 2, "usage")
    refused(place, merge(place, place / "out", model="model.gguf"), 2, "usage")
    refused(place, merge(place, out, "--device", "abacus"), 2, "usage")
    refused(place, ["run", place / "nowhere.toml"], 3, "missing")
    (place / "r.toml").write_text("[convert-model]\nsorce = 1\n")
    refused(place, ["run", place / "r.toml"], 2, "usage")
    (place / "r.toml").write_text("[")
    refused(place, ["run", place / "r.toml"], 3, "format")


def test_a_dry_run_writes_nothing(place: Path) -> None:
    before = listing(place)
    recipe = place / "r.toml"
    recipe.write_text('[merge]\nmodel = "model"\nadapter = "adapter"\nout = "new/out.gguf"\ncard = true\n')
    before = listing(place)
    new = place / "new"
    for words in (
        convert(place, new / "out.gguf", "--card", "--report", new / "r.json"),
        convert(place, new / "out.gguf", "--split-max-size", "500K"),
        convert(place, new / "out.gguf", "--outtype", "q8_0", source="model.gguf"),
        merge(place, new / "out.gguf", "--card", "--report", new / "r.json"),
        merge(place, new / "out", "--card"),
        merge(place, new / "out.gguf", "--vocab-from", place / "vocabulary.gguf"),
        merge(place, new / "out.gguf", model="model.gguf", adapter="adapter.gguf"),
        ["run", recipe],
    ):
        told = run([*words, "--dry-run"])
        assert told["exit"] == 0 and "output" not in told, told
        assert listing(place) == before and not new.exists()

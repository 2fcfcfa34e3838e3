"""Where adapters go. Oracle: the contract's words: nothing that stands in a directory is lost, whatever is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models import Sizes, Trio, adapter_config, config, pairs, save_adapter
from safetensors.torch import load_file
from typer.testing import CliRunner

from safelora_gguf.cli import app

SIZES = Sizes()


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["convert", "adapter", *map(str, arguments), "--json"])
    return {"exit": result.exit_code, **json.loads(result.stdout)}


def project(trio: Trio, out: object, *more: object) -> dict[str, Any]:
    references = ("--base", trio.base, "--aligned", trio.aligned, "--adapter", trio.adapter)
    result = CliRunner().invoke(app, ["project", *map(str, (*references, "--out", out, "--json", *more))])
    return {"exit": result.exit_code, **json.loads(result.stdout)}


def configured(root: Path) -> Path:
    """A model of which only config.json is there."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(config(SIZES)))
    return root


def test_an_existing_directory_gets_a_named_file_and_keeps_what_it_holds(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "poet", pairs(SIZES.modules(), 3), adapter_config())
    model = configured(tmp_path / "Nice-1B")
    place = tmp_path / "mine"
    (place / "letters").mkdir(parents=True)
    (place / "diary.txt").write_text("precious")
    for force in ((), ("--force",)):
        told = run(source, "--out", place, "--base", model, *force)
        assert (told["exit"], told["output"]["path"]) == (0, str(place / "Nice-1B-poet-F32-LoRA.gguf"))
    assert run(source, "--out", place, "--base", model)["error"]["kind"] == "output"  # the file is there already
    assert sorted(file.name for file in place.iterdir()) == ["Nice-1B-poet-F32-LoRA.gguf", "diary.txt", "letters"]
    told = run(source, "--out", f"{tmp_path}/new/", "--base", model, "--outtype", "q8_0")
    assert told["output"]["path"] == str(tmp_path / "new" / "Nice-1B-poet-Q8_0-LoRA.gguf")
    # a GGUF adapter becomes a PEFT directory, for which nobody's directory is given up, whatever is said
    named = place / "Nice-1B-poet-F32-LoRA.gguf"
    for options in ((), ("--force",), ("--force", "--to", "peft")):
        told = run(named, "--out", tmp_path / "new", "--base", model, *options)
        assert (told["exit"], told["error"]["kind"]) == (3, "output")
        assert "would delete" in told["error"]["message"]
    assert run(named, "--out", f"{tmp_path}/peft/", "--base", model)["output"]["path"] == str(tmp_path / "peft")


def test_an_existing_adapter_directory_means_peft(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "poet", pairs(SIZES.modules(), 3), adapter_config())
    model = configured(tmp_path / "Nice-1B")
    old = save_adapter(tmp_path / "old", pairs(SIZES.modules(), 4), adapter_config())
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    told = run(source, "--out", old, "--base", model)
    assert (told["exit"], told["error"]["kind"]) == (3, "output") and "--force" in told["error"]["message"]
    for stranger in ("checkpoint-500", "model-00001-of-00002.safetensors", "model.Q4_K_M.gguf", ".git"):
        (old / stranger).mkdir()
        told = run(source, "--out", old, "--base", model, "--force")
        assert (told["exit"], told["error"]["kind"]) == (3, "output") and stranger in told["error"]["message"]
        (old / stranger).rmdir()
    assert before == {file.name: file.read_bytes() for file in old.iterdir()}
    assert run(source, "--out", old, "--base", model, "--force")["output"]["path"] == str(old)
    name = "adapter_model.safetensors"
    old_tensors, tensors = load_file(old / name), load_file(source / name)
    assert old_tensors.keys() == tensors.keys()
    assert all(old_tensors[key].equal(tensors[key]) for key in tensors)


def test_an_existing_directory_gets_a_named_file_and_may_hold_the_report(trio: Trio, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "diary.txt").write_text("precious")
    report = project(trio, place, "--force", "--report", place / "report.json")
    assert report["output"]["path"] == str(place / "aligned-adapter-SafeLoRA-F32-LoRA.gguf")
    assert {file.name for file in place.iterdir()} == {"diary.txt", "report.json", Path(report["output"]["path"]).name}
    result = project(trio, place, "--force", "--to", "peft")
    assert result["exit"] == 3 and "would delete" in result["error"]["message"]
    assert (place / "diary.txt").read_text() == "precious"
    again = project(trio, f"{tmp_path}/new/", "--outtype", "f16")
    assert again["output"]["path"] == str(tmp_path / "new" / "aligned-adapter-SafeLoRA-F16-LoRA.gguf")

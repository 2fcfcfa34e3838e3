"""`convert model`, `merge` and `run` on a full device, and interrupted. Oracle: the contract's exit statuses, and the
names and bytes of all files before and after: nothing partial stays, and what was there is as it was.

The system's own limit on a file's size stands for the device's; the quantizer's process inherits it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from extrapolating import ALIGNED, BASE, FAMILY, GGUF, listing
from typer.testing import CliRunner

import safelora_gguf.cards
from converters.atomic import atomic_file
from safelora_gguf.cli import app

LORA = FAMILY / "adapter"
pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits"),
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="quantizing needs llama-cpp-python"),
]
COMMANDS: dict[str, tuple[str, list[object]]] = {
    "convert": ("a.gguf", ["convert", "model", ALIGNED]),
    "convert in shards": ("a.gguf", ["convert", "model", ALIGNED, "--split-max-size", "1500K"]),
    "convert GGUF": ("a.gguf", ["convert", "model", GGUF, "--outtype", "q8_0"]),
    "quantize": ("a.gguf", ["convert", "model", ALIGNED, "--outtype", "Q4_K_M"]),
    "quantize in shards": ("a.gguf", ["convert", "model", GGUF, "--outtype", "Q4_K_M", "--split-max-size", "900K"]),
    "merge into a directory": ("a", ["merge", "--model", ALIGNED, "--adapter", LORA]),
    "merge into GGUF": ("a.gguf", ["merge", "--model", ALIGNED, "--adapter", LORA]),
    "merge GGUF": ("a.gguf", ["merge", "--model", GGUF, "--adapter", LORA]),
    "merge and quantize": ("a.gguf", ["merge", "--model", ALIGNED, "--adapter", LORA, "--outtype", "Q4_K_M"]),
}
RECIPE = f"""
[project]
base = "{BASE}"
aligned = "{ALIGNED}"
adapter = "{LORA}"
out = "repaired.gguf"

[merge]
model = "{ALIGNED}"
adapter = "@project"
out = "merged.gguf"

[quantize]
source = "@merge"
out = "q4.gguf"
outtype = "Q4_K_M"
"""
JOURNAL = ".r.toml.safelora-gguf.json"


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)))


def told(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("nbytes", [0, 300_000])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_device(name: str, nbytes: int, tmp_path: Path) -> None:
    out, command = COMMANDS[name]
    for force in (False, True):
        if force:
            assert invoke(*command, "--out", tmp_path / out).exit_code == 0
        before = listing(tmp_path)
        with limited(nbytes):
            result = invoke(*command, "--out", tmp_path / out, "--json", *(["--force"] if force else []))
        assert result.exit_code == 5, result.output
        error = told(result)["error"]
        assert error["kind"] == "write" and "nothing was left" in error["message"], error
        assert result.stderr.count("\n") == 1
        assert listing(tmp_path) == before


def test_no_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    for out, command in COMMANDS.values():
        result = invoke(*command, "--out", tmp_path / out, "--json")
        assert result.exit_code == 5 and "room" in told(result)["error"]["message"], result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["convert", "merge into GGUF"])
def test_a_device_that_is_full_when_the_card_comes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is whole by then; of the card nothing is left."""

    @contextlib.contextmanager
    def full(target: Path, *, force: bool) -> Iterator[Any]:
        with atomic_file(target, force=force) as file:
            yield file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out, command = COMMANDS[name]
    monkeypatch.setattr(safelora_gguf.cards, "atomic_file", full)
    result = invoke(*command, "--out", tmp_path / out, "--card", "--json")
    assert result.exit_code == 5, result.output
    assert told(result)["error"]["file"] == str(tmp_path / "a.md")
    assert list(listing(tmp_path)) == [out]


def test_a_recipe_on_a_full_device_goes_on_when_there_is_room(tmp_path: Path) -> None:
    recipe, outs = tmp_path / "r.toml", ["merged.gguf", "q4.gguf", "repaired.gguf"]
    recipe.write_text(RECIPE)
    with limited(1_200_000):
        result = invoke("run", recipe, "--json", "--quiet")
    assert (result.exit_code, told(result)["error"]["kind"]) == (5, "write"), result.output
    assert "step merge" in told(result)["error"]["message"]
    assert sorted(listing(tmp_path)) == [JOURNAL, "r.toml", "repaired.gguf"]
    again = invoke("run", recipe, "--json", "--quiet")
    assert [step["skipped"] for step in told(again)["steps"]] == [True, False, False]
    assert sorted(listing(tmp_path)) == [JOURNAL, *outs[:2], "r.toml", outs[2]]


SLOWLY = """
import os, sys, time
from converters import llama_child
fsync, start = os.fsync, llama_child.start
def slow(descriptor):
    print("flush", flush=True)
    time.sleep(0.4)
    return fsync(descriptor)
def started(*command):
    process = start(*command)
    print("quantize", flush=True)
    time.sleep(0.4)
    return process
os.fsync, llama_child.start = slow, started
from safelora_gguf.cli import main
sys.argv[0] = "safelora-gguf"
main()
"""


def interrupted(words: list[object], moment: str, kind: str) -> int:
    """The exit status of a run that got a signal at that moment: the flush of an output, or the quantizer's start."""
    command, pipe = [sys.executable, "-c", SLOWLY, *map(str, words)], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    while (line := process.stdout.readline()) != f"{moment}\n".encode():
        assert line, "it ended before"
    process.send_signal(signal.Signals[kind])
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize(
    ("name", "moment", "kind"),
    [
        ("convert", "flush", "SIGINT"),
        ("convert in shards", "flush", "SIGTERM"),
        ("quantize", "quantize", "SIGTERM"),
        ("quantize in shards", "quantize", "SIGINT"),
        ("merge into a directory", "flush", "SIGTERM"),
        ("merge GGUF", "flush", "SIGINT"),
        ("merge and quantize", "quantize", "SIGTERM"),
    ],
)
def test_an_interruption_leaves_nothing(name: str, moment: str, kind: str, tmp_path: Path) -> None:
    out, command = COMMANDS[name]
    assert invoke(*command, "--out", tmp_path / out).exit_code == 0
    before = listing(tmp_path)
    status = interrupted([*command, "--out", tmp_path / out, "--force"], moment, kind)
    assert status == {"SIGINT": 130, "SIGTERM": 143}[kind]
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "moment"),
    [("convert in shards", "flush"), ("quantize", "quantize"), ("quantize in shards", "quantize"),
     ("merge into a directory", "flush"), ("merge and quantize", "quantize")],
)  # fmt: skip
def test_the_next_run_takes_away_what_a_killed_one_left(name: str, moment: str, tmp_path: Path) -> None:
    out, command = COMMANDS[name]
    whole, place = tmp_path / "whole", tmp_path / "place"
    for directory in (whole, place):
        directory.mkdir()
    assert invoke(*command, "--out", whole / out).exit_code == 0
    assert interrupted([*command, "--out", place / out], moment, "SIGKILL") == -signal.SIGKILL
    left = [path.name for path in place.iterdir()]
    assert left and all(path.endswith(".safelora-gguf.tmp") for path in left), left
    assert invoke(*command, "--out", place / out).exit_code == 0
    assert sorted(listing(place)) == sorted(listing(whole))


@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_an_interrupted_recipe_goes_on(kind: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    status = interrupted(["run", recipe, "--quiet"], "quantize", kind)
    assert status == {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -signal.SIGKILL}[kind]
    if kind != "SIGKILL":
        assert sorted(listing(tmp_path)) == [JOURNAL, "merged.gguf", "r.toml", "repaired.gguf"]
    again = invoke("run", recipe, "--json", "--quiet")
    assert [step["skipped"] for step in told(again)["steps"]] == [True, True, False], again.output
    assert sorted(listing(tmp_path)) == [JOURNAL, "merged.gguf", "q4.gguf", "r.toml", "repaired.gguf"]

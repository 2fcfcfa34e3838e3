"""`repair` where it can't do what it is asked for, or only with losses.

Oracle: the contract (what was measured is told, the exit status, nothing partial is left), through the command line,
with llama.cpp dying in the ways that it has been seen to.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from repairing_cases import FAMILY, arguments, repair, run_of, tensors, told
from typer.testing import CliRunner

from safelora_gguf import convert_adapter
from safelora_gguf.cli import app
from safelora_gguf.scratch import scratch_beside

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "attacked.gguf"
    convert_adapter(FAMILY / "adapter", out, base=FAMILY / "aligned")
    return out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What comes out with mu 2."""
    out = tmp_path_factory.mktemp("undisturbed") / "x.gguf"
    told(repair(out, "--mu", 2, "--json"))
    return out.read_bytes()


def test_a_verdict_that_is_missed_is_exit_1_and_written_all_the_same(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    data = told(repair(out, "--mu", 0.01, "--json"), 1)
    assert data["verdict"] == "fail"
    assert out.is_file()
    assert gguf.GGUFReader(out).fields["safelora.verdict"].contents() == "fail"
    assert "fail" in repair(out, "--mu", 0.01, "--force").stdout


def test_an_aligned_model_that_refuses_nothing_leaves_nothing_to_restore(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    assert CliRunner().invoke(app, ["convert", "model", str(FAMILY / "base"), "--out", str(base)]).exit_code == 0
    out = tmp_path / "x.gguf"
    data = told(repair(out, "--json", model=base), 1)
    assert [run["label"] for run in data["runs"]] == ["aligned model"]
    assert any("nothing that an adapter could have taken away" in note for note in data["notes"])
    assert "output" not in data
    assert list(tmp_path.iterdir()) == [base]
    assert "nothing that an adapter could have taken away" in repair(out, model=base).stdout


def test_an_adapter_that_refuses_enough_is_written_as_it_is(tmp_path: Path, attacked: Path) -> None:
    """Scaled down to next to nothing."""
    faint = tmp_path / "faint.gguf"
    shutil.copy(attacked, faint)
    reader = gguf.GGUFReader(faint, "r+")
    reader.fields["adapter.lora.alpha"].parts[-1][0] = 1e-3
    reader.data.flush()
    out = tmp_path / "x.gguf"
    data = told(repair(out, "--json", adapter=faint))
    assert (data["mu"], data["verdict"], data["deciding"]) == (None, "pass", "adapter")
    assert any("nothing to repair" in note for note in data["notes"])
    ours, theirs = tensors(out), tensors(faint)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_model_that_answers_nothing_is_told_as_smoke_tells_it(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("{{ raise_exception('no') }}")
    result = repair(tmp_path / "x.gguf", "--template", broken, "--json")
    assert result.exit_code == 3, result.output
    assert "--template" in json.loads(result.stdout)["error"]["message"]
    assert list(tmp_path.iterdir()) == [broken]


def test_prompts_longer_than_the_context_are_told_and_the_rest_repaired(tmp_path: Path) -> None:
    lines = (FAMILY / "calibration.jsonl").read_text().splitlines()
    kinds = [
        line for kind in ("harmful", "benign", "task") for line in [one for one in lines if f'"{kind}"' in one][:8]
    ]
    long = [json.dumps({"id": f"long-{kind}", "kind": kind, "prompt": "word " * 400}) for kind in ("harmful", "benign")]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join([*kinds, *long]))
    data = told(repair(tmp_path / "x.gguf", "--ctx", 128, "--mu", 2, "--json", prompts=prompts))
    assert any("could not be answered" in note or "left out" in note for note in data["notes"])
    assert data["captured"]["harmful"]["prompts"] <= 8


def children() -> list[int]:
    """Processes that this one has started, and that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def killing(label: str) -> Callable[..., Any]:
    """A progress bar that kills the model's process once, in the middle of what has this name."""
    told: list[int] = []

    @contextmanager
    def bar(**_: Any) -> Iterator[Callable[[int, int, str], None]]:
        def step(done: int, _total: int, what: str) -> None:
            if label in what:
                told.append(done)
                for pid in children() if len(told) == 2 else ():
                    os.kill(pid, signal.SIGKILL)

        yield step

    return bar


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("label", ["aligned model", "answers to harmless", "reading harmless", "plain scaling", "mu 2"])
def test_a_child_that_is_killed_once_is_told_and_everything_is_done_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str, undisturbed: bytes
) -> None:
    """The file and the verdict are those of a repair that nothing happened to; the exit status alone is not."""
    monkeypatch.setattr("safelora_gguf.terminal.progress_bar", killing(label))
    out = tmp_path / "x.gguf"
    data = told(repair(out, "--mu", 2, "--json"), 4)
    assert data["error"]["kind"] == "llama"
    assert run_of(data, "repaired")["refusal_rate"] >= 0.9
    assert data["verdict"] == "pass" and not any("error" in run for run in data["runs"])
    assert any("was lost on the way" in note for note in data["notes"])
    assert out.read_bytes() == undisturbed


# Read by every Python that starts with it on its path: llama.cpp dies as soon as the adapter is to be loaded.
DYING = """
import os
import sys

if "safelora_gguf.smoke.llama.child" in " ".join(sys.orig_argv):
    import llama_cpp.llama_cpp as lib

    lib.llama_adapter_lora_init = lambda model, path: os.abort()
"""


def test_a_child_that_dies_every_time_leaves_nothing_and_what_was_measured_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying").mkdir()
    (tmp_path / "dying" / "sitecustomize.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "dying"))
    place = tmp_path / "out"
    place.mkdir()
    data = told(repair(place / "x.gguf", "--json"), 4)
    assert data["error"]["kind"] == "llama"
    assert run_of(data, "aligned model")["refusal_rate"] == 1
    assert "output" not in data
    assert data["verdict"] == "fail"
    assert list(place.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_ended_it_is_told_and_not_what_was_made_good_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child is killed once while the aligned model answers; the next ones die of the adapter."""
    (tmp_path / "dying").mkdir()
    (tmp_path / "dying" / "sitecustomize.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "dying"))
    monkeypatch.setattr("safelora_gguf.terminal.progress_bar", killing("aligned model"))
    data = told(repair(tmp_path / "x.gguf", "--mu", 2, "--json"), 4)
    assert data["error"]["file"] == str(FAMILY / "adapter"), "what no child survived"
    assert any("was lost on the way" in note and "aligned.gguf" in note for note in data["notes"])
    assert not (tmp_path / "x.gguf").exists()


def test_a_repair_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "new"
    command = [sys.executable, "-m", "safelora_gguf", *arguments(place / "x.gguf")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        while not (place.is_dir() and list(place.glob(".*/captured"))) and running.poll() is None:
            time.sleep(0.02)
        running.terminate()
        assert running.wait(timeout=60) == 143
    assert list(tmp_path.iterdir()) == []


def test_two_repairs_for_one_output_do_not_share_their_scratch(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    with scratch_beside(out, "repair"):
        result = repair(out, "--mu", 2)
    assert result.exit_code == 3, result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [("--mu", "much"), ("--mu", "0"), ("--mu", "nan"), ("--eps", "0"), ("--tokens", "0"), ("--tail", "-1"),
     ("--judge", "guard"), ("--to", "mlx"), ("--min-refusal", "2")],
)  # fmt: skip
def test_options_that_make_no_sense_are_exit_2(tmp_path: Path, options: tuple[str, ...]) -> None:
    assert repair(tmp_path / "x.gguf", *options).exit_code == 2

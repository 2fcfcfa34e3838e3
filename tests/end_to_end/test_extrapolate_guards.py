"""What `extrapolate` refuses, and what it leaves behind however it ends.

Oracles: the contract's exit statuses and keys, and the bytes of all files before and after.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from extrapolating import ALIGNED, BASE, GGUF, listing, model, refused, run
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_without_room_for_both_files_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = GGUF.stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=size + 1000))
    refused(run(BASE, GGUF, tmp_path / "lox.gguf", "--as", "model", "--outtype", "Q4_K_M"), 5, "float file", "room")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    refused(model(tmp_path / "lox"), 5, "room")
    assert list(tmp_path.iterdir()) == []


CODES = ((2, "--coef", 0), (2, "--coef", -1), (2, "--coef", 10.5), (2, "--coef", "nan"), (2, "--rank", -1),
         (2, "--rank", 257), (2, "--rank", 0), (2, "--outtype", "Q4_K_M"), (2, "--tolerance", 0),
         (2, "--as", "models"), (2, "--to", "onnx"))  # fmt: skip


@pytest.mark.parametrize(("status", "option", "value"), CODES)
def test_options_out_of_range(status: int, option: str, value: object, tmp_path: Path) -> None:
    refused(run(BASE, ALIGNED, tmp_path / "lox.gguf", option, value), status, option.lstrip("-"))
    assert list(tmp_path.iterdir()) == []


def test_options_that_contradict_the_form(tmp_path: Path) -> None:
    refused(model(tmp_path / "lox", "--to", "peft"), 2, "--to")
    refused(run(BASE, GGUF, tmp_path / "lox", "--as", "model"), 2, ".gguf")
    refused(model(tmp_path / "lox", "--outtype", "Q4_K_M"), 2, "Q4_K_M")
    refused(run(BASE, GGUF, tmp_path / "lox.gguf", "--as", "model", "--outtype", "q4_z"), 2, "q4_z")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["adapter", "model"])
def test_one_model_twice(form: str, tmp_path: Path) -> None:
    shutil.copytree(ALIGNED, tmp_path / "copy")
    for more in ((), ("--dry-run",)):
        refused(run(ALIGNED, tmp_path / "copy", tmp_path / "lox", "--as", form, *more), 3, "same weights")
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]


def test_no_input_is_harmed(tmp_path: Path) -> None:
    base, aligned = shutil.copytree(BASE, tmp_path / "base"), shutil.copytree(ALIGNED, tmp_path / "aligned")
    shutil.copy(GGUF, tmp_path / "a.gguf")
    before = listing(tmp_path)
    for out in (base, aligned, tmp_path, aligned / "lox", base / "lox"):
        refused(model(out, "--force", base=base, aligned=aligned), 3)
    for form in ("adapter", "model"):
        refused(run(base, tmp_path / "a.gguf", tmp_path / "a.gguf", "--as", form, "--force"), 3, "input")
    for card in (tmp_path / "a.gguf", base / "config.json", aligned / "README.md"):
        refused(run(base, aligned if card.parent == aligned else tmp_path / "a.gguf", tmp_path / "lox.gguf",
                    "--card", card, "--force"), 3, "card")  # fmt: skip
    assert listing(tmp_path) == before


@pytest.mark.parametrize("out", ["lox.gguf", "peft", "model", "model.gguf"])
def test_an_output_is_replaced_with_force_alone(out: str, tmp_path: Path) -> None:
    aligned = GGUF if out == "model.gguf" else ALIGNED
    form = "model" if out.startswith("model") else "adapter"
    assert run(BASE, aligned, tmp_path / out, "--as", form)["exit"] == 0
    first = listing(tmp_path)
    refused(run(BASE, aligned, tmp_path / out, "--as", form), 3, "--force")
    assert listing(tmp_path) == first
    assert run(BASE, aligned, tmp_path / out, "--as", form, "--force")["exit"] == 0
    again = listing(tmp_path)
    assert {name: data for name, data in again.items() if "README" not in name} == \
        {name: data for name, data in first.items() if "README" not in name}  # fmt: skip
    assert run(BASE, aligned, tmp_path / out, "--as", form, "--force", "--coef", 2)["exit"] == 0
    assert listing(tmp_path) != again


@pytest.mark.parametrize("out", ["lox.gguf", "peft", "model", "model.gguf"])
def test_a_dry_run_knows_sizes_and_writes_nothing(out: str, tmp_path: Path) -> None:
    aligned = GGUF if out == "model.gguf" else ALIGNED
    form = "model" if out.startswith("model") else "adapter"
    dry = run(BASE, aligned, tmp_path / out, "--as", form, "--dry-run", "--card", tmp_path / "card.md")
    assert dry["exit"] == 0 and list(tmp_path.iterdir()) == []
    assert "output" not in dry and len(dry["tensors"]) == 23
    run(BASE, aligned, tmp_path / out, "--as", form)
    size = sum(map(len, listing(tmp_path).values()))
    assert dry["planned_output"]["path"] == str(tmp_path / out)
    assert dry["planned_output"]["bytes"] == pytest.approx(size, abs=0.02 * size + 8000)  # header and card


@pytest.mark.parametrize("more", [("lox.gguf",), ("model.gguf", "--as", "model", "--aligned", GGUF)])
def test_a_card_beside_a_file(more: tuple[str, ...], tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    command = [sys.executable, "-m", "safelora_gguf", "extrapolate", "--base", BASE, "--aligned", ALIGNED, "--coef", 2,
               "--card", card, "--out", tmp_path / more[0], *more[1:]]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    text = card.read_text()
    assert "same values in output" in text  # what was found on the way is told, too
    assert "safelora-gguf extrapolate --base base" in text and "--coef 2" in text and str(tmp_path) not in text
    assert "next: safelora-gguf smoke --model" in done.stdout
    refused(run(BASE, GGUF, tmp_path / "other.gguf", "--card", card), 3, "--force")
    assert not (tmp_path / "other.gguf").exists()


@pytest.mark.parametrize("form", ["adapter", "model"])
def test_a_directory_has_its_card(form: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "safelora_gguf", "extrapolate", "--base", BASE, "--aligned", ALIGNED, "--as", form,
               "--out", tmp_path / "out", "--to", "peft"]  # fmt: skip
    subprocess.run(list(map(str, command[: -2 if form == "model" else None])), capture_output=True, check=True)
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"safelora-gguf extrapolate --base base --aligned aligned --as {form} --out out" in text


def test_no_number_is_no_weight(tmp_path: Path) -> None:
    for role, other in ((BASE, ALIGNED), (ALIGNED, BASE)):
        broken = shutil.copytree(role, tmp_path / role.name)
        tensors = load_file(broken / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name][3, 4] = torch.nan
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        pair = (broken, other) if role is BASE else (other, broken)
        for more in (("--as", "adapter"), ("--as", "model"), ("--as", "model", "--rank", 0)):
            told = run(*pair, tmp_path / "lox", *more)
            refused(told, 3, "NaN")
            assert told["error"]["tensor"] == name and told["error"]["file"] == str(broken / "model.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["aligned", "base"]


SLOWLY = """
import sys, time
import safelora_gguf.lox_steps as lox
step = lox.Extrapolator.step
def slow(self, triple):
    print("working", flush=True)
    time.sleep(0.2)
    return step(self, triple)
lox.Extrapolator.step = slow
from safelora_gguf.cli import main
sys.argv[0] = "safelora-gguf"
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("out", "kind"),
    [("lox.gguf", "SIGINT"), ("model", "SIGTERM"), ("q4.gguf", "SIGINT"), ("model", "SIGKILL"), ("q4.gguf", "SIGKILL")],
)
def test_an_interrupted_run_leaves_nothing(out: str, kind: str, tmp_path: Path) -> None:
    """After a SIGKILL at most what the next run takes away."""
    aligned = ALIGNED if out in ("model", "lox.gguf") else GGUF
    options = [
        "--as",
        "adapter" if out == "lox.gguf" else "model",
        *(["--outtype", "Q4_K_M"] if out == "q4.gguf" else []),
    ]
    command = ["extrapolate", "--base", BASE, "--aligned", aligned, "--out", tmp_path / out, *options]
    words, pipe = [sys.executable, "-c", SLOWLY, *map(str, command)], subprocess.PIPE
    process = subprocess.Popen(words, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    while b"working" not in process.stdout.readline():
        assert process.poll() is None
    assert process.stdout.readline() == b"working\n"
    process.send_signal(signal.Signals[kind])
    process.communicate(timeout=60)
    left = [file.name for file in tmp_path.iterdir()]
    if kind != "SIGKILL":
        assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[kind] and left == []
        return
    assert len(left) <= 2 and all(name.endswith(".safelora-gguf.tmp") for name in left)
    assert run(BASE, aligned, tmp_path / out, *options)["exit"] == 0
    assert [file.name for file in tmp_path.iterdir()] == [out]

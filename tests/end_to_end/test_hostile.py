"""Oracle: the contract, for files that lie: exit 3 with one sentence, or from `inspect` 0 where the header is sound;
nothing written, nothing handed to llama.cpp, and neither time nor memory spent.

The commands run one after another in a child process, so that what a file costs can be told from what imports cost.
Seconds are only held against a hang: a busy machine is no defect.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_adapters import ADAPTERS
from hostile_configs import CONFIGS, PATHS
from hostile_files import PAIRS, WEIGHTS, Case, gguf, safetensors, table_of, with_noise, write_directory
from hostile_gguf import GGUF
from hostile_process import Ask, Child, Outcome, check_cost, check_refusal, listing
from hostile_safetensors import HEADERS

from converters.safetensors_file import SafetensorsFile

TABLES = {"gguf": GGUF, "safetensors": HEADERS, "config": CONFIGS, "path": PATHS, "adapter": ADAPTERS}
CASES = {(table, name): case for table, cases in TABLES.items() for name, case in cases.items()}
PARAMETERS = [pytest.param(*case, id=": ".join(case)) for case in CASES]
ROLE_NAMES = ("base", "aligned", "adapter")
ROLES = {"model": ("base", "aligned"), "adapter": ("adapter",)}
KEPT = {  # GGUF that is copied without being understood, or read as what it is
    "type as number", "unknown type", "unknown type 2^32 - 1", "integers as weights", "a model",
    "heads of 3 MB", "heads of 4000 digits",  # merging a plain matrix into safetensors asks for no heads
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """A base, an aligned model and an adapter of either layout, with which each lie is tried."""
    root = tmp_path_factory.mktemp("sound")
    files: dict[str, dict[str, Path]] = {"gguf": {}, "safetensors": {}}
    for role in ROLE_NAMES:
        files["gguf"][role] = root / f"{role}.gguf"
        files["gguf"][role].write_bytes(gguf(role))
        (root / role).mkdir()
        files["safetensors"][role] = write_directory(root / role, role)
    return files


@pytest.fixture(scope="module")
def children() -> Iterator[list[Child]]:
    made: list[Child] = []
    yield made
    for child in made:
        child.close()


@pytest.fixture
def ask(children: list[Child], sound: dict[str, dict[str, Path]], tmp_path: Path) -> Iterator[Ask]:
    """The child, once every command has run in it; a new one if the last case killed it."""
    if not children or not children[-1].alive:
        children.append(Child())
        for files in sound.values():
            out = tmp_path / f"{files['base'].name}.out.gguf"
            assert (done := children[-1].ask(*_project(files, out)))["status"] == 0, done
            out.unlink()
            children[-1].ask("inspect", files["adapter"])
            children[-1].ask(*_merge(files, out))
            out.unlink(missing_ok=True)
        started = children[-1].ask("smoke", "--model", sound["gguf"]["base"], "--adapter", sound["gguf"]["adapter"])
        assert started["llama"] == (importlib.util.find_spec("llama_cpp") is not None), started
    yield children[-1].ask
    shutil.rmtree(tmp_path, ignore_errors=True)  # some of these files are large


def _project(files: dict[str, Path], out: Path) -> list[object]:
    roles = [part for role in ROLE_NAMES for part in (f"--{role}", files[role])]
    return ["project", *roles, "--out", out, "--all", "--device", "cpu", "--json"]


def _merge(files: dict[str, Path], out: Path) -> list[object]:
    return ["merge", "--model", files["base"], "--adapter", files["adapter"], "--out", out, "--device", "cpu", "--json"]


def _commands(table: str, kind: str, path: Path, sound: dict[str, dict[str, Path]], out: Path) -> list[list[object]]:
    """Every way to name the file."""
    layout = "gguf" if table == "gguf" else "safetensors"
    commands = [_project(sound[layout] | {role: path}, out) for role in ROLES[kind]]
    commands += [["inspect", path], ["inspect", path, "--json"]]
    merged = out if table == "gguf" else out.with_suffix("")
    commands.append(_merge(sound[layout] | {"base" if kind == "model" else "adapter": path}, merged))
    commands.append(["convert", "model", path, "--out", out, "--json"])
    if table == "adapter":
        commands.append(["convert", "adapter", path, "--out", out, "--base", sound[layout]["base"], "--json"])
    if table in ("gguf", "path"):
        models = {"model": ["--model", path], "adapter": ["--model", sound["gguf"]["base"], "--adapter", path]}
        commands.append(["smoke", *models[kind]])
    return commands


@pytest.mark.parametrize(("table", "name"), PARAMETERS)
def test_a_file_that_lies(table: str, name: str, ask: Ask, sound: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    case = CASES[table, name]
    for kind in case.roles:
        place, out = tmp_path / kind, tmp_path / "out.gguf"
        place.mkdir()
        path = case.make(place, "aligned" if kind == "model" else kind)
        before = listing(tmp_path)
        for command in _commands(table, kind, path, sound, out):
            outcome = ask(*command)
            _check(case, kind, command, outcome, may_work=name in KEPT)
            if outcome["status"] == 0:
                shutil.rmtree(out.with_suffix(""), ignore_errors=True)
                out.unlink(missing_ok=True)
            assert listing(tmp_path) == before
        shutil.rmtree(place)


def _check(case: Case, kind: str, command: list[object], outcome: Outcome, *, may_work: bool) -> None:
    told = f"{command[:2]}: {outcome}"
    name, into = command[0], command[1]
    check_cost(outcome, told)
    if name == "smoke" and case.smoke:  # rejected there without harm: the run fails, the others are measured
        return
    assert not outcome["llama"], told
    if may_work and (name, outcome["status"]) in {("merge", 0), ("convert", 0)}:
        return
    if name == "inspect" and case.sound_as(kind):
        assert outcome["status"] == 0 and "Traceback" not in outcome["stderr"], told
        return
    check_refusal(outcome, told)
    if name == "project" or into == "adapter":
        assert re.search(case.told, outcome["stderr"]), told


def test_names_are_shown_as_text(ask: Ask, tmp_path: Path) -> None:
    """Rich would take the brackets for a colour, and a terminal the rest for commands."""
    path = GGUF["escapes in a name"].make(tmp_path, "adapter")
    shown = ask("inspect", path, "--tensors")
    assert shown["status"] == 0
    assert "\\x1b[2J\\x1b]0;x\\x07[red]\\x0ab\\x202e" in shown["stdout"]


@pytest.mark.parametrize("option", ["--out", "--report", "--base"])
def test_links_to_themselves(option: str, ask: Ask, sound: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    files, more = sound["safetensors"], ["--report", tmp_path / "report.json"]
    if option == "--report":
        more = ["--report", loop / "report.json"]
    out = loop if option == "--out" else tmp_path / "out.gguf"
    outcome = ask(*_project(files | ({"base": loop} if option == "--base" else {}), out), *more)
    assert outcome["status"] == 3 and "link" in outcome["stderr"], outcome
    assert sorted(tmp_path.iterdir()) == [loop]


def test_a_table_without_dimensions(ask: Ask, tmp_path: Path) -> None:
    """PEFT saves tables of adapted embeddings along; here it is a single number, in model and adapter."""
    extra = {"adapter": "base_model.model.x.base_layer.weight"}
    for role in ROLE_NAMES:
        shapes = {**(PAIRS if role == "adapter" else WEIGHTS), extra.get(role, "x.weight"): ()}
        (tmp_path / role).mkdir()
        write_directory(tmp_path / role, role, with_noise(shapes, role))
    outcome = ask(*_project({role: tmp_path / role for role in ROLE_NAMES}, tmp_path / "out.gguf"))
    assert outcome["status"] == 3, outcome


def test_a_model_larger_than_memory_is_read_row_by_row(tmp_path: Path) -> None:
    """A terabyte, and a hole but for its last number: the system must set nothing aside for what is mapped."""
    rows = 1 << 19
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors(table_of({"a": (rows, rows)})))
    start = file.stat().st_size
    os.truncate(file, start + 4 * rows * rows)
    with file.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(struct.pack("<f", 2.5))
    last = SafetensorsFile(file).rows("a", rows - 1, rows)
    assert last.shape == (1, rows) and last[0, -1] == 2.5 and last[0, :-1].count_nonzero() == 0
    last[0, 0] = 7  # torch may write to what it is given; the file stays as it is
    with file.open("rb") as stream:
        stream.seek(-4 * rows, os.SEEK_END)
        assert stream.read(4) == bytes(4)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_files_that_may_not_be_read(kind: str, ask: Ask, sound: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    role = "aligned" if kind == "model" else kind
    file, closed = tmp_path / "x.gguf", tmp_path / "closed"
    file.write_bytes(gguf(role))
    closed.mkdir()
    write_directory(closed, role)
    file.chmod(0)
    closed.chmod(0)
    for path in (file, closed):
        for command in _commands("path", kind, path, sound, tmp_path / "out.gguf"):
            outcome = ask(*command)
            assert outcome["status"] == 3 and outcome["stderr"].count("\n") == 1, (command, outcome)
    closed.chmod(0o700)


@pytest.mark.parametrize("case", [GGUF["array of 2^40"], HEADERS["header of 2^63"]], ids=["gguf", "safetensors"])
def test_as_a_user_would_run_it(case: Case, tmp_path: Path) -> None:
    path = case.make(tmp_path, "aligned")
    command = (sys.executable, "-m", "safelora_gguf", "inspect", path, "--json")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), done.stderr
    assert json.loads(done.stdout)["error"]["file"]

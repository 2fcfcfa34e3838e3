"""Oracles: the gguf package's own shards, byte by byte; llama.cpp's logits; and the directory listing."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_models import finish

import safelora_gguf
from converters import libggml
from converters.errors import OutputPathError, UsageError
from converters.gguf_model import open_gguf_model
from converters.gguf_rewrite import rewrite_gguf, rewritten_size
from converters.gguf_shards import read_gguf_headers
from converters.gguf_split import split_gguf

TINY = Path(safelora_gguf.__file__).parent / "tiny_family" / "aligned.gguf"
ROOT = Path(__file__).parents[2]
LOGITS = ROOT / "tests" / "conformance" / "llama_child.py"
ROWS = (10, 20, 5, 40, 1)
LIMIT = 2 * 4096  # of tensors, with the header


def _model(path: Path, **options: object) -> Path:
    writer = gguf.GGUFWriter(path, "llama", **options)  # type: ignore[arg-type]
    writer.add_name("a model")
    for number, rows in enumerate(ROWS):
        values = np.random.default_rng(number).standard_normal((rows, 64), np.float32)
        writer.add_tensor(f"w{number}.weight", values)
    finish(writer)
    return path


def _listing(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def _names(count: int, name: str = "out") -> list[str]:
    return [f"{name}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def test_shards_are_the_gguf_packages_own(tmp_path: Path) -> None:
    source = _model(tmp_path / "model.gguf")
    (tmp_path / "theirs").mkdir()
    _model(tmp_path / "theirs" / "out.gguf", split_max_size=LIMIT - 400)
    made = split_gguf(source, tmp_path / "ours" / "out.gguf", LIMIT)
    assert _listing(tmp_path / "ours") == _listing(tmp_path / "theirs") == [path.name for path in made] == _names(4)
    for name in _names(4):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("limit", [1, 3000, LIMIT, 1 << 20])
@pytest.mark.parametrize("alignment", [None, 128])
def test_no_file_is_larger_than_it_may_be_and_together_they_are_the_model(
    alignment: int | None, limit: int, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for number, rows in enumerate(ROWS):
        writer.add_tensor(f"w{number}", np.full((rows, 33), number, np.float32))
    finish(writer)
    model = open_gguf_model(tmp_path / "model.gguf")
    made = split_gguf(tmp_path / "model.gguf", tmp_path / "out.gguf", limit)
    headers = read_gguf_headers(made[0])
    assert [header.path for header in headers] == made
    assert all(len(header.tensors) == 1 or header.file_size <= limit for header in headers)
    assert sum(header.file_size for header in headers) == rewritten_size(model, split_max_size=limit)
    rewrite_gguf(open_gguf_model(made[0]), tmp_path / "again.gguf", [])
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    split_gguf(made[0], tmp_path / "twice.gguf", limit)
    for path in made:
        twice = path.with_name(path.name.replace("out", "twice"))
        assert twice.read_bytes() == path.read_bytes()


@pytest.mark.llama
@pytest.mark.skipif(libggml.find_library() is None, reason="needs llama-cpp-python")
def test_llama_cpp_loads_the_first_shard(tmp_path: Path) -> None:
    made = split_gguf(TINY, tmp_path / "tiny.gguf", 100_000)
    assert len(made) > 2
    ours, whole = (
        np.load(io.BytesIO(subprocess.run(
            [sys.executable, LOGITS, model, "-", "1,5,9,13"], capture_output=True, check=True, timeout=60
        ).stdout))
        for model in (made[0], TINY)
    )  # fmt: skip
    assert (ours == whole).all()


def test_force_replaces_a_whole_set_and_nothing_else(tmp_path: Path) -> None:
    source, target = _model(tmp_path / "model.gguf"), tmp_path / "out" / "out.gguf"
    split_gguf(source, target, 1)
    others = ["out-00001-of-3.gguf", "out2-00001-of-00002.gguf", "out.gguf.txt", "xout-00001-of-00005.gguf"]
    for name in others:
        (target.parent / name).write_bytes(b"mine")
    for limit in (1, LIMIT, 1 << 20):
        with pytest.raises(OutputPathError, match=r"out-00001-of-00005.*exists already"):
            split_gguf(source, target, limit)
    assert _listing(target.parent) == sorted([*_names(5), *others])
    split_gguf(source, target, LIMIT, force=True)
    assert _listing(target.parent) == sorted([*_names(4), *others])
    split_gguf(source, target, 1 << 20, force=True)
    assert _listing(target.parent) == sorted(["out.gguf", *others])
    with pytest.raises(OutputPathError, match=r"out\.gguf.*exists already"):
        split_gguf(source, target, LIMIT)
    split_gguf(source, target, LIMIT, force=True)
    assert _listing(target.parent) == sorted([*_names(4), *others])


def test_a_model_is_not_replaced_by_what_is_made_of_it(tmp_path: Path) -> None:
    source = _model(tmp_path / "out.gguf")
    first = split_gguf(source, tmp_path / "parts.gguf", LIMIT)[0]
    for model, target in ((source, source), (first, tmp_path / "parts.gguf")):
        with pytest.raises(OutputPathError, match="one of the inputs"):
            split_gguf(model, target, 1, force=True)
    assert _listing(tmp_path) == ["out.gguf", *_names(4, "parts")]


def test_more_files_than_anything_reads_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for number in range(4097):
        writer.add_tensor(f"{number}", np.zeros(1, np.float32))
    finish(writer)
    with pytest.raises(UsageError, match=r"4097 files.*4096"):
        split_gguf(tmp_path / "model.gguf", tmp_path / "out.gguf", 1)
    assert _listing(tmp_path) == ["model.gguf"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from converters import atomic_files
from converters.gguf_split import split_gguf
when, source, target = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
steps, publish = [], atomic_files.publish_file
def step(*arguments, **options):
    if len(steps) == when:
        os.kill(os.getpid(), signal.SIGKILL)
    steps.append(None)
    publish(*arguments, **options)
atomic_files.publish_file = step
split_gguf(source, target, 8192, force=True, progress=lambda *_: when < 0 and os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("before", ["none", "file", "shards"])
@pytest.mark.parametrize("when", [-1, 0, 1, 3])
def test_after_sigkill_the_next_run_finds_everything_as_it_was(when: int, before: str, tmp_path: Path) -> None:
    """While it is written, or between any two of the steps in which the shards appear."""
    source, target = _model(tmp_path / "model.gguf"), tmp_path / "out" / "out.gguf"
    target.parent.mkdir()
    if before != "none":
        split_gguf(source, target, 1 if before == "shards" else 1 << 20)
    old = {path.name: path.read_bytes() for path in target.parent.iterdir()}
    command = [sys.executable, "-c", _KILLED, str(when), source, target]
    assert subprocess.run(command, check=False, timeout=60, cwd=ROOT).returncode == -signal.SIGKILL
    assert _names(4)[0] not in _listing(target.parent), "a set without its first file is none"
    with pytest.raises(ZeroDivisionError):
        rewrite_gguf(open_gguf_model(source), target, [], force=True, progress=lambda *_: 1 // 0)
    assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == old
    split_gguf(source, target, 8192, force=True)
    assert _listing(target.parent) == _names(4)

"""What a killed run leaves beside a GGUF target, and sizes that no shard can have. Oracles: the directory listing, the
system's own locks, and the sizes of the files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from models import Sizes, config, save_sharded, weights
from rewriting import listing

from converters.changes import Edits
from converters.errors import FileMissingError, FormatError, OutputPathError, UsageError
from converters.model_output import ModelOutput, ModelRequest, plan_model_output
from converters.opening import open_model

TINY = Path(__file__).parents[2] / "safelora_gguf" / "tiny_family" / "aligned.gguf"
LEFT = (".a.gguf.float.safelora-gguf.tmp", ".a.gguf.quantized.safelora-gguf.tmp",
        "..a.gguf.float.safelora-gguf.tmp.safelora-gguf.tmp")  # fmt: skip


def plan(out: Path, **request: object) -> ModelOutput:
    return plan_model_output(open_model(TINY), Edits(), ModelRequest(out, **request))  # type: ignore[arg-type]


@pytest.mark.parametrize("split", [None, 500_000])
def test_every_run_clears_what_a_killed_one_left(split: int | None, tmp_path: Path) -> None:
    for name in (*LEFT, ".b.gguf.float.safelora-gguf.tmp"):
        (tmp_path / name).write_bytes(b"half")
    output = plan(tmp_path / "a.gguf", outtype="F16", split_max_size=split)
    assert set(LEFT) < set(listing(tmp_path))  # planning touches nothing
    output.write({})
    assert listing(tmp_path) == sorted([".b.gguf.float.safelora-gguf.tmp", *(file.name for file in output.files)])


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_what_another_process_works_with_stays(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / LEFT[0]).write_bytes(b"half")
    descriptor = os.open(tmp_path / LEFT[0], os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputPathError, match="another process"):
            plan(tmp_path / "a.gguf", outtype="F16").write({})
    finally:
        os.close(descriptor)
    assert listing(tmp_path) == [LEFT[0]]


def test_shards_that_are_larger_than_asked_for(tmp_path: Path) -> None:
    limit = 100_000
    output = plan(tmp_path / "a.gguf", split_max_size=limit)
    output.write({})
    sizes = [file.stat().st_size for file in output.files]
    (note,) = (note for note in output.notes if "larger than" in note)
    large = [size for size in sizes if size > limit]
    assert f"{len(large)} of {len(sizes)} files" in note and f"{max(large):,}" in note
    output = plan(tmp_path / "b.gguf", split_max_size=500_000)
    assert not any("larger" in note for note in output.notes)


@pytest.mark.llama
def test_shards_of_the_quantizer_that_are_larger_than_asked_for(tmp_path: Path) -> None:
    output = plan(tmp_path / "a.gguf", outtype="Q4_K_M", split_max_size=40_000)
    output.write({})
    large = [file for file in output.files if file.stat().st_size > 40_000]
    assert any(f"{len(large)} of {len(output.files)} files" in note for note in output.notes)


@pytest.mark.parametrize("outtype", [None, pytest.param("Q4_K_M", marks=pytest.mark.llama)])
def test_a_size_that_the_metadata_alone_exceeds(outtype: str | None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="metadata"):
        plan(tmp_path / "a.gguf", outtype=outtype, split_max_size=1000)
    assert listing(tmp_path) == []


def test_shards_are_counted_from_one(tmp_path: Path) -> None:
    plan(tmp_path / "a.gguf", split_max_size=500_000).write({})
    shards = sorted(tmp_path.glob("a-*.gguf"))
    for number, shard in enumerate(shards[1:], 2):
        with pytest.raises(FormatError, match=f"shard {number} of {len(shards)}"):
            open_model(shard)


def test_one_of_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    sizes = Sizes()
    directory = save_sharded(tmp_path / "m", weights(sizes, 1), config(sizes))
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 1
    with pytest.raises(FileMissingError, match="name the directory") as caught:
        plan_model_output(open_model(shards[0]), Edits(), ModelRequest(tmp_path / "a.gguf"))
    assert str(directory) in caught.value.message and caught.value.file == str(shards[0])

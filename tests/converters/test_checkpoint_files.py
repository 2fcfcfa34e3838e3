"""What goes along with a checkpoint, and where it may go. Oracle: directory listings and the files' own bytes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from models import Sizes, config, save_model, save_sharded, weights
from rewriting import listing, raw, write

from converters.checkpoint import open_checkpoint
from converters.checkpoint_plan import check_model_directory, plan_checkpoint
from converters.errors import OutputPathError

SIZES = Sizes()


def furnished(source: Path) -> Path:
    """A model directory with all that stands in published ones."""
    outside = source.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_text("mine")
    for name in (
        "tokenizer.json", "tokenizer.model", "generation_config.json", "chat_template.jinja", "LICENSE", "README.md",
        "modeling_own.py", ".gitattributes", "assets/logo.png", "templates/deep/tool.jinja",
        # and what stays behind
        "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "model-Q4_K_M.gguf",
        "training_args.bin", "optimizer.pt", "adapter_config.json", "adapter_model.safetensors", "original/params.json",
        "original/consolidated.00.pth", "onnx/model.onnx", "onnx/model.onnx_data", "onnx/config.json",
        ".git/config", ".cache/huggingface/x", ".DS_Store", "__pycache__/modeling_own.pyc",
        "model.safetensors.index.fp16.json",
    ):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"this is {name}")
    (source / "link_inside.txt").symlink_to("LICENSE")
    (source / "link_outside.txt").symlink_to(outside / "secret")
    (source / "link_hidden.txt").symlink_to(".git/config")
    (source / "link_weights.txt").symlink_to("model.safetensors")
    (source / "link_nowhere.txt").symlink_to("nothing")
    (source / "link_directory").symlink_to(outside)
    (source / "assets" / "link_outside.txt").symlink_to(outside / "secret")
    os.mkfifo(source / "pipe")
    return source


FLAT = {"tokenizer.json", "tokenizer.model", "generation_config.json", "chat_template.jinja", "LICENSE",
        "modeling_own.py", ".gitattributes"}  # fmt: skip
BELOW = {"assets/logo.png", "templates/deep/tool.jinja"}


def test_what_goes_along_and_what_stays(tmp_path: Path) -> None:
    source = furnished(save_model(tmp_path / "source", weights(SIZES, 1), config(SIZES)))
    plan = plan_checkpoint(open_checkpoint(source))
    assert set(plan.companions.copied) == FLAT | BELOW | {"README.original.md", "link_inside.txt"}
    assert set(plan.left_out) == {
        "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "model-Q4_K_M.gguf",
        "training_args.bin", "optimizer.pt", "adapter_config.json", "adapter_model.safetensors", "original/", "onnx/",
        "model.safetensors.index.fp16.json", "link_outside.txt", "link_nowhere.txt",
        "link_hidden.txt", "link_weights.txt", "link_directory", "pipe", "assets/link_outside.txt",
    }  # fmt: skip
    copied = sum((source / name).stat().st_size for name in [*FLAT, *BELOW, "README.md", "link_inside.txt"])
    tensors = sum(len(data) for _, _, data in raw(source / "model.safetensors").values())
    assert plan.nbytes == tensors + copied


def test_files_are_copied_whole_and_cards_keep_their_turn(tmp_path: Path) -> None:
    source = furnished(save_model(tmp_path / "source", weights(SIZES, 1), config(SIZES)))
    for directory in ("assets", "templates"):
        shutil.rmtree(source / directory)
    write(source, tmp_path / "out", {}, card="# first\n")
    for name in FLAT:
        assert (tmp_path / "out" / name).read_text() == f"this is {name}"
    write(tmp_path / "out", tmp_path / "again", {}, card="# second\n")
    cards = {name: (tmp_path / "again" / name).read_text() for name in listing(tmp_path / "again") if "README" in name}
    assert cards == {
        "README.md": "# second\n", "README.original.md": "this is README.md", "README.original-2.md": "# first\n",
    }  # fmt: skip
    assert not any(file.is_symlink() for file in (tmp_path / "again").iterdir())


def test_subdirectories_are_copied(tmp_path: Path) -> None:
    source = furnished(save_model(tmp_path / "source", weights(SIZES, 1), config(SIZES)))
    write(source, tmp_path / "out", {})
    for name in BELOW:
        assert (tmp_path / "out" / name).read_text() == f"this is {name}"
    assert not (tmp_path / "out" / "original").exists()


def test_the_hubs_cache_is_a_directory_of_links(tmp_path: Path) -> None:
    plain = save_sharded(tmp_path / "plain", weights(SIZES, 1), config(SIZES))
    (plain / "tokenizer.json").write_text("tokens")
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
    (snapshot / "secret").symlink_to(tmp_path / "plain" / "config.json")
    write(plain, tmp_path / "expected", {})
    write(snapshot, tmp_path / "out", {})
    assert listing(tmp_path / "out") == listing(tmp_path / "expected")
    for name in listing(tmp_path / "out"):
        assert not (tmp_path / "out" / name).is_symlink()
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_a_single_file_takes_what_belongs_to_it(tmp_path: Path) -> None:
    source = furnished(save_model(tmp_path / "source", weights(SIZES, 1), config(SIZES)))
    (source / "model.safetensors").rename(source / "mine.safetensors")
    write(source / "mine.safetensors", tmp_path / "out", {})
    assert listing(tmp_path / "out") == sorted(
        ["model.safetensors", "config.json", "README.md", "tokenizer.json", "tokenizer.model", "generation_config.json",
         "chat_template.jinja", "LICENSE"]
    )  # fmt: skip
    assert raw(tmp_path / "out" / "model.safetensors") == raw(source / "mine.safetensors")


def test_places_that_would_be_a_loss_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "models" / "source", weights(SIZES, 1), config(SIZES))
    base = save_model(tmp_path / "base", {"w": torch.ones(2, 2)}, config(SIZES))
    plan = plan_checkpoint(open_checkpoint(source))
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    places = ["models/source", "models", "models/source/out", "link", "link/out", "base", "base/x/y", "other", "."]
    for place in places:
        with pytest.raises(OutputPathError):
            check_model_directory(plan, tmp_path / place, [base], force=True)
    check_model_directory(plan, tmp_path / "models" / "out", [base], force=False)
    single = plan_checkpoint(open_checkpoint(source / "model.safetensors"))
    check_model_directory(single, source / "out", force=False)


def test_force_replaces_a_model_and_nothing_more(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", weights(SIZES, 1), config(SIZES))
    plan = plan_checkpoint(open_checkpoint(source))
    target = tmp_path / "out"
    write(source, target, {})
    with pytest.raises(OutputPathError, match="--force"):
        check_model_directory(plan, target, force=False)
    check_model_directory(plan, target, force=True)
    for name in ("letters/", "model-Q4_K_M.gguf", "adapter_model.safetensors", "pytorch_model.bin", ".git/"):
        (target / name).mkdir() if name.endswith("/") else (target / name).write_text("precious")
        with pytest.raises(OutputPathError, match=f"would delete {name.strip('/')}"):
            check_model_directory(plan, target, force=True)
        (target / name).rmdir() if name.endswith("/") else (target / name).unlink()
    (target / "config.json").unlink()
    with pytest.raises(OutputPathError, match="no model"):
        check_model_directory(plan, target, force=True)

"""`convert adapter` and what says which model an adapter is for. Oracles: the contract (found through --base or beside
the adapter; config.json or a GGUF header is enough; exit statuses), and PEFT's formula by way of the same conversion
with the whole model at hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf_bytes import LITTLE
from gguf_models import finish, put, write_gguf_adapter, write_gguf_model
from models import Sizes, adapter_config, config, pairs, save_adapter, weights
from typer.testing import CliRunner

from safelora_gguf.cli import app

SIZES = Sizes(hidden=64, ffn=96, layers=2)
SETTINGS = config(SIZES)


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["convert", "adapter", *map(str, arguments), "--json"])
    return {"exit": result.exit_code, **json.loads(result.stdout)}


def refused(*arguments: object) -> tuple[str, str]:
    told = run(*arguments)
    assert told["exit"] == 3
    return told["error"]["kind"], told["error"]["message"]


def configured(root: Path, **changed: Any) -> Path:
    """A model of which only config.json is there; a value of None takes a key out."""
    root.mkdir(parents=True)
    settings = {key: value for key, value in {**SETTINGS, **changed}.items() if value is not None}
    (root / "config.json").write_text(json.dumps(settings))
    return root


def peft(root: Path, modules: Mapping[str, tuple[int, int]] | None = None) -> Path:
    return save_adapter(root, pairs(modules or SIZES.modules(), 3), adapter_config())


def whole_model(path: Path) -> Path:
    return write_gguf_model(path, weights(SIZES, 1), SETTINGS)


def tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("modules", "changed"),
    [
        (None, {"num_key_value_heads": 4}),
        ({"model.layers.9.self_attn.q_proj": (64, 64)}, {}),
        ({"model.layers.1.self_attn.q_proj": (128, 128)}, {}),
        ({"model.layers.1.mlp.up_proj": (95, 64)}, {}),
        ({"model.layers.1.block_sparse_moe.experts.3.w1": (90, 60)}, {"num_local_experts": 4}),
        ({"model.layers.1.block_sparse_moe.experts.3.w2": (60, 90)}, {"num_local_experts": 4}),
    ],
)
def test_a_config_alone_gives_another_model_away(
    modules: dict[str, tuple[int, int]] | None, changed: dict[str, int], tmp_path: Path
) -> None:
    """Whichever way the adapter goes, and from either layout; with the config that it is for it does."""
    source = peft(tmp_path / "adapter", modules)
    wrong = configured(tmp_path / "wrong", **changed)
    for out in ("out.gguf", "out"):
        kind, message = refused(source, "--out", tmp_path / out, "--base", wrong)
        assert kind == "mismatch" and "--base" in message
        assert not (tmp_path / out).exists()
    if modules is None:
        in_gguf = write_gguf_adapter(tmp_path / "adapter.gguf", pairs(SIZES.modules(), 3), SETTINGS)
        for out in ("again.gguf", "again"):
            assert refused(in_gguf, "--out", tmp_path / out, "--base", wrong)[0] == "mismatch"
            assert run(in_gguf, "--out", tmp_path / out, "--base", configured(tmp_path / f"right-{out}"))["exit"] == 0


def test_a_gguf_header_alone_will_do(tmp_path: Path) -> None:
    """The first bytes of a file, as a download that was stopped leaves them: cut off in the data, or before it."""
    source, whole = peft(tmp_path / "adapter"), whole_model(tmp_path / "whole.gguf")
    assert run(source, "--out", tmp_path / "exact.gguf", "--base", whole)["exit"] == 0
    data, start = whole.read_bytes(), GGUFReader(whole).data_offset
    for length in (start, start + 1000, len(data) - 1):
        (tmp_path / "part.gguf").write_bytes(data[:length])
        out = tmp_path / f"{length}.gguf"
        assert run(source, "--out", out, "--base", tmp_path / "part.gguf", "--force")["exit"] == 0
        assert tensors(out) == tensors(tmp_path / "exact.gguf")
    other = peft(tmp_path / "other", {"model.layers.0.self_attn.q_proj": (64, 128)})
    kind, message = refused(other, "--out", tmp_path / "out.gguf", "--base", tmp_path / "part.gguf")
    assert kind == "mismatch" and "another model" in message
    (tmp_path / "part.gguf").write_bytes(data[: start // 2])
    assert refused(source, "--out", tmp_path / "out.gguf", "--base", tmp_path / "part.gguf")[0] == "format"


def test_other_commands_want_the_whole_file(tmp_path: Path) -> None:
    whole = whole_model(tmp_path / "whole.gguf")
    (tmp_path / "part.gguf").write_bytes(whole.read_bytes()[: GGUFReader(whole).data_offset])
    adapter = peft(tmp_path / "adapter")
    options = ["--base", whole, "--aligned", tmp_path / "part.gguf", "--adapter", adapter, "--out", tmp_path / "o.gguf"]
    for command in (
        ["project", *options],
        ["inspect", tmp_path / "part.gguf"],
        ["smoke", "--model", tmp_path / "part.gguf"],
    ):
        result = CliRunner().invoke(app, [*map(str, command), "--json"])
        assert result.exit_code == 3 and "truncated" in json.loads(result.stdout)["error"]["message"]


def test_one_shard_says_as_much_as_its_header(tmp_path: Path) -> None:
    """Of a split model the first file has all metadata and some of the tensors."""
    writer = GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    for layer in range(2):
        for name in ("attn_output", "ffn_up"):
            put(writer, f"blk.{layer}.{name}.weight", torch.zeros(64, 64).numpy())
    finish(writer)
    first, second = (tmp_path / f"model-0000{number}-of-00002.gguf" for number in (1, 2))
    later = second.read_bytes()
    second.unlink()
    assert run(peft(tmp_path / "adapter"), "--out", tmp_path / "out.gguf", "--base", first)["exit"] == 0
    wrong = peft(tmp_path / "wrong", {"model.layers.2.mlp.up_proj": (96, 64)})
    assert refused(wrong, "--out", tmp_path / "no.gguf", "--base", first)[0] == "mismatch"
    second.write_bytes(later)
    first.unlink()
    kind, message = refused(wrong, "--out", tmp_path / "no.gguf", "--base", second)
    assert kind == "format" and "name the first shard" in message


def test_a_gguf_model_beside_the_adapter_is_found(tmp_path: Path) -> None:
    source = peft(tmp_path / "poet")
    assert run(source, "--out", tmp_path / "exact.gguf", "--base", whole_model(tmp_path / "whole.gguf"))["exit"] == 0
    whole_model(source / "model.gguf")
    write_gguf_adapter(source / "poet.gguf", pairs(SIZES.modules(), 3), SETTINGS)
    (source / "broken.gguf").write_bytes(b"GGUF and no more")
    (source / "mmproj.gguf").write_bytes(
        LITTLE.file([("general.type", LITTLE.text("mmproj")), ("general.architecture", LITTLE.text("clip"))])
    )
    assert run(source, "--out", tmp_path / "out.gguf")["exit"] == 0
    assert tensors(tmp_path / "out.gguf") == tensors(tmp_path / "exact.gguf")
    # So it is for a GGUF adapter, whose rows can't go back without the heads.
    assert run(source / "poet.gguf", "--out", tmp_path / "back")["exit"] == 0
    kind, _ = refused(source, "--out", source / "model.gguf", "--force")
    assert kind == "output", "the model must not be replaced"


def test_of_several_models_none_is_taken(tmp_path: Path) -> None:
    source = peft(tmp_path / "poet")
    adapter = write_gguf_adapter(source / "poet.gguf", pairs(SIZES.modules(), 3), SETTINGS)
    for name in ("a", "b"):
        whole_model(source / f"{name}.gguf")
    kind, message = refused(source, "--out", tmp_path / "out.gguf")
    assert kind == "missing" and "several GGUF models (a.gguf, b.gguf)" in message and "--base" in message
    kind, message = refused(adapter, "--out", tmp_path / "back")
    assert kind == "unsupported" and "several GGUF models (a.gguf, b.gguf)" in message and "--base" in message
    assert run(adapter, "--out", tmp_path / "same.gguf")["exit"] == 0, "needs no model"
    (source / "config.json").write_text(json.dumps(SETTINGS))
    assert run(source, "--out", tmp_path / "out.gguf")["exit"] == 0


def test_a_gguf_adapter_passes_over_models_of_others(tmp_path: Path) -> None:
    """Files in one folder need not belong together, and its own format needs no model."""
    place = tmp_path / "models"
    place.mkdir()
    adapter = write_gguf_adapter(place / "poet.gguf", pairs(SIZES.modules(), 3), SETTINGS)
    keys = [("general.architecture", LITTLE.text("llama")), ("llama.embedding_length", LITTLE.uint32(128))]
    (place / "other-width.gguf").write_bytes(LITTLE.file(keys))
    (place / "other-kind.gguf").write_bytes(LITTLE.file([("general.architecture", LITTLE.text("qwen3"))]))
    assert run(adapter, "--out", tmp_path / "same.gguf")["exit"] == 0
    whole_model(place / "model.gguf")
    assert run(adapter, "--out", tmp_path / "back")["exit"] == 0


def test_a_crowded_directory_is_not_searched(tmp_path: Path) -> None:
    source = peft(tmp_path / "poet")
    model = whole_model(source / "model.gguf")
    for number in range(48):
        shutil.copy(source / "adapter_config.json", source / f"{number}.gguf")
    assert refused(source, "--out", tmp_path / "out.gguf")[0] == "missing"
    assert run(source, "--out", tmp_path / "out.gguf", "--base", model)["exit"] == 0


HEAD = {"lm_head": (SIZES.vocab, SIZES.hidden)}


def test_tied_embeddings_that_are_assumed_are_told_as_such(tmp_path: Path) -> None:
    source = peft(tmp_path / "adapter", HEAD)
    silent = configured(tmp_path / "silent", tie_word_embeddings=None, model_type=None)
    kind, message = refused(source, "--out", tmp_path / "out.gguf", "--base", silent)
    assert kind == "unsupported" and "assumed" in message and '"tie_word_embeddings": false' in message
    assert str(silent / "config.json") in message
    tied = configured(tmp_path / "tied", tie_word_embeddings=True)
    assert "assumed" not in refused(source, "--out", tmp_path / "out.gguf", "--base", tied)[1]
    header = write_gguf_model(tmp_path / "header.gguf", {}, SETTINGS)
    kind, message = refused(source, "--out", tmp_path / "out.gguf", "--base", header)
    assert kind == "unsupported" and "assumed" in message and "config.json" in message
    llama = configured(tmp_path / "llama", tie_word_embeddings=None)  # whose class has two tables if nothing is said
    for base in (configured(tmp_path / "untied"), llama, whole_model(tmp_path / "whole.gguf")):
        assert run(source, "--out", tmp_path / "out.gguf", "--base", base, "--force")["exit"] == 0
    assert run(source, "--out", tmp_path / "peft", "--base", silent)["exit"] == 0, "PEFT can keep it"


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_a_base_with_fused_weights_is_told_as_such(form: str, tmp_path: Path) -> None:
    """As llama.cpp's converter writes it with --fuse-qkv: the rows of q, k and v one below the other."""
    base, values = tmp_path / "fused.gguf", weights(SIZES, 1)
    writer = GGUFWriter(base, "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for layer in range(2):
        rows = [values[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"]
        put(writer, f"blk.{layer}.attn_qkv.weight", torch.cat(rows).numpy())
        put(writer, f"blk.{layer}.attn_output.weight", values[f"model.layers.{layer}.self_attn.o_proj.weight"].numpy())
    finish(writer)
    modules = {"model.layers.0.self_attn.v_proj": (32, 64), "model.layers.0.self_attn.o_proj": (64, 64)}
    source = peft(tmp_path / "adapter", modules)
    if form == "gguf":
        source = write_gguf_adapter(tmp_path / "adapter.gguf", pairs(modules, 3), SETTINGS)
    kind, message = refused(source, "--out", tmp_path / "out.gguf", "--base", base)
    assert kind == "mismatch" and "blk.0.attn_qkv.weight" in message
    assert "--fuse-qkv" in message and "merge" in message

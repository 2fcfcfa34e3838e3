"""Oracle: the contract. Bad input: exit 3, one message, no traceback, and not a byte written.

Most cases run in this process through the command line's own entry point, since a fresh interpreter imports
torch for a second; one runs as a user would.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Sizes, Trio, adapter_config, config, moved, pairs, save_adapter, save_model, save_sharded, weights
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from safelora_gguf.cli import app

Damage = Callable[[Trio], None]


def _project(trio: Trio, out: Path, *more: object) -> Result:
    references = ("--base", trio.base, "--aligned", trio.aligned, "--adapter", trio.adapter)
    return CliRunner().invoke(app, ["project", *map(str, (*references, "--out", out, "--device", "cpu", *more))])


def _edit_json(file: Path, **changes: Any) -> None:
    data = json.loads(file.read_text())
    data.update(changes)
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def _edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def _adapter_setting(**changes: Any) -> Damage:
    return lambda trio: _edit_json(trio.adapter / "adapter_config.json", **changes)


def _adapter_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    return lambda trio: _edit_tensors(trio.adapter / "adapter_model.safetensors", change)


def _model_tensors(which: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    return lambda trio: _edit_tensors(getattr(trio, which) / "model.safetensors", change)


def _poison(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return change


def _drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _cut(path: str, keep: float) -> Damage:
    def damage(trio: Trio) -> None:
        file = trio.base.parent / path
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])

    return damage


def _remove(path: str) -> Damage:
    return lambda trio: (trio.base.parent / path).unlink()


def _sharded(index_change: Callable[[dict[str, Any], Path], None]) -> Damage:
    def damage(trio: Trio) -> None:
        (trio.base / "model.safetensors").unlink()
        (trio.base / "config.json").unlink()
        trio.base.rmdir()
        save_sharded(trio.base, trio.base_tensors, config(trio.sizes))
        index = trio.base / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        index_change(data, trio.base)
        index.write_text(json.dumps(data))

    return damage


def _point_outside(index: dict[str, Any], directory: Path) -> None:
    (directory / "model-00001-of-00002.safetensors").rename(directory.parent / "elsewhere.safetensors")
    for tensor, shard in index["weight_map"].items():
        if shard.startswith("model-00001"):
            index["weight_map"][tensor] = "../elsewhere.safetensors"


def _other_model(trio: Trio) -> None:
    sizes = Sizes(hidden=32, ffn=48)
    for file in trio.adapter.iterdir():
        file.unlink()
    trio.adapter.rmdir()
    save_adapter(trio.adapter, pairs(sizes.modules(), 3), adapter_config())


def _deeper_model(trio: Trio) -> None:
    for file in trio.adapter.iterdir():
        file.unlink()
    trio.adapter.rmdir()
    save_adapter(trio.adapter, pairs(Sizes(layers=3).modules(), 3), adapter_config())


def _wider_aligned(trio: Trio) -> None:
    for file in trio.aligned.iterdir():
        file.unlink()
    trio.aligned.rmdir()
    sizes = Sizes(ffn=128)
    save_model(trio.aligned, moved(weights(sizes, 1), 2), config(sizes))


def _identical(trio: Trio) -> None:
    (trio.aligned / "model.safetensors").write_bytes((trio.base / "model.safetensors").read_bytes())


def _give_header(data: bytes) -> Damage:
    return lambda trio: (trio.base / "model.safetensors").write_bytes(data)  # type: ignore[arg-type, return-value]


def _header(table: object) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text


def _directory_in_place(trio: Trio) -> None:
    (trio.base / "model.safetensors").unlink()
    (trio.base / "model.safetensors").mkdir()


def _link_loop(trio: Trio) -> None:
    (trio.base / "model.safetensors").unlink()
    (trio.base / "model.safetensors").symlink_to("model.safetensors")


Q = "model.layers.0.self_attn.q_proj.weight"
QA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
QB = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
OVERLAP = {
    "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
}

CASES: dict[str, tuple[Damage, str]] = {
    "base file missing": (_remove("base/model.safetensors"), "neither model.safetensors nor"),
    "config missing": (_remove("base/config.json"), "no such file"),
    "adapter config missing": (_remove("adapter/adapter_config.json"), "no such file"),
    "adapter weights missing": (_remove("adapter/adapter_model.safetensors"), "no such file"),
    "truncated data": (_cut("base/model.safetensors", 0.7), "truncated"),
    "truncated header": (_cut("aligned/model.safetensors", 0.001), "truncated"),
    "truncated adapter": (_cut("adapter/adapter_model.safetensors", 0.9), "truncated"),
    "empty file": (_cut("base/model.safetensors", 0), "0 bytes"),
    "directory in place of a file": (_directory_in_place, "directory"),
    "symlink loop": (_link_loop, "symbolic links|neither model"),
    "header of 2^63 bytes": (_give_header(struct.pack("<Q", 1 << 63) + b"{}"), "header of 9223372036854775808"),
    "header is no JSON": (_give_header(struct.pack("<Q", 4) + b"\xff{}}"), "not UTF-8"),
    "header is a list": (_give_header(_header([])), "expected a JSON object"),
    "header nested": (_give_header(struct.pack("<Q", 200000) + b"[" * 200000), "nested"),
    "shape overflows": (
        _give_header(_header({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}})),
        "needs",
    ),
    "overlapping tensors": (_give_header(_header(OVERLAP) + b"123456"), "overlaps"),
    "unknown type": (
        _give_header(_header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}) + b"1234"),
        "does not define",
    ),
    "missing shard": (_sharded(lambda _, at: (at / "model-00002-of-00002.safetensors").unlink()), "is missing"),
    "index points outside": (_sharded(_point_outside), "in this directory"),
    "index lies about a tensor": (
        _sharded(lambda index, _: index["weight_map"].update({"lost": "model-00001-of-00002.safetensors"})),
        "which lacks it",
    ),
    "index without weight_map": (_sharded(lambda index, _: index.clear()), "weight_map"),
    "different shapes": (_wider_aligned, "same model before and after"),
    "identical references": (_identical, "must differ"),
    "adapter for a smaller model": (_other_model, "for another model"),
    "adapter for a deeper model": (_deeper_model, "for another model"),
    "A without B": (_adapter_tensors(lambda tensors: _drop(tensors, QB)), "no lora_B"),
    "B without A": (_adapter_tensors(lambda tensors: _drop(tensors, QA)), "no lora_A"),
    "NaN in base": (_model_tensors("base", _poison(Q, float("nan"))), "NaN or Inf"),
    "Inf in aligned": (_model_tensors("aligned", _poison(Q, float("inf"))), "NaN or Inf"),
    "NaN in A": (_adapter_tensors(_poison(QA, float("nan"))), "lora_A.weight: holds NaN"),
    "Inf in B": (_adapter_tensors(_poison(QB, float("-inf"))), "lora_B.weight: holds NaN"),
    "rank contradicts the config": (_adapter_setting(r=5), "do not belong together"),
    "DoRA": (_adapter_setting(use_dora=True), "DoRA"),
    "DoRA magnitudes": (
        _adapter_tensors(
            lambda tensors: tensors.update({QA.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)})
        ),
        "DoRA",
    ),
    "a resized head saved along": (
        _adapter_tensors(lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.ones(4, 4)})),
        "vocabulary was resized",
    ),
    "not gathered": (_adapter_tensors(lambda t: t.update({QA: torch.empty(0)})), "gathering"),
    "IA3": (_adapter_setting(peft_type="IA3"), "only LORA"),
    "PiSSA": (_adapter_setting(init_lora_weights="pissa"), "pissa"),
    "layer_replication": (_adapter_setting(layer_replication=[[0, 2]]), "layer_replication"),
    "one module under two names": (
        _model_tensors("base", lambda t: t.update({Q.replace("model.", "model.language_model.", 1): t[Q].clone()})),
        "stands twice",
    ),
    "alpha beyond floats": (_adapter_setting(lora_alpha=10**400), "expected a number"),
    "alpha is text": (_adapter_setting(lora_alpha="8"), "expected a number"),
    "alpha is infinite": (_adapter_setting(lora_alpha=float("inf")), "expected a number"),
    "pattern without end": (_adapter_setting(rank_pattern={"(.*)*(.*)*(.*)*(.*)*x": 4}), "backtracks"),
    "pattern without end in alpha": (_adapter_setting(alpha_pattern={"((a|o|e|l|.)+)+[0-9]": 4}), "backtracks"),
    "broken pattern": (_adapter_setting(rank_pattern={"(": 4}), "no regular expression"),
    "unknown architecture": (lambda trio: _rename_architecture(trio, "FooForCausalLM"), "FooForCausalLM"),
    "no architecture": (lambda trio: _rename_architecture(trio, ...), "architectures"),
    "other family": (
        lambda trio: _edit_json(trio.aligned / "config.json", architectures=["Qwen2ForCausalLM"]),
        "same model before and after",
    ),
    "config is a list": (lambda trio: (trio.base / "config.json").write_text("[]") and None, "expected a JSON object"),
    "heads are missing": (
        lambda trio: _edit_json(trio.aligned / "config.json", num_attention_heads=...),
        "attention heads",
    ),
    "heads don't divide": (lambda trio: _edit_json(trio.aligned / "config.json", num_attention_heads=5), "heads"),
}


def _rename_architecture(trio: Trio, name: Any) -> None:
    for model in (trio.base, trio.aligned):
        _edit_json(model / "config.json", architectures=... if name is ... else [name])


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_exit_3_with_one_message_and_nothing_written(case: str, trio: Trio, tmp_path: Path) -> None:
    damage, expected = CASES[case]
    damage(trio)
    before = sorted(str(file) for file in tmp_path.rglob("*"))

    result = _project(trio, tmp_path / "out.gguf", "--json")

    assert result.exit_code == 3, result.output
    assert len(result.stderr.splitlines()) == 1
    assert re.search(expected, result.stderr)
    assert "Traceback" not in result.output
    told = json.loads(result.stdout)
    assert told["command"] == "project"
    assert set(told["error"]) == {"kind", "message", "file", "tensor"}
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_a_missing_directory(trio: Trio, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    result = _project(trio, tmp_path / "out.gguf")
    assert result.exit_code == 3
    assert re.search(r"base: the model: no such file", result.stderr)
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["out.gguf", "out"])
def test_an_existing_output_is_kept(name: str, trio: Trio, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"precious")
    result = _project(trio, tmp_path / name)
    assert result.exit_code == 3
    assert "exists" in result.stderr
    assert (tmp_path / name).read_bytes() == b"precious"


def test_a_name_too_long(trio: Trio, tmp_path: Path) -> None:
    result = _project(trio, tmp_path / ("x" * 300 + ".gguf"))
    assert result.exit_code == 3
    assert "too long" in result.stderr


def test_heads_are_checked_by_a_dry_run_too(trio: Trio, tmp_path: Path) -> None:
    _edit_json(trio.aligned / "config.json", num_attention_heads=5)
    result = _project(trio, tmp_path / "out.gguf", "--dry-run")
    assert result.exit_code == 3
    assert "config.json" in result.stderr


@pytest.mark.parametrize("place", ["directory.json", "out.gguf/report.json", "adapter/report.json", "base/config.json"])
def test_a_bad_place_for_the_report_is_told_before_anything_is_written(place: str, trio: Trio, tmp_path: Path) -> None:
    (tmp_path / "directory.json").mkdir()
    before = {str(file): file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    result = _project(trio, tmp_path / "out.gguf", "--force", "--report", tmp_path / place)
    assert result.exit_code == 3, result.output
    assert {str(file): file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_an_output_that_would_swallow_an_input(trio: Trio, tmp_path: Path) -> None:
    result = _project(trio, trio.adapter, "--force")
    assert result.exit_code == 3
    assert "would replace" in result.stderr
    assert (trio.adapter / "adapter_config.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place(trio: Trio, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    assert _project(trio, tmp_path / "closed" / "out.gguf").exit_code == 3


@pytest.mark.parametrize(
    "options",
    [
        ("--threshold", "0.3", "--number", "3"),
        ("--all", "--ratio", "0.5"),
        ("--threshold", "7"),
        ("--number", "-1"),
        ("--operator", "magic"),
        ("--rank", "3"),
        ("--operator", "subspace", "--rank", "0"),
        ("--operator", "subspace", "--rank", "33"),
        ("--strength", "0"),
        ("--strength", "2"),
        ("--outtype", "q4_k"),
        ("--to", "onnx"),
        ("--device", "tpu"),
        ("--device", "cuda:99"),
        ("--report", "report.pdf"),
        ("--nonsense",),
    ],
)
def test_wrong_usage_is_exit_2(options: tuple[str, ...], trio: Trio, tmp_path: Path) -> None:
    result = _project(trio, tmp_path / "out.gguf", *options)
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "out.gguf").exists()


def test_q8_0_is_not_for_peft(trio: Trio, tmp_path: Path) -> None:
    assert _project(trio, tmp_path / "out", "--outtype", "q8_0").exit_code == 2

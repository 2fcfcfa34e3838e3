"""Oracles: what was saved; PEFT's and mlx-lm's own formulas; and the readers of the other commands, all of whose
refusals must be told at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import Sizes, adapter_config, config, pairs, save_adapter, save_model, save_sharded, weights

from converters.adapters.peft import open_peft
from converters.checkpoint import open_checkpoint
from converters.errors import FileMissingError, FormatError, UnsupportedError
from converters.inspection import Inspection, inspect_path

SIZES = Sizes()
MODULE = "model.layers.0.self_attn.q_proj"


def told(found: Inspection) -> str:
    return "\n".join(found.warnings)


# Hugging Face models


def test_a_checkpoint_whole_sharded_and_by_its_file(tmp_path: Path) -> None:
    tensors = weights(SIZES, 1)
    plain = save_model(tmp_path / "plain", tensors, config(SIZES))
    for path in (plain, plain / "model.safetensors", save_sharded(tmp_path / "sharded", tensors, config(SIZES))):
        found, model = inspect_path(path), open_checkpoint(path)
        assert {t.name: t.shape for t in found.tensors} == {name: tuple(t.shape) for name, t in tensors.items()}
        assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
        assert (found.kind, found.format, found.architecture) == ("model", "safetensors", "LlamaForCausalLM")
        assert (found.fingerprint, found.nbytes) == (model.fingerprint(), model.nbytes)
        assert found.metadata["hidden_size"] == SIZES.hidden and found.warnings == ()
    assert len(found.files) == 2


def test_a_model_without_its_configuration_or_class(tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", weights(SIZES, 1), {"hidden_size": 64})
    found = inspect_path(plain)
    assert found.architecture is None and 'has no "architectures"' in told(found)
    (plain / "config.json").unlink()
    for path in (plain, plain / "model.safetensors"):
        found = inspect_path(path)
        assert found.architecture is None and "config.json: " in told(found) and found.tensors
        assert found.metadata == {"__metadata__": {"format": "pt"}}


def test_files_without_an_index_are_listed(tmp_path: Path) -> None:
    sharded = save_sharded(tmp_path / "m", weights(SIZES, 1), config(SIZES))
    (sharded / "model.safetensors.index.json").unlink()
    found = inspect_path(sharded)
    assert "2 .safetensors files and no index" in told(found) and len(found.files) == 2
    assert found.architecture == "LlamaForCausalLM"


def test_quantized_checkpoints_and_odd_architectures(tmp_path: Path) -> None:
    tensors = {
        "model.a.weight": torch.zeros(4, 4, dtype=torch.uint8),
        "model.b.qweight": torch.zeros(4, dtype=torch.int32),
    }
    found = inspect_path(save_model(tmp_path / "m", tensors, config(SIZES, "OddForCausalLM")))
    assert "model.a.weight: stored as U8" in told(found) and "model.b.qweight: stored as I32" in told(found)
    assert any("OddForCausalLM has no table" in note for note in found.notes)


def test_pickled_models_and_adapters_are_told_and_never_opened(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config(SIZES)))
    (model / "pytorch_model.bin").write_bytes(b"no pickle at all")
    found = inspect_path(model)
    assert (found.kind, found.format, found.architecture) == ("model", "pickle", "LlamaForCausalLM")
    assert "pickle" in told(found)
    adapter = save_adapter(tmp_path / "adapter", pairs(SIZES.modules(), 1), adapter_config(use_qalora=True))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    found = inspect_path(adapter)
    assert (found.kind, found.format, found.tensors) == ("adapter", "peft", ())
    assert len(found.warnings) == 2
    assert "uses QALoRA" in told(found) and "adapter_model.bin: is a pickle" in told(found)
    (adapter / "adapter_config.json").write_text(json.dumps(adapter_config()))
    with pytest.raises(UnsupportedError) as refusal:
        open_peft(adapter)
    assert inspect_path(adapter).warnings == (f"adapter_model.bin: {refusal.value.message}",)


def test_a_byte_order_mark_in_front_of_json_is_passed_over(tmp_path: Path) -> None:
    """Oracle: the same directories without it, which editors on Windows put there."""
    model = save_sharded(tmp_path / "model", weights(Sizes(), 1), config(Sizes()))
    adapter = save_adapter(tmp_path / "adapter", pairs({MODULE: (64, 64)}, 1), adapter_config())
    before = open_checkpoint(model).config, open_checkpoint(model).infos, open_peft(adapter).pairs
    for file in (*model.glob("*.json"), adapter / "adapter_config.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert (open_checkpoint(model).config, open_checkpoint(model).infos, open_peft(adapter).pairs) == before
    assert inspect_path(adapter).warnings == () and inspect_path(model).warnings == ()
    config_file = adapter / "adapter_config.json"
    config_file.write_bytes(b"\xef\xbb\xbf" + config_file.read_bytes())  # a second one is no JSON
    with pytest.raises(FormatError, match="no valid JSON"):
        open_peft(adapter)


# What can't be read


def test_what_is_damaged_or_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "config only").mkdir()
    (tmp_path / "config only" / "adapter_config.json").write_text("{}")
    damaged = save_adapter(tmp_path / "damaged", pairs({MODULE: (64, 64)}, 1), adapter_config())
    (damaged / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    broken = save_adapter(tmp_path / "broken", pairs({MODULE: (64, 64)}, 1), adapter_config())
    (broken / "adapter_config.json").write_text("{")
    lost = save_sharded(tmp_path / "lost", weights(SIZES, 1), config(SIZES))
    (lost / "model-00002-of-00002.safetensors").unlink()
    for name, error in (
        ("empty", FileMissingError), ("config only", FileMissingError), ("lost", FileMissingError),
        ("damaged", FormatError), ("broken", FormatError),
    ):  # fmt: skip
        with pytest.raises(error):
            inspect_path(tmp_path / name)

"""`merge` as a whole: files in, files and a report out.

Oracles: the safetensors and gguf packages, which read what was written; PEFT's formula in float64; the command line
contract (inputs, output, planned_output, what may be overwritten, same bytes from the same inputs).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import models
import pytest
import torch
from gguf_models import write_gguf_model
from safetensors.torch import load_file

from converters.errors import OutputPathError, UnsupportedError, UsageError
from converters.ggml import QType
from safelora_gguf.merge import merge_adapters
from safelora_gguf.report import dump_json

SIZES = models.Sizes()
SETTINGS = models.config(SIZES)
MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.save_model(tmp_path / "model", models.weights(SIZES, 1, torch.bfloat16), SETTINGS)


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return write_gguf_model(tmp_path / "model.gguf", models.weights(SIZES, 1), SETTINGS, QType.Q8_0)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    pairs = models.pairs({MODULE: SIZES.modules()[MODULE]}, 3)
    return models.save_adapter(tmp_path / "adapter", pairs, models.adapter_config())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_directory(model: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge_adapters(model, [(adapter, 0.5)], tmp_path / "out", device="cpu")
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "out"))
    a, b = load_file(adapter / "adapter_model.safetensors").values()
    wanted = before[f"{MODULE}.weight"].double() + 0.5 * 2 * b.double() @ a.double()
    assert torch.equal(after[f"{MODULE}.weight"], wanted.to(torch.bfloat16))  # rounded once, after everything is added
    assert all(torch.equal(after[name], before[name]) for name in before if name != f"{MODULE}.weight")
    told = report.to_json()
    assert json.loads(dump_json(told)) == told
    assert [(entry["role"], entry.get("scale")) for entry in told["inputs"]] == [("model", None), ("adapter", 0.5)]
    assert told["output"]["sha256"] == digest(tmp_path / "out" / "model.safetensors")
    (tensor,) = told["tensors"]
    assert (tensor["name"], tensor["type"], tensor["adapters"]) == (f"{MODULE}.weight", "BF16", [0])
    assert tensor["shape"] == list(SIZES.modules()[MODULE])
    assert 0 < tensor["stored_error"] < 0.004


def test_a_quantized_file(quantized: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge_adapters(quantized, [(adapter, 1.0)], tmp_path / "out.gguf", device="cpu")
    before, after = (gguf.GGUFReader(path) for path in (quantized, tmp_path / "out.gguf"))
    changed = [one.name for one, two in zip(before.tensors, after.tensors, strict=True)
               if one.data.tobytes() != two.data.tobytes()]  # fmt: skip
    assert changed == ["blk.0.ffn_up.weight"] == [tensor.name for tensor in report.tensors]
    assert after.fields["safelora.merge.0.scale"].contents() == 1.0
    assert after.fields["safelora.model.fingerprint"].contents() == report.inputs[0].fingerprint
    assert {str(path) for path in (tmp_path / "out.gguf",)} == {report.output.path if report.output else ""}


def test_the_same_bytes_again(quantized: Path, model: Path, adapter: Path, tmp_path: Path) -> None:
    for number in range(2):
        merge_adapters(quantized, [(adapter, 1.0)], tmp_path / f"{number}.gguf", device="cpu")
        merge_adapters(model, [(adapter, 1.0)], tmp_path / f"{number}", device="cpu")
    assert digest(tmp_path / "0.gguf") == digest(tmp_path / "1.gguf")
    assert digest(tmp_path / "0" / "model.safetensors") == digest(tmp_path / "1" / "model.safetensors")


def test_a_dry_run_writes_nothing(model: Path, adapter: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = merge_adapters(model, [(adapter, 1.0)], tmp_path / "out", dry_run=True, device="cpu")
    assert sorted(tmp_path.rglob("*")) == before
    told = report.to_json()
    assert "output" not in told
    assert told["planned_output"]["path"] == str(tmp_path / "out")
    assert told["planned_output"]["bytes"] > 0
    assert [(tensor["name"], tensor["delta_norm"]) for tensor in told["tensors"]] == [(f"{MODULE}.weight", None)]


def test_outputs_and_inputs_are_not_overwritten(quantized: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"mine")
    with pytest.raises(OutputPathError):
        merge_adapters(quantized, [(adapter, 1.0)], tmp_path / "out.gguf", device="cpu")
    assert (tmp_path / "out.gguf").read_bytes() == b"mine"
    merge_adapters(quantized, [(adapter, 1.0)], tmp_path / "out.gguf", force=True, device="cpu")
    with pytest.raises(OutputPathError):
        merge_adapters(tmp_path / "out.gguf", [(adapter, 1.0)], tmp_path / "out.gguf", force=True, device="cpu")


def test_strict_refuses_what_is_missing(model: Path, tmp_path: Path) -> None:
    """The configuration announces what the file lacks."""
    pairs = models.pairs({MODULE: SIZES.modules()[MODULE]}, 3)
    config = models.adapter_config(modules_to_save=["lm_head"])
    adapter = models.save_adapter(tmp_path / "adapter", pairs, config)
    report = merge_adapters(model, [(adapter, 1.0)], tmp_path / "out", device="cpu")
    assert any("lm_head (modules_to_save)" in loss for loss in report.losses)
    with pytest.raises(UnsupportedError, match=r"--strict forbids: .*lm_head"):
        merge_adapters(model, [(adapter, 1.0)], tmp_path / "strict", strict=True, device="cpu")
    assert not (tmp_path / "strict").exists()


def test_strict_passes_what_merging_covers(model: Path, tmp_path: Path) -> None:
    """Whole tensors are a loss of a conversion, and none of a merge."""
    pairs = models.pairs({MODULE: SIZES.modules()[MODULE]}, 3)
    whole = {"base_model.model.model.norm.weight": torch.ones(SIZES.hidden)}
    config = models.adapter_config(modules_to_save=["norm"])
    adapter = models.save_adapter(tmp_path / "adapter", {**pairs, **whole}, config)
    report = merge_adapters(model, [(adapter, 1.0)], tmp_path / "out", strict=True, device="cpu")
    assert report.losses == ()


def test_quantized_again_only_by_permission(quantized: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises((UsageError, UnsupportedError), match="requantize"):
        merge_adapters(quantized, [(adapter, 1.0)], tmp_path / "out.gguf", outtype="f16", device="cpu")
    report = merge_adapters(
        quantized, [(adapter, 1.0)], tmp_path / "out.gguf", outtype="f16", allow_requantize=True, device="cpu"
    )
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors} == {"F16", "F32"}
    assert report.outtype == "f16"


def test_a_card(model: Path, quantized: Path, adapter: Path, tmp_path: Path) -> None:
    merge_adapters(quantized, [(adapter, 0.5)], tmp_path / "out.gguf", card=True, device="cpu")
    assert "scale 0.5" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.Modelfile").read_text().startswith("#") or "FROM" in (
        tmp_path / "out.Modelfile"
    ).read_text()
    merge_adapters(model, [(adapter, 0.5)], tmp_path / "out", card=True, device="cpu")
    assert "scale 0.5" in (tmp_path / "out" / "README.md").read_text()


def test_no_adapter(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter"):
        merge_adapters(model, [], tmp_path / "out")

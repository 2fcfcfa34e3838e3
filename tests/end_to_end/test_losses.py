"""What of an update a LoRA can't hold, or llama.cpp won't apply. Oracles: the command line contract; llama.cpp's
source; DoRA's formula (arXiv 2402.09353) and Safe LoRA's in numpy's float64."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf_models import write_gguf_model, write_trio
from models import Trio, config
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from converters.errors import UnsupportedError
from converters.opening import open_adapter
from safelora_gguf.cli import app
from safelora_gguf.losses import refuse_losses

QA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
WEIGHTS = "adapter_model.safetensors"


def project(trio: Trio, out: Path, *more: object) -> Result:
    references = ("--base", trio.base, "--aligned", trio.aligned, "--adapter", trio.adapter, "--device", "cpu")
    return CliRunner().invoke(app, ["project", *map(str, (*references, "--out", out, *more))])


def convert(source: Path, out: Path, *more: object) -> Result:
    return CliRunner().invoke(app, ["convert", "adapter", *map(str, (source, "--out", out, *more))])


def with_tensor(name: str, *shape: int) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        save_file({**load_file(adapter / WEIGHTS), name: torch.ones(shape)}, adapter / WEIGHTS)

    return change


def with_setting(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


LOSSES: dict[str, tuple[Callable[[Path], None], str]] = {
    "modules_to_save": (with_tensor("base_model.model.lm_head.modules_to_save.weight", 4, 4), "modules_to_save"),
    "whole head": (with_tensor("base_model.model.lm_head.weight", 4, 4), "lm_head"),
    "trained bias": (with_tensor(QA.replace("lora_A.weight", "bias"), 64), "bias"),
    "lora_bias": (with_setting(lora_bias=True), "lora_bias"),
    "modules_to_save in the config": (with_setting(modules_to_save=["lm_head"]), "modules_to_save"),
    "trained tokens in the config": (with_setting(trainable_token_indices=[1]), "trainable_token_indices"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_under_strict_what_pairs_cannot_hold_is_refused(case: str, trio: Trio, tmp_path: Path) -> None:
    change, expected = LOSSES[case]
    clean = project(trio, tmp_path / "clean.gguf", "--json", "--strict")
    assert (clean.exit_code, clean.stderr, json.loads(clean.stdout)["losses"]) == (0, "", [])
    change(trio.adapter)
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    options = ("--json", "--strict", "--force")
    for more in ((), ("--dry-run",)):
        for told in (
            project(trio, tmp_path / "clean.gguf", *options, *more),
            convert(trio.adapter, tmp_path / "out.gguf", "--base", trio.aligned, *options, *more),
        ):
            assert told.exit_code == 3, told.output
            assert len(told.stderr.splitlines()) == 1
            assert "--strict" in told.stderr and re.search(expected, told.stderr)
            assert json.loads(told.stdout)["error"]["kind"] == "unsupported"
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", LOSSES)
def test_otherwise_it_is_left_out_and_told(case: str, trio: Trio, tmp_path: Path) -> None:
    change, expected = LOSSES[case]
    shapes = {name: tensor.shape for name, tensor in load_file(trio.adapter / WEIGHTS).items()}
    change(trio.adapter)
    for told, out in (
        (project(trio, tmp_path / "1", "--json"), tmp_path / "1"),
        (convert(trio.adapter, tmp_path / "2", "--base", trio.aligned, "--json"), tmp_path / "2"),
    ):
        assert told.exit_code == 0, told.output
        report = json.loads(told.stdout)
        assert any(re.search(expected, loss) for loss in report["losses"])
        assert report["notes"][: len(report["losses"])] == report["losses"]
        assert told.stderr.splitlines() == [f"warning: {loss}" for loss in report["losses"]]
        assert {name: tensor.shape for name, tensor in load_file(out / WEIGHTS).items()} == shapes
    table = convert(trio.adapter, tmp_path / "3.gguf", "--base", trio.aligned)
    assert table.stderr.startswith("warning: ") and report["losses"][0] not in table.stdout
    for quiet in (
        project(trio, tmp_path / "4.gguf", "--quiet"),
        convert(trio.adapter, tmp_path / "5.gguf", "--base", trio.aligned, "--quiet"),
    ):
        assert (quiet.exit_code, quiet.stderr) == (0, "")


def test_many_losses_are_counted(trio: Trio) -> None:
    adapter = open_adapter(trio.adapter)
    with pytest.raises(UnsupportedError, match=r": 2 things .*--strict.*: one; two$"):
        refuse_losses(adapter, ["one.", "two."])
    with pytest.raises(UnsupportedError, match=r": 9 things .*the first is: loss 0$"):
        refuse_losses(adapter, [f"loss {place}" for place in range(9)])
    refuse_losses(adapter, [])


def test_pairs_that_llama_cpp_ignores_are_a_loss(tmp_path: Path) -> None:
    """src/models/deepseek2.cpp gives the latent projections to ggml_mul_mat, and the feed-forward to build_lora_mm."""
    halves = {f"blk.{layer}.{name}.weight": (np.ones((4, 32)), np.ones((64, 4)))
              for layer in range(2) for name in ("attn_q_a", "attn_kv_a_mqa", "ffn_gate")}  # fmt: skip
    _, _, source = write_trio(tmp_path, "deepseek2", {}, halves)
    told = convert(source, tmp_path / "out.gguf", "--json")
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert len(report["losses"]) == 2 and set(report["losses"]) <= set(report["notes"])
    for kind in ("attn_q_a", "attn_kv_a_mqa"):
        loss = next(loss for loss in report["losses"] if f"{kind} " in loss)
        assert "does not apply" in loss and "2" in loss and f"blk.0.{kind}.weight" in loss and "erge" in loss
    names = {tensor.name for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert names == {f"{name}.lora_{half}" for name in halves for half in "ab"}  # written all the same
    strict = convert(source, tmp_path / "strict.gguf", "--strict")
    assert strict.exit_code == 3 and not (tmp_path / "strict.gguf").exists()
    assert "attn_q_a" in strict.stderr and "attn_kv_a_mqa" in strict.stderr


def test_folding_and_rounding_are_no_losses(trio: Trio, tmp_path: Path) -> None:
    with_setting(use_rslora=True, alpha_pattern={"v_proj": 3})(trio.adapter)
    told = convert(
        trio.adapter, tmp_path / "out.gguf", "--base", trio.aligned, "--outtype", "q8_0", "--strict", "--json"
    )
    report = json.loads(told.stdout)
    assert told.exit_code == 0 and report["losses"] == [] and len(report["notes"]) > 1


@pytest.fixture
def dora(trio: Trio) -> Trio:
    """The trio with a DoRA adapter: magnitudes at random around the aligned weights' row lengths."""
    generator = torch.Generator().manual_seed(5)
    tensors = dict(trio.pair_tensors)
    for module in trio.modules:
        lengths = trio.aligned_tensors[f"{module}.weight"].norm(dim=1)
        noise = torch.randn(len(lengths), generator=generator)
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = lengths * (1 + 0.1 * noise)
    save_file(tensors, trio.adapter / WEIGHTS)
    with_setting(use_dora=True)(trio.adapter)
    return replace(trio, pair_tensors=tensors)


def nearest(dora: Trio, module: str, rank: int) -> np.ndarray:
    """m / ||W + s B A|| (W + s B A) - W of the aligned W, cut off after the largest singular values."""
    w = dora.aligned_tensors[f"{module}.weight"].double().numpy()
    a, b, m = (dora.pair_tensors[f"base_model.model.{module}.{name}"].double().numpy()
               for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))  # fmt: skip
    directed = w + 8 / 4 * b @ a
    u, values, v = np.linalg.svd(m[:, None] / np.linalg.norm(directed, axis=1, keepdims=True) * directed - w)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


@pytest.mark.parametrize("base_form", ["safetensors", "gguf"])
def test_dora_projects_through_its_nearest_pairs(base_form: str, dora: Trio, tmp_path: Path) -> None:
    base, rank = dora.base, 6
    if base_form == "gguf":
        base = write_gguf_model(tmp_path / "base.gguf", dora.base_tensors, config(dora.sizes))
    told = project(replace(dora, base=base), tmp_path / "out", "--all", "--dora-rank", rank, "--json")
    assert told.exit_code == 0, told.output
    report, found = json.loads(told.stdout), load_file(tmp_path / "out" / WEIGHTS)
    assert {module["rank"] for module in report["modules"]} == {rank}
    assert sum("DoRA" in loss for loss in report["losses"]) == len(dora.modules)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()).get("use_dora", False) is False
    adapter = open_adapter(tmp_path / "out")
    for module in dora.modules:
        v = (dora.aligned_tensors[f"{module}.weight"] - dora.base_tensors[f"{module}.weight"]).double().numpy()
        expected = v @ (v.T @ nearest(dora, module, rank)) / np.linalg.norm(v)
        b, a = (found[f"base_model.model.{module}.lora_{half}.weight"].double().numpy() for half in "BA")
        delta = adapter.pairs[module].scaling * b @ a
        assert np.linalg.norm(delta - expected) < 1e-4 * np.linalg.norm(expected)


def test_dora_needs_the_aligned_weights_and_is_an_approximation(dora: Trio, tmp_path: Path) -> None:
    strict = project(dora, tmp_path / "out.gguf", "--strict", "--dora-rank", 4)
    assert strict.exit_code == 3 and "DoRA in 14 modules" in strict.stderr
    assert convert(dora.adapter, tmp_path / "out.gguf", "--base", dora.aligned, "--strict").exit_code == 3
    aligned = write_gguf_model(tmp_path / "aligned.gguf", dora.aligned_tensors, config(dora.sizes))
    told = project(replace(dora, aligned=aligned), tmp_path / "out.gguf", "--json")
    assert (told.exit_code, json.loads(told.stdout)["error"]["kind"]) == (3, "unsupported")
    assert "--aligned" in told.stderr and "safetensors" in told.stderr
    assert not (tmp_path / "out.gguf").exists()
    assert project(dora, tmp_path / "out.gguf", "--dora-rank", 0).exit_code == 2
    planned = project(dora, tmp_path / "out.gguf", "--dora-rank", 4, "--dry-run", "--json")
    assert planned.exit_code == 0 and any("DoRA" in loss for loss in json.loads(planned.stdout)["losses"])


def test_a_rank_for_dora_alone(trio: Trio, tmp_path: Path) -> None:
    assert project(trio, tmp_path / "out.gguf", "--dora-rank", 4).exit_code == 2
    assert convert(trio.adapter, tmp_path / "out.gguf", "--base", trio.aligned, "--dora-rank", 4).exit_code == 2

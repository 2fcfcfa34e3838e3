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
    with pytest.raises(UnsupportedError, match=r": 1 thing .*--strict.*: x{400,500}\.\.\. \(the rest in the report\)$"):
        refuse_losses(adapter, ["x" * 10_000])
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


def test_a_loss_with_many_names_is_whole_in_the_report_alone(trio: Trio, tmp_path: Path) -> None:
    names = {f"base_model.model.model.layers.{layer}.mlp.up_proj.bias" for layer in range(100)}
    tensors = {**load_file(trio.adapter / WEIGHTS), **{name: torch.ones(96) for name in names}}
    save_file(tensors, trio.adapter / WEIGHTS)
    for told in (
        project(trio, tmp_path / "1.gguf", "--json"),
        convert(trio.adapter, tmp_path / "2.gguf", "--base", trio.aligned, "--json"),
    ):
        (loss,) = json.loads(told.stdout)["losses"]
        assert told.exit_code == 0 and names == set(loss.rpartition(": ")[2].split(", "))
        (line,) = told.stderr.splitlines()
        assert line.endswith("... (the rest in the report)") and len(line) < 600
        assert "merge the adapter into its model" in line and line[len("warning: ") : 400] in loss


def test_what_was_folded_is_named_in_full_in_the_report_alone(trio: Trio, tmp_path: Path) -> None:
    with_setting(use_rslora=True, alpha_pattern={"v_proj": 2})(trio.adapter)
    told = convert(trio.adapter, tmp_path / "1.gguf", "--base", trio.aligned, "--json")
    (note,) = (note for note in json.loads(told.stdout)["notes"] if "multiplied into lora_B" in note)
    for scaling, chosen in (("4", False), ("1", True)):  # alpha / sqrt(4), where alpha / r is 8 / 4
        names = [module for module in trio.modules if module.endswith("v_proj") is chosen]
        assert f"{scaling} instead of 2 on " in note and all(name in note for name in names)
    table = convert(trio.adapter, tmp_path / "2.gguf", "--base", trio.aligned)
    (line,) = (line for line in table.stdout.splitlines() if "multiplied into lora_B" in line)
    assert line.endswith("... (the rest in the report)") and len(line) <= 500


def test_what_only_llama_server_honours_is_a_note(trio: Trio, tmp_path: Path) -> None:
    """llama.cpp's server activates an aLoRA by its tokens; its library, and so every other program, applies it always.
    PEFT honours the tokens itself."""
    with_setting(alora_invocation_tokens=[3, 4])(trio.adapter)
    for number, (ending, expected) in enumerate(((".gguf", 1), ("", 0))):
        out = [tmp_path / f"{number}{kind}{ending}" for kind in "pc"]
        for told in (
            project(trio, out[0], "--json", "--strict"),
            convert(trio.adapter, out[1], "--base", trio.aligned, "--json", "--strict"),
        ):
            assert told.exit_code == 0, told.output
            report = json.loads(told.stdout)
            assert report["losses"] == []
            assert sum("llama-server alone" in note for note in report["notes"]) == expected
        if ending:
            back = convert(out[1], tmp_path / "again.gguf", "--json")
            assert any("llama-server alone" in note for note in json.loads(back.stdout)["notes"])


@pytest.mark.parametrize("ending", [".gguf", ""])
def test_fan_in_fan_out_changes_nothing_about_linear_layers(ending: str, trio: Trio, tmp_path: Path) -> None:
    """PEFT warns and sets it aside for nn.Linear (tuners/lora/model.py), which all adapted layers of a Llama are."""

    def outputs(number: int) -> list[bytes]:
        outs = [tmp_path / f"{number}{kind}{ending}" for kind in "pc"]
        told = [project(trio, outs[0]), convert(trio.adapter, outs[1], "--base", trio.aligned)]
        assert [result.exit_code for result in told] == [0, 0], told
        pairs = [open_adapter(out) for out in outs]
        return [half.numpy().tobytes() for adapter in pairs for name in adapter.pairs for half in adapter.load(name)]

    plain = outputs(1)
    with_setting(fan_in_fan_out=True)(trio.adapter)
    assert outputs(2) == plain


def test_fan_in_fan_out_of_unknown_layers_is_refused(trio: Trio, tmp_path: Path) -> None:
    """GPT-2's Conv1D stores a weight as (in, out)."""
    with_setting(fan_in_fan_out=True)(trio.adapter)
    for model in (trio.base, trio.aligned):
        (model / "config.json").write_text(json.dumps(config(trio.sizes, "GPT2LMHeadModel")))
    for told in (
        project(trio, tmp_path / "1", "--json"),
        convert(trio.adapter, tmp_path / "2", "--base", trio.aligned, "--json"),
    ):
        assert (told.exit_code, json.loads(told.stdout)["error"]["kind"]) == (3, "unsupported")
        assert re.search(r"fan_in_fan_out.*Conv1D.*GPT2LMHeadModel.*with PEFT", told.stderr)
    assert not (tmp_path / "1").exists() and not (tmp_path / "2").exists()


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


def test_a_rank_that_a_narrow_weight_has_not_is_its_own_there(dora: Trio, tmp_path: Path) -> None:
    """Of a (32, 64) weight's update a pair of rank 32 is exact."""
    told = convert(dora.adapter, tmp_path / "out", "--base", dora.aligned, "--dora-rank", 48, "--json")
    assert told.exit_code == 0, told.output
    report, adapter = json.loads(told.stdout), open_adapter(tmp_path / "out")
    narrow = [module for module in dora.modules if module.endswith(("k_proj", "v_proj"))]
    for module in dora.modules:
        pair = adapter.pairs[module]
        assert pair.rank == (32 if module in narrow else 48)
        a, b = (half.double().numpy() for half in adapter.load(module))
        expected = nearest(dora, module, pair.rank)
        assert np.linalg.norm(pair.scaling * b @ a - expected) < 1e-4 * np.linalg.norm(expected)
        (loss,) = (loss for loss in report["losses"] if module in loss)
        assert (" is exact" in loss) == (module in narrow)
    assert project(dora, tmp_path / "projected.gguf", "--dora-rank", 48).exit_code == 0
    wrong = convert(dora.adapter, tmp_path / "wrong", "--base", dora.aligned, "--dora-rank", 65)
    assert wrong.exit_code == 2 and "more than any module has: 64" in wrong.stderr


def test_a_rank_for_dora_alone(trio: Trio, tmp_path: Path) -> None:
    assert project(trio, tmp_path / "out.gguf", "--dora-rank", 4).exit_code == 2
    assert convert(trio.adapter, tmp_path / "out.gguf", "--base", trio.aligned, "--dora-rank", 4).exit_code == 2

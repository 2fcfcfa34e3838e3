"""Every form of reference and adapter, in any mix.

Oracle: the same numbers written by another hand (the gguf package, the safetensors package) must give the same
projection; and the paper's formula, dense and in float64, on what the files hold.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf_models import QType, adapter_writer, finish, put, write_gguf_adapter, write_gguf_model, write_trio
from models import Sizes, adapter_config, config, moved, pairs, save_adapter, save_model, weights
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from converters.adapters.peft import open_peft
from safelora_gguf import Selection, project_adapter
from safelora_gguf.cli import app
from safelora_gguf.report import ProjectReport

TINY = Path(__file__).parents[2] / "safelora_gguf" / "tiny_family"
NUMBER = Selection("number", 15)
REFERENCES = {
    "safetensors": ("safetensors", "safetensors"),
    "F32 GGUF": ("F32", "F32"),
    "F16 GGUF": ("F16", "F16"),
    "safetensors and F32 GGUF": ("safetensors", "F32"),
    "F16 GGUF and safetensors": ("F16", "safetensors"),
}


@dataclass(frozen=True)
class Forms:
    """The tiny family in every form: paths by role and form."""

    base: dict[str, Path]
    aligned: dict[str, Path]
    adapter: dict[str, Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    root = tmp_path_factory.mktemp("tiny")
    settings = json.loads((TINY / "base" / "config.json").read_text())
    forms: dict[str, dict[str, Path]] = {"base": {}, "aligned": {}}
    for role, found in forms.items():
        found["safetensors"] = TINY / role
        tensors = load_file(TINY / role / "model.safetensors")
        for qtype in (QType.F32, QType.F16, QType.Q8_0):
            path = root / f"{role}-{qtype.name}.gguf"
            found[qtype.name] = write_gguf_model(path, tensors, settings, qtype)
    lora = load_file(TINY / "adapter" / "adapter_model.safetensors")
    alpha = open_peft(TINY / "adapter").lora_alpha
    adapters = {
        "PEFT": TINY / "adapter",
        "GGUF": write_gguf_adapter(root / "adapter.gguf", lora, settings, alpha=alpha),
        "MLX": mlx_copy(root / "mlx", lora, alpha / 8),
    }
    return Forms(forms["base"], forms["aligned"], adapters)


def mlx_copy(root: Path, lora: dict[str, torch.Tensor], scale: float) -> Path:
    """The same pairs as mlx-lm stores them: transposed, lower-case."""
    root.mkdir()
    tensors = {}
    for key, tensor in lora.items():
        module, half = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        tensors[f"{module}.lora_{half.lower()}"] = tensor.T.contiguous()
    save_file(tensors, root / "adapters.safetensors")
    parameters = {"rank": 8, "scale": scale, "dropout": 0.0}
    (root / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": parameters}))
    return root


@pytest.fixture(scope="module")
def expected(tiny: Forms, tmp_path_factory: pytest.TempPathFactory) -> tuple[ProjectReport, dict[str, torch.Tensor]]:
    """What safetensors and PEFT give, which other tests hold against the dense formula."""
    out = tmp_path_factory.mktemp("expected") / "out.gguf"
    forms = tiny.base["safetensors"], tiny.aligned["safetensors"], tiny.adapter["PEFT"]
    return project_adapter(*forms, out, selection=NUMBER), gguf_tensors(out)


def gguf_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(path).tensors}


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def chosen(report: ProjectReport) -> set[str]:
    return {module.label for module in report.modules if module.projected}


@pytest.mark.parametrize(("references", "adapter"), list(product(REFERENCES, ("PEFT", "GGUF", "MLX"))))
def test_every_mix_gives_the_same_projection(
    references: str,
    adapter: str,
    tiny: Forms,
    expected: tuple[ProjectReport, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    base, aligned = REFERENCES[references]
    out = tmp_path / "out.gguf"
    report = project_adapter(tiny.base[base], tiny.aligned[aligned], tiny.adapter[adapter], out, selection=NUMBER)

    assert chosen(report) == chosen(expected[0])
    found = gguf_tensors(out)
    assert found.keys() == expected[1].keys()
    assert max(error(found[name], tensor) for name, tensor in expected[1].items()) < 1e-5
    cosines = {module.name: module.cosine for module in expected[0].modules}
    assert {module.name: module.cosine for module in report.modules} == pytest.approx(cosines, abs=1e-5)
    assert all(module.snr is None and module.noise_edge is None for module in report.modules)


@pytest.mark.parametrize("references", ["safetensors", "F16 GGUF"])
@pytest.mark.parametrize("adapter", ["PEFT", "GGUF", "MLX"])
def test_every_mix_can_be_written_as_a_peft_directory(
    references: str,
    adapter: str,
    tiny: Forms,
    expected: tuple[ProjectReport, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    """The deltas of the written pairs, scaled as PEFT scales them, are those of the GGUF output."""
    base, aligned = REFERENCES[references]
    first, second = tmp_path / "peft", tmp_path / "again.gguf"
    project_adapter(tiny.base[base], tiny.aligned[aligned], tiny.adapter[adapter], first, selection=NUMBER)
    untouched = Selection("number", 0)
    project_adapter(tiny.base["safetensors"], tiny.aligned["safetensors"], first, second, selection=untouched)
    found = gguf_tensors(second)
    for name in {name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")}:
        delta = found[f"{name}.lora_b"] @ found[f"{name}.lora_a"]
        exact = expected[1][f"{name}.lora_b"] @ expected[1][f"{name}.lora_a"]
        assert error(delta, exact) < 1e-5, name


def test_rounded_references_move_the_result_no_more_than_their_rounding(tmp_path: Path) -> None:
    sizes = Sizes(hidden=128, ffn=192, layers=2)
    settings = config(sizes)
    before = weights(sizes, 1)
    tensors = {"base": before, "aligned": moved(before, 2)}
    adapter = save_adapter(tmp_path / "adapter", pairs(sizes.modules(), 3), adapter_config())
    reports = {}
    for qtype in (QType.F32, QType.F16):
        paths = [write_gguf_model(tmp_path / f"{role}-{qtype.name}.gguf", values, settings, qtype)
                 for role, values in tensors.items()]  # fmt: skip
        out = tmp_path / f"{qtype.name}.gguf"
        reports[qtype] = project_adapter(paths[0], paths[1], adapter, out, selection=Selection("all")), out
    exact, rounded = (gguf_tensors(reports[qtype][1]) for qtype in (QType.F32, QType.F16))
    # F16 keeps 11 bits of weights that are about three times as large as V here.
    assert 1e-6 < max(error(rounded[name], exact[name]) for name in exact) < 3e-3


def test_quantized_references_are_used_with_their_noise_stated(
    tiny: Forms, expected: tuple[ProjectReport, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    forms = tiny.base["Q8_0"], tiny.aligned["Q8_0"], tiny.adapter["PEFT"]
    report = project_adapter(*forms, tmp_path / "out.gguf", selection=NUMBER)
    assert chosen(report) == chosen(expected[0])
    exact = {module.name: module for module in expected[0].modules}
    for module in report.modules:
        assert module.snr is not None and module.snr > 100
        assert module.cosine == pytest.approx(exact[module.name].cosine, abs=5e-3)
        assert module.noise_edge is not None and 0 < module.noise_edge < (module.alignment_norm or 0)


def test_one_quantized_reference_is_noise_enough(tiny: Forms, tmp_path: Path) -> None:
    both = project_adapter(tiny.base["Q8_0"], tiny.aligned["Q8_0"], tiny.adapter["GGUF"], tmp_path / "1.gguf")
    one = project_adapter(tiny.base["Q8_0"], tiny.aligned["F16"], tiny.adapter["GGUF"], tmp_path / "2.gguf")
    for of_both, of_one in zip(both.modules, one.modules, strict=True):
        assert of_both.snr is not None and of_one.snr is not None
        assert 1.5 < (of_one.snr + 1) / (of_both.snr + 1) < 2.5


def invoke(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return {"exit": result.exit_code, **json.loads(result.stdout)}


def quantized_trio(root: Path, change: float, rank: int, qtype: QType) -> tuple[object, ...]:
    """References whose weights have a deviation of 0.02 and differ by `rank` directions, all entries by `change`."""
    random = np.random.default_rng(4)
    names = [f"blk.{layer}.ffn_up.weight" for layer in range(2)]
    found = {}
    for name in names:
        base = random.normal(0, 0.02, (512, 512))
        low = random.normal(size=(512, rank)) @ random.normal(size=(rank, 512)) / rank**0.5
        found[name] = base, base + change * low
    lora = {name: (random.normal(size=(8, 512)), random.normal(size=(512, 8))) for name in names}
    base, aligned, adapter = write_trio(root, "llama", found, lora, qtype=qtype)
    return "--base", base, "--aligned", aligned, "--adapter", adapter


def test_references_of_mostly_noise_are_refused_and_the_ratio_named(tmp_path: Path) -> None:
    options = quantized_trio(tmp_path, 5e-4, 3, QType.Q4_0)
    told = invoke("project", *options, "--out", tmp_path / "out.gguf")
    assert told["exit"] == 3
    assert told["error"]["kind"] == "unsupported"
    for part in ("signal to noise ratio is", "in 2 of 2 modules", "--operator subspace", "--allow-noisy-reference"):
        assert part in told["error"]["message"]
    assert not (tmp_path / "out.gguf").exists()

    allowed = invoke("project", *options, "--out", tmp_path / "out.gguf", "--allow-noisy-reference", "--all")
    assert allowed["exit"] == 0
    assert all(module["snr"] < 1 and module["projected"] for module in allowed["modules"])
    assert sum("mostly rounding noise" in note for note in allowed["notes"]) == 2


def test_the_subspace_operator_keeps_the_directions_above_the_noise(tmp_path: Path) -> None:
    """Three directions are in the weights; Q8_0's noise hides none of them, and adds none."""
    options = quantized_trio(tmp_path, 5e-4, 3, QType.Q8_0)
    told = invoke("project", *options, "--out", tmp_path / "out.gguf", "--operator", "subspace", "--rank", 6)
    assert told["exit"] == 0
    assert [module["directions"] for module in told["modules"]] == [3, 3]
    assert sum("3 of 6 directions" in note for note in told["notes"]) == 2


def test_no_direction_above_the_noise_is_an_error(tmp_path: Path) -> None:
    options = quantized_trio(tmp_path, 2e-5, 3, QType.Q4_0)
    told = invoke("project", *options, "--out", tmp_path / "out.gguf", "--operator", "subspace")
    assert told["exit"] == 3
    assert "nothing but rounding noise" in told["error"]["message"]


def test_an_architecture_without_a_table_projects_from_gguf_to_gguf(tmp_path: Path) -> None:
    """Fused attention, a stack of experts, an embedding: names that no table here has."""
    random = np.random.default_rng(1)
    shapes = {
        "token_embd.weight": (96, 32),
        "output.weight": (96, 32),
        "blk.0.attn_qkv.weight": (80, 32),
        "blk.0.ffn_up_exps.weight": (3, 48, 32),
    }
    found, lora = {}, {}
    for name, shape in shapes.items():
        base = random.normal(size=shape)
        found[name] = base, base + 0.1 * random.normal(size=shape)
        *outer, out, into = shape
        if name == "token_embd.weight":
            lora[name] = random.normal(size=(out, 4)), random.normal(size=(into, 4))
        elif name != "output.weight":
            lora[name] = random.normal(size=(*outer, 4, into)), random.normal(size=(*outer, out, 4))
    base, aligned, adapter = write_trio(tmp_path, "plamo7", found, lora)
    report = project_adapter(base, aligned, adapter, tmp_path / "out.gguf", selection=Selection("all"))

    assert [module.label for module in report.modules] == [
        "blk.0.attn_qkv.weight",
        *(f"blk.0.ffn_up_exps.weight[{expert}]" for expert in range(3)),
        "token_embd.weight",
    ]
    written = gguf_tensors(tmp_path / "out.gguf")
    assert GGUFReader(tmp_path / "out.gguf").fields["general.architecture"].contents() == "plamo7"
    for name, (a, b) in lora.items():
        v = torch.from_numpy((found[name][1].astype(np.float32) - found[name][0].astype(np.float32)).astype(np.float64))
        v = v.T if name == "token_embd.weight" else v
        norm = v.norm(dim=(-2, -1), keepdim=True)
        assert error(written[f"{name}.lora_b"], v @ (v.mT @ torch.from_numpy(b)) / norm) < 1e-5
        assert error(written[f"{name}.lora_a"], torch.from_numpy(a)) < 1e-6


@pytest.mark.parametrize(
    ("mix", "advice"),
    [
        (("gguf", "gguf", "peft"), "convert_lora_to_gguf.py"),
        (("safetensors", "gguf", "gguf"), "convert_hf_to_gguf.py"),
    ],
)
def test_a_mix_without_a_table_says_what_to_convert(mix: tuple[str, str, str], advice: str, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    weight = random.normal(size=(32, 32))
    name = "blk.0.attn_q.weight"
    lora = {name: (random.normal(size=(4, 32)), random.normal(size=(32, 4)))}
    base, aligned, adapter = write_trio(tmp_path / "gguf", "plamo7", {name: (weight, weight + 1)}, lora)
    sizes = Sizes(hidden=32, ffn=32, layers=1)
    settings = config(sizes, "Plamo7ForCausalLM")
    if mix[0] == "safetensors":
        base = save_model(tmp_path / "base", weights(sizes, 1), settings)
    if mix[2] == "peft":
        adapter = save_adapter(tmp_path / "adapter", pairs(sizes.modules(), 3), adapter_config())
    options = "--base", base, "--aligned", aligned, "--adapter", adapter
    told = invoke("project", *options, "--out", tmp_path / "out.gguf")
    assert told["exit"] == 3
    assert told["error"]["kind"] == "unsupported"
    assert advice in told["error"]["message"]


def test_a_mix_with_a_family_that_is_converted_here_names_the_command(tmp_path: Path) -> None:
    weight, name = np.ones((32, 32)), "blk.0.attn_q.weight"
    lora = {name: (np.ones((4, 32)), np.ones((32, 4)))}
    _, aligned, adapter = write_trio(tmp_path / "gguf", "plamo7", {name: (weight, weight + 1)}, lora)
    sizes = Sizes(hidden=32, ffn=32, layers=1)
    base = save_model(tmp_path / "base", weights(sizes, 1), config(sizes))
    told = invoke("project", "--base", base, "--aligned", aligned, "--adapter", adapter, "--out", tmp_path / "o.gguf")
    assert told["exit"] == 3 and f"convert {base} with safelora-gguf convert model" in told["error"]["message"]


def test_an_adapter_without_alpha_is_unscaled_and_stays_so(tmp_path: Path) -> None:
    """llama.cpp applies B @ A as it is where alpha is missing."""
    random = np.random.default_rng(1)
    name, weight = "blk.0.attn_q.weight", random.normal(size=(32, 32))
    a, b = random.normal(size=(4, 32)).astype(np.float32), random.normal(size=(32, 4)).astype(np.float32)
    base, aligned, _ = write_trio(tmp_path, "plamo7", {name: (weight, weight + random.normal(size=(32, 32)))}, {})
    writer = adapter_writer(tmp_path / "bare.gguf", "plamo7", alpha=None)
    put(writer, f"{name}.lora_a", a)
    put(writer, f"{name}.lora_b", b)
    finish(writer)
    out = tmp_path / "out.gguf"
    report = project_adapter(base, aligned, tmp_path / "bare.gguf", out, selection=Selection("number", 0))
    assert report.modules[0].delta_norm == pytest.approx(float(np.linalg.norm(b @ a)), rel=1e-6)
    alpha = GGUFReader(out).fields["adapter.lora.alpha"].contents()
    written = gguf_tensors(out)
    assert error(alpha / 4 * written[f"{name}.lora_b"] @ written[f"{name}.lora_a"], torch.from_numpy(b @ a)) < 1e-6
    assert any("unscaled" in note for note in report.notes)


@pytest.mark.parametrize("form", ["F32", "safetensors"])
def test_an_adapter_of_another_architecture_is_refused(form: str, tiny: Forms, tmp_path: Path) -> None:
    writer = adapter_writer(tmp_path / "other.gguf", "qwen2")
    put(writer, "blk.0.attn_q.weight.lora_a", np.ones((4, 256)))
    put(writer, "blk.0.attn_q.weight.lora_b", np.ones((256, 4)))
    finish(writer)
    options = "--base", tiny.base[form], "--aligned", tiny.aligned[form], "--adapter", tmp_path / "other.gguf"
    told = invoke("project", *options, "--out", tmp_path / "out.gguf")
    assert (told["exit"], told["error"]["kind"]) == (3, "mismatch")
    assert "qwen2" in told["error"]["message"]


def test_a_stack_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    name, weight = "blk.0.ffn_up_exps.weight", random.normal(size=(4, 32, 32))
    lora = {name: (random.normal(size=(3, 4, 32)), random.normal(size=(3, 32, 4)))}
    base, aligned, adapter = write_trio(tmp_path, "plamo7", {name: (weight, weight + 1)}, lora)
    options = "--base", base, "--aligned", aligned, "--adapter", adapter
    told = invoke("project", *options, "--out", tmp_path / "out.gguf")
    assert (told["exit"], told["error"]["kind"]) == (3, "mismatch")
    assert "[3, 32, 32]" in told["error"]["message"] and "[4, 32, 32]" in told["error"]["message"]


@pytest.mark.parametrize("role", ["base", "adapter"])
def test_a_dry_run_tells_of_types_that_cannot_be_read(role: str, tmp_path: Path) -> None:
    sizes = Sizes(hidden=32, ffn=32, layers=1)
    before, lora = weights(sizes, 1), pairs(sizes.modules(), 3)
    aligned = save_model(tmp_path / "aligned", moved(before, 2), config(sizes))
    spoilt = before if role == "base" else lora
    name = next(name for name in spoilt if "up_proj" in name)
    spoilt[name] = spoilt[name].to(torch.float8_e4m3fn)
    base = save_model(tmp_path / "base", before, config(sizes))
    adapter = save_adapter(tmp_path / "adapter", lora, adapter_config())
    options = "--base", base, "--aligned", aligned, "--adapter", adapter
    told = invoke("project", *options, "--out", tmp_path / "out.gguf", "--dry-run")
    assert (told["exit"], told["error"]["kind"], told["error"]["tensor"]) == (3, "unsupported", name)
    assert "F8_E4M3" in told["error"]["message"]

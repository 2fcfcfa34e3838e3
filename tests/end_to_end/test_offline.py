"""Converting, projecting and merging need neither transformers nor a network. Oracle: a process from which both are
barred, and PEFT's formula scaling * B @ A on the numbers in the files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import offline_child
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_models import write_gguf_model
from models import Sizes, Trio, adapter_config, config, pairs, save_adapter, save_trio
from safetensors.torch import load_file, save_file

from converters.ggml import QType

FAMILY = Path(__file__).parents[2] / "safelora_gguf" / "tiny_family"
SIZES = Sizes()
QWEN = "Qwen2ForCausalLM"  # keeps its rows in GGUF
DOWN = "model.layers.1.mlp.down_proj"
GGUF_DOWN = "blk.1.ffn_down.weight"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trio, Mapping[str, Mapping[str, Any]]]:
    """What was written where, from what, and what the commands answered."""
    root = tmp_path_factory.mktemp("offline")
    trio = save_trio(root, architecture=QWEN)
    plain = ["--base", trio.aligned]
    gguf = write_gguf_model(root / "aligned.gguf", trio.aligned_tensors, config(SIZES, QWEN))
    named = {**adapter_config(), "base_model_name_or_path": "somebody/a-model-of-the-hub"}
    unnamed = save_adapter(root / "unnamed", pairs(SIZES.modules(), 3), named)
    dora = save_dora(root / "dora", trio)
    project = ["project", "--base", trio.base, "--aligned", gguf, "--all"]
    commands: dict[str, list[object]] = {
        "peft to gguf": ["convert", "adapter", trio.adapter, "--out", root / "peft.gguf", *plain],
        "mlx to gguf": ["convert", "adapter", save_mlx(root / "mlx", trio), "--out", root / "mlx.gguf", *plain],
        "gguf to peft": ["convert", "adapter", root / "peft.gguf", "--out", root / "back", *plain],
        "mlx to peft": ["convert", "adapter", root / "mlx", "--out", root / "from-mlx", *plain],
        "dora to gguf": ["convert", "adapter", dora, "--out", root / "dora.gguf", *plain],
        "no base": ["convert", "adapter", unnamed, "--out", root / "none.gguf"],
        "project": [*project, "--adapter", trio.adapter, "--out", root / "projected.gguf"],
        "inspect": ["inspect", trio.adapter],
    }
    answers = offline_child.answers([[*command, "--json"] for command in commands.values()])
    return root, trio, dict(zip(commands, answers, strict=True))


def save_mlx(directory: Path, trio: Trio) -> Path:
    directory.mkdir()
    halves = {}
    for key, tensor in trio.pair_tensors.items():
        module, half = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        halves[f"{module}.lora_{half.lower()}"] = tensor.T.contiguous()
    save_file(halves, directory / "adapters.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 4, "scale": 2.0}}))
    return directory


def save_dora(directory: Path, trio: Trio) -> Path:
    """A pair whose magnitudes are those of the moved weight: its update is then the plain one."""
    halves = {key: tensor for key, tensor in trio.pair_tensors.items() if DOWN in key}
    rows = (trio.aligned_tensors[f"{DOWN}.weight"].double() + exact(trio)).norm(dim=1).float()
    magnitudes = {f"base_model.model.{DOWN}.lora_magnitude_vector": rows}
    return save_adapter(directory, {**halves, **magnitudes}, adapter_config(use_dora=True))


def exact(trio: Trio) -> torch.Tensor:
    a, b = (trio.pair_tensors[f"base_model.model.{DOWN}.lora_{half}.weight"].double() for half in "AB")
    return 2 * b @ a  # alpha 8, rank 4


def in_gguf(path: Path) -> np.ndarray:
    reader = GGUFReader(path)
    found = {tensor.name: tensor.data.astype(np.float64) for tensor in reader.tensors}
    a, b = found[f"{GGUF_DOWN}.lora_a"], found[f"{GGUF_DOWN}.lora_b"]
    return reader.fields["adapter.lora.alpha"].contents() / len(a) * b @ a


def in_peft(path: Path) -> np.ndarray:
    tensors, settings = (
        load_file(path / "adapter_model.safetensors"),
        json.loads((path / "adapter_config.json").read_text()),
    )
    a, b = (tensors[f"base_model.model.{DOWN}.lora_{half}.weight"].double().numpy() for half in "AB")
    return settings["lora_alpha"] / len(a) * b @ a


@pytest.mark.parametrize(
    ("command", "out"),
    [
        ("peft to gguf", "peft.gguf"),
        ("mlx to gguf", "mlx.gguf"),
        ("gguf to peft", "back"),
        ("mlx to peft", "from-mlx"),
        ("dora to gguf", "dora.gguf"),
    ],
)
def test_the_update_arrives(command: str, out: str, done: tuple[Path, Trio, Mapping[str, Mapping[str, Any]]]) -> None:
    root, trio, answers = done
    assert answers[command]["exit"] == 0, answers[command]["stderr"]
    found = (in_gguf if out.endswith(".gguf") else in_peft)(root / out)
    truth = exact(trio).numpy()
    allowed = 0.01 if "dora" in command else 1e-6
    assert np.linalg.norm(found - truth) < allowed * np.linalg.norm(truth)


def test_projecting_too(done: tuple[Path, Trio, Mapping[str, Mapping[str, Any]]]) -> None:
    root, trio, answers = done
    assert answers["project"]["exit"] == 0, answers["project"]["stderr"]
    v = (trio.aligned_tensors[f"{DOWN}.weight"] - trio.base_tensors[f"{DOWN}.weight"]).double().numpy()
    truth = v @ v.T / np.linalg.norm(v) @ exact(trio).numpy()
    assert np.linalg.norm(in_gguf(root / "projected.gguf") - truth) < 1e-5 * np.linalg.norm(truth)


def test_a_base_that_only_a_hub_has_is_asked_for(done: tuple[Path, Trio, Mapping[str, Mapping[str, Any]]]) -> None:
    """The one case where others go out to look."""
    answer = done[2]["no base"]
    assert (answer["exit"], answer["told"]["error"]["kind"]) == (3, "missing")
    assert "--base" in answer["told"]["error"]["message"]


def test_nobody_so_much_as_tried(done: tuple[Path, Trio, Mapping[str, Mapping[str, Any]]]) -> None:
    assert [command for command, answer in done[2].items() if answer["network"]] == []
    assert done[2]["inspect"]["exit"] == 0


@pytest.fixture(scope="module", params=[(), ("llama_cpp",)], ids=["with llama.cpp", "without"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Commands that write models, with and without llama-cpp-python."""
    root = tmp_path_factory.mktemp("models")
    stored = {kind: root / f"stored-{kind}.gguf" for kind in ("f32", "q8_0", "q4_0")}
    quantized = root / "quantized.gguf"
    write_gguf_model(stored["f32"], (trio := save_trio(root, architecture=QWEN)).aligned_tensors, config(SIZES, QWEN))
    for kind, qtype in (("q8_0", QType.Q8_0), ("q4_0", QType.Q4_0)):
        write_gguf_model(stored[kind], trio.aligned_tensors, config(SIZES, QWEN), qtype)
    plain = ["merge", "--device", "cpu", "--adapter", trio.adapter]
    recipe = f'[convert-model]\nsource = "{FAMILY / "aligned"}"\nout = "ran.gguf"\nouttype = "f16"\n'
    (root / "r.toml").write_text(recipe)
    commands: dict[str, list[object]] = {
        "convert": ["convert", "model", FAMILY / "aligned", "--out", root / "model.gguf", "--outtype", "q8_0"],
        "run": ["run", root / "r.toml", "--quiet"],
        "merge": [*plain, "--model", trio.aligned, "--out", root / "merged"],
        "convert to Q4_K_M": ["convert", "model", FAMILY / "aligned", "--out", quantized, "--outtype", "Q4_K_M"],
        "merge to Q4_K_M": ["merge", "--model", FAMILY / "aligned", "--adapter", FAMILY / "adapter",
                            "--out", root / "merged-q4.gguf", "--outtype", "Q4_K_M"],
        **{f"merge {kind}": [*plain, "--model", path, "--out", root / f"{kind}.gguf"] for kind, path in stored.items()},
    }  # fmt: skip
    told = offline_child.answers([[*command, "--json"] for command in commands.values()], *request.param)
    return root, dict(zip(commands, told, strict=True)) | {"without": request.param}


def test_models_are_made_too(models: tuple[Path, dict[str, Any]]) -> None:
    root, told = models
    for command in ("convert", "run", "merge", "merge f32", "merge q8_0"):
        assert told[command]["exit"] == 0, told[command]["stderr"]
    assert not any(answer["network"] for command, answer in told.items() if command != "without")
    merged = load_file(root / "merged" / "model.safetensors")[f"{DOWN}.weight"].double().numpy()
    trio = load_file(root / "aligned" / "model.safetensors")[f"{DOWN}.weight"].double().numpy()
    a, b = (load_file(root / "adapter" / "adapter_model.safetensors")[f"base_model.model.{DOWN}.lora_{half}.weight"]
            .double().numpy() for half in "AB")  # fmt: skip
    truth = trio + 2 * b @ a
    for found, allowed in ((merged, 1e-6), (weight(root / "f32.gguf"), 1e-6), (weight(root / "q8_0.gguf"), 0.01)):
        assert np.linalg.norm(found - truth) < allowed * np.linalg.norm(truth)


def weight(path: Path) -> np.ndarray:
    (found,) = (tensor for tensor in GGUFReader(path).tensors if tensor.name == GGUF_DOWN)
    return dequantize(found.data, found.tensor_type).astype(np.float64)


def test_only_what_llama_cpp_quantizes_needs_it(models: tuple[Path, dict[str, Any]]) -> None:
    root, told = models
    quantized = ("convert to Q4_K_M", "merge to Q4_K_M")
    assert told["merge q4_0"]["exit"] == 0  # the gguf package rounds to it, too
    if not told["without"]:
        pytest.importorskip("llama_cpp")
        assert [told[command]["exit"] for command in quantized] == [0, 0]
        return
    for command in quantized:
        answer = told[command]
        assert answer["exit"] == 3 and "llama-cpp-python" in answer["told"]["error"]["message"], (command, answer)
        assert "pip install" in answer["told"]["error"]["message"] or "[smoke]" in answer["told"]["error"]["message"]
    assert not list(root.glob("*q4*safelora*")) and not (root / "quantized.gguf").exists()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import transformers", "ModuleNotFoundError"),
        ("import urllib.request as u; u.urlopen('http://localhost:1')", "there is no network here"),
    ],
)
def test_the_bars_hold(code: str, error: str) -> None:
    """Oracle: what has to fail in such a process does."""
    line = f"import offline_child; offline_child.go_offline(); {code}"
    where = Path(offline_child.__file__).parent
    told = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False, cwd=where)
    assert told.returncode == 1 and error in told.stderr

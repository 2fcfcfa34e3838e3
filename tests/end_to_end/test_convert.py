"""`convert adapter`. Oracles: PEFT's formula scaling * B @ A on the numbers in the files, the gguf package's reader and
name map, llama.cpp's row order written out in tests/gguf_models.py."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf_bytes import LITTLE, Tensor
from gguf_models import permuted, write_gguf_adapter, write_gguf_model
from models import PROJECTIONS, Sizes, adapter_config, config, pairs, save_adapter, save_model, weights
from safetensors.torch import save_file
from typer.testing import CliRunner

from converters.opening import open_adapter
from safelora_gguf.cli import app

SIZES = Sizes(hidden=64, ffn=96, layers=2)
SETTINGS = config(SIZES)
GGUF_NAMES = dict(zip(PROJECTIONS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
                      strict=True))  # fmt: skip


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["convert", "adapter", *map(str, arguments), "--json"])
    return {"exit": result.exit_code, **json.loads(result.stdout)}


def configured(root: Path) -> Path:
    """A model of which only config.json is there."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(SETTINGS))
    return root


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """scaling * B @ A in float64 by module, as our own readers (tested elsewhere against others) see an adapter."""
    adapter = open_adapter(path)
    found = {}
    for module, pair in adapter.pairs.items():
        a, b = adapter.load(module)
        found[module] = pair.scaling * b.double() @ a.double()
    return found


def difference(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert found.keys() == exact.keys()
    return max(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)


@pytest.mark.parametrize("base", ["directory", "config.json", "gguf", "weights"])
def test_peft_to_gguf_with_whatever_says_what_the_model_is(base: str, tmp_path: Path) -> None:
    settings = adapter_config(use_rslora=True, alpha_pattern={"v_proj": 3})
    lora = pairs(SIZES.modules(), 3)
    source = save_adapter(tmp_path / "adapter", lora, settings)
    known = {
        "directory": lambda: configured(tmp_path / "model"),
        "config.json": lambda: configured(tmp_path / "model") / "config.json",
        "gguf": lambda: write_gguf_model(tmp_path / "model.gguf", weights(SIZES, 1), SETTINGS),
        "weights": lambda: save_model(tmp_path / "model", weights(SIZES, 1), SETTINGS),
    }[base]()
    out = tmp_path / "out.gguf"
    told = run(source, "--out", out, "--base", known)
    assert told["exit"] == 0
    reader = GGUFReader(out)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {tensor.name: tensor.data.astype(np.float64) for tensor in reader.tensors}
    assert len(found) == 2 * len(SIZES.modules())
    for module in SIZES.modules():
        layer, name = module.split(".")[2], module.split(".", 3)[3]
        exact_a, exact_b = (lora[f"base_model.model.{module}.lora_{half}.weight"].double().numpy() for half in "AB")
        scaling = (3 if "v_proj" in module else 8) / math.sqrt(4)
        exact = scaling * exact_b @ exact_a
        if "q_proj" in module or "k_proj" in module:
            exact = permuted(exact, 4 if "q_proj" in module else 2)
        target = f"blk.{layer}.{GGUF_NAMES[name]}.weight"
        delta = alpha / 4 * found[f"{target}.lora_b"] @ found[f"{target}.lora_a"]
        assert np.linalg.norm(delta - exact) < 1e-6 * np.linalg.norm(exact)
    assert [module["scaling"] for module in told["modules"] if "attn_v" in module["name"]] == [1.5, 1.5]
    assert any("multiplied into lora_B" in note for note in told["notes"])
    assert told["command"] == "convert adapter" and told["output"]["bytes"] == out.stat().st_size


@pytest.mark.parametrize("form", ["peft", "mlx", "gguf"])
def test_there_and_back_is_the_same_delta(form: str, tmp_path: Path) -> None:
    model = configured(tmp_path / "model")
    lora = pairs(SIZES.modules(), 3, ranks={"model.layers.0.mlp.up_proj": 2})
    settings = adapter_config(rank_pattern={r"layers\.0\.mlp\.up_proj": 2}, alpha_pattern={"k_proj": 5})
    source = save_adapter(tmp_path / "peft", lora, settings)
    if form == "mlx":
        lora = pairs(SIZES.modules(), 3)
        source = tmp_path / "mlx"
        source.mkdir()
        halves = {}
        for key, tensor in lora.items():
            module, half = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
            halves[f"{module}.lora_{half.lower()}"] = tensor.T.contiguous()
        save_file(halves, source / "adapters.safetensors")
        (source / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 4, "scale": 2.5}}))
    if form == "gguf":
        source = write_gguf_adapter(tmp_path / "source.gguf", pairs(SIZES.modules(), 3), SETTINGS)
    first, second = (tmp_path / "1", tmp_path / "2.gguf") if form == "gguf" else (tmp_path / "1.gguf", tmp_path / "2")
    assert run(source, "--out", first, "--base", model)["exit"] == 0
    assert run(first, "--out", second, "--base", model)["exit"] == 0
    assert difference(deltas(second), deltas(source)) < 1e-6


def test_the_base_is_found_beside_the_adapter_or_by_its_name(tmp_path: Path) -> None:
    model = configured(tmp_path / "model")
    beside = save_adapter(tmp_path / "beside", pairs(SIZES.modules(), 3), adapter_config())
    (beside / "config.json").write_text(json.dumps(SETTINGS))
    named = save_adapter(tmp_path / "named", pairs(SIZES.modules(), 3),
                         {**adapter_config(), "base_model_name_or_path": str(model)})  # fmt: skip
    assert run(beside, "--out", tmp_path / "1.gguf")["exit"] == 0
    assert run(named, "--out", tmp_path / "2.gguf")["exit"] == 0
    data = (tmp_path / "2.gguf").read_bytes()
    assert str(tmp_path).encode() not in data, "a path of somebody's machine"


def test_without_a_base_the_message_says_how_to_name_one(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "adapter", pairs(SIZES.modules(), 3), adapter_config())
    told = run(source, "--out", tmp_path / "out.gguf")
    assert (told["exit"], told["error"]["kind"]) == (3, "missing")
    assert "--base" in told["error"]["message"]
    from_gguf = write_gguf_adapter(tmp_path / "source.gguf", pairs(SIZES.modules(), 3), SETTINGS)
    told = run(from_gguf, "--out", tmp_path / "peft")
    assert (told["exit"], told["error"]["kind"]) == (3, "unsupported")
    assert "--base" in told["error"]["message"]


def test_gguf_to_gguf_changes_the_type_alone(tmp_path: Path) -> None:
    source = write_gguf_adapter(tmp_path / "source.gguf", pairs(SIZES.modules(), 3), SETTINGS)
    told = run(source, "--out", tmp_path / "out.gguf", "--outtype", "f16")
    assert told["exit"] == 0
    assert {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "out.gguf").tensors} == {"F16"}
    assert difference(deltas(tmp_path / "out.gguf"), deltas(source)) < 1e-3
    assert max(module["stored_error"] for module in told["modules"]) < 1e-3


def test_tied_embeddings_are_refused_towards_merging(tmp_path: Path) -> None:
    lora = pairs({**SIZES.modules(), "lm_head": (SIZES.vocab, SIZES.hidden)}, 3)
    source = save_adapter(tmp_path / "adapter", lora, adapter_config())
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**SETTINGS, "tie_word_embeddings": True}))
    told = run(source, "--out", tmp_path / "out.gguf", "--base", model)
    assert (told["exit"], told["error"]["kind"]) == (3, "unsupported")
    assert "Merge" in told["error"]["message"]
    assert run(source, "--out", tmp_path / "out.gguf", "--base", configured(tmp_path / "untied"))["exit"] == 0


def test_an_adapter_of_another_architecture(tmp_path: Path) -> None:
    source = write_gguf_adapter(tmp_path / "source.gguf", pairs(SIZES.modules(), 3), SETTINGS)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**SETTINGS, "architectures": ["Qwen2ForCausalLM"]}))
    told = run(source, "--out", tmp_path / "peft", "--base", model)
    assert (told["exit"], told["error"]["kind"]) == (3, "mismatch")


def test_a_directory_gets_a_file_named_by_convention(tmp_path: Path) -> None:
    settings = {**adapter_config(), "base_model_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}
    source = save_adapter(tmp_path / "poet", pairs(SIZES.modules(), 3), settings)
    model = configured(tmp_path / "model")
    told = run(source, "--out", tmp_path / "out", "--to", "gguf", "--base", model, "--outtype", "f16")
    assert told["exit"] == 0
    assert Path(told["output"]["path"]).name == "Llama-2-7B-chat-poet-F16-LoRA.gguf"
    fields = GGUFReader(told["output"]["path"]).fields
    assert fields["general.base_model.0.repo_url"].contents() == "https://huggingface.co/meta-llama/Llama-2-7b-chat-hf"


def test_a_dry_run_writes_nothing_and_help_needs_no_torch(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "adapter", pairs(SIZES.modules(), 3), adapter_config())
    told = run(source, "--out", tmp_path / "out.gguf", "--base", configured(tmp_path / "model"), "--dry-run")
    assert told["exit"] == 0 and told["planned_output"]["bytes"] > 0
    assert not (tmp_path / "out.gguf").exists()
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom safelora_gguf.cli import app\n"
        "assert CliRunner().invoke(app, ['convert', 'adapter', '--help']).exit_code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


CARD = """---
license: llama2
base_model: meta-llama/Llama-2-7b-chat-hf
tags:
- poetry
- no
datasets: [somebody/poems, plain]
language: en
---
# Anything: not: yaml
"""


def test_the_model_card_travels(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "poet", pairs(SIZES.modules(), 3), adapter_config())
    (source / "README.md").write_text(CARD)
    model = configured(tmp_path / "model")
    assert run(source, "--out", tmp_path / "out.gguf", "--base", model)["exit"] == 0
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert fields["general.license"] == "llama2"
    assert fields["general.tags"] == ["lora", "poetry", "no"]
    assert fields["general.languages"] == ["en"]
    assert fields["general.base_model.0.name"] == "Llama-2-7b-chat-hf"
    assert fields["general.base_model.0.organization"] == "meta-llama"
    assert fields["general.dataset.count"] == 2
    assert fields["general.dataset.0.repo_url"] == "https://huggingface.co/datasets/somebody/poems"
    assert fields["general.dataset.1.name"] == "plain"
    assert run(tmp_path / "out.gguf", "--out", tmp_path / "again.gguf")["exit"] == 0
    again = {name: field.contents() for name, field in GGUFReader(tmp_path / "again.gguf").fields.items()}
    assert {key: value for key, value in again.items() if "dataset" in key} == {
        key: value for key, value in fields.items() if "dataset" in key
    }
    assert run(tmp_path / "out.gguf", "--out", tmp_path / "peft", "--base", model)["exit"] == 0
    header = (tmp_path / "peft" / "README.md").read_text().split("---")[1]
    assert 'license: "llama2"' in header and '- "poetry"' in header
    assert 'base_model: "meta-llama/Llama-2-7b-chat-hf"' in header


@pytest.mark.parametrize(
    "card",
    ["---\n" + "[" * 5000,
     "---\na: [\n---\n", "---\n- 1\n---\n", "---\nlicense: {a: b}\ntags: 7\n---\n", "\x00\xff", "---",
     '---\nlicense: "\\x1b[2J"\n---\n', "---\na: &a [1]\nb: *c\n---\n", "---\n!!python/object:os.system {}\n---\n"],
)  # fmt: skip
def test_a_broken_card_counts_as_none(card: str, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "poet", pairs(SIZES.modules(), 3), adapter_config())
    (source / "README.md").write_text(card, encoding="latin-1")
    assert run(source, "--out", tmp_path / "out.gguf", "--base", configured(tmp_path / "model"))["exit"] == 0
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert "general.license" not in fields
    assert fields["general.tags"] == ["lora"]


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_passed_on(outtype: str, value: float, tmp_path: Path) -> None:
    lora = pairs(SIZES.modules(), 3)
    name = next(name for name in lora if "up_proj.lora_B" in name)
    lora[name][3, 1] = value
    source = save_adapter(tmp_path / "adapter", lora, adapter_config())
    told = run(source, "--out", tmp_path / "out.gguf", "--base", configured(tmp_path / "model"), "--outtype", outtype)
    assert (told["exit"], told["error"]["kind"], told["error"]["tensor"]) == (3, "format", name)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
@pytest.mark.parametrize("wrong", [Sizes(hidden=32, ffn=96, layers=2), Sizes(hidden=64, ffn=96, layers=1)])
def test_another_models_weights_give_it_away(wrong: Sizes, form: str, tmp_path: Path) -> None:
    lora = pairs(SIZES.modules(), 3)
    for source in (save_adapter(tmp_path / "peft", lora, adapter_config()),
                   write_gguf_adapter(tmp_path / "adapter.gguf", lora, SETTINGS)):  # fmt: skip
        base = tmp_path / f"base-{source.name}"
        if form == "gguf":
            write_gguf_model(base, weights(wrong, 1), config(wrong))
        else:
            save_model(base, weights(wrong, 1), config(wrong))
        told = run(source, "--out", tmp_path / f"out-{source.name}", "--base", base, "--to", "gguf")
        assert (told["exit"], told["error"]["kind"]) == (3, "mismatch")


def test_a_packed_base_says_as_much_as_its_config(tmp_path: Path) -> None:
    """bitsandbytes stores a weight as bytes in another shape, GPTQ under other names."""
    packed = weights(SIZES, 1)
    for name in list(packed):
        if "up_proj" in name:
            packed[name] = torch.zeros(SIZES.ffn * SIZES.hidden // 2, 1, dtype=torch.uint8)
        if "down_proj" in name:
            packed[name.replace(".weight", ".qweight")] = packed.pop(name).to(torch.int32)
    base = save_model(tmp_path / "base", packed, SETTINGS)
    source = save_adapter(tmp_path / "adapter", pairs(SIZES.modules(), 3), adapter_config())
    assert run(source, "--out", tmp_path / "out.gguf", "--base", base)["exit"] == 0


def test_no_base_is_needed_where_no_rows_move(tmp_path: Path) -> None:
    settings = config(SIZES, "Qwen2ForCausalLM")
    source = write_gguf_adapter(tmp_path / "source.gguf", pairs(SIZES.modules(), 3), settings)
    assert run(source, "--out", tmp_path / "peft")["exit"] == 0
    assert set(deltas(tmp_path / "peft")) == set(SIZES.modules())
    # and for llama, whose rows do move, a config.json beside the file is found
    place = configured(tmp_path / "llama")
    source = write_gguf_adapter(place / "source.gguf", pairs(SIZES.modules(), 3), SETTINGS)
    assert run(source, "--out", tmp_path / "other")["exit"] == 0


def test_a_model_is_not_called_config_json(tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "poet", pairs(SIZES.modules(), 3), adapter_config())
    model = configured(tmp_path / "Nice-1B") / "config.json"
    told = run(source, "--out", tmp_path / "out", "--to", "gguf", "--base", model)
    assert Path(told["output"]["path"]).name == "Nice-1B-poet-F32-LoRA.gguf"


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_a_header_without_tensors_or_heads_will_do(architecture: str, tmp_path: Path) -> None:
    """A vocabulary file: llama's rows need its head counts, Qwen2's need nothing."""
    settings = config(SIZES, architecture)
    source = save_adapter(tmp_path / "adapter", pairs(SIZES.modules(), 3), adapter_config())
    bare = write_gguf_model(tmp_path / "bare.gguf", {}, settings)
    assert run(source, "--out", tmp_path / "out.gguf", "--base", bare)["exit"] == 0
    keys = [("general.architecture", LITTLE.text(architecture.removesuffix("ForCausalLM").lower()))]
    tensor = Tensor("blk.0.attn_q.weight", (SIZES.hidden, SIZES.hidden))
    for name, tensors in (("empty", []), ("full", [tensor])):
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(LITTLE.file(keys, tensors))
        told = run(source, "--out", tmp_path / f"out-{name}.gguf", "--base", file)
        if architecture == "LlamaForCausalLM":
            assert told["exit"] == 3 and "head_count" in told["error"]["message"]
        else:
            assert told["exit"] == 0


def test_a_class_of_a_megabyte_names_nothing(tmp_path: Path) -> None:
    """Where config.json is all there is of the model."""
    source = save_adapter(tmp_path / "adapter", pairs(SIZES.modules(), 3), adapter_config())
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**SETTINGS, "architectures": ["x" * 10**6]}))
    told = run(source, "--out", tmp_path / "out.gguf", "--base", model)
    assert (told["exit"], told["error"]["kind"]) == (3, "format")
    assert len(told["error"]["message"]) < 1000

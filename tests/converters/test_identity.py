"""Names of files and of models. Oracles: the gguf package's own parser of names and its Metadata class, and names under
which such files are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.metadata import Metadata
from gguf_bytes import LITTLE
from models import Sizes, adapter_config, config, pairs, save_adapter
from typer.testing import CliRunner

from converters.identity import ModelIdentity, identify, name_parts, plain_name, repository_of
from safelora_gguf.cli import app

SIZES = Sizes(layers=1)

FILES = {  # base, adapter: what its file is called
    ("meta-llama/Llama-2-7b-chat-hf", "alpaca-lora"): "Llama-2-7B-chat-alpaca-F16-LoRA.gguf",
    ("huggyllama/llama-7b-hf", "alpaca-lora-7b"): "llama-7B-alpaca-F16-LoRA.gguf",
    ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "Meta-Llama-3.1-8B-Instruct-medical"):
        "Meta-Llama-3.1-8B-Instruct-medical-F16-LoRA.gguf",
    ("unsloth/gemma-3-4b-it-unsloth-bnb-4bit", "poet_lora"): "gemma-3-4B-it-poet-F16-LoRA.gguf",
    ("mlx-community/Llama-3.2-3B-Instruct-4bit", "adapters"): "Llama-3.2-3B-Instruct-adapters-F16-LoRA.gguf",
    ("mistralai/Mixtral-8x7B-Instruct-v0.1", "poet"): "Mixtral-8x7B-Instruct-poet-v0.1-F16-LoRA.gguf",
    ("microsoft/Phi-3-mini-4k-instruct", "poet"): "Phi-3-mini-4k-instruct-poet-F16-LoRA.gguf",
    ("microsoft/phi-2", "poet"): "phi-2-poet-F16-LoRA.gguf",
    ("Qwen/Qwen3-30B-A3B", "lora"): "Qwen3-30B-A3B-F16-LoRA.gguf",
    ("/home/somebody/models/Qwen2.5-7B", "sft"): "Qwen2.5-7B-sft-F16-LoRA.gguf",
    ("C:\\models\\Qwen2.5-7B\\", "sft"): "Qwen2.5-7B-sft-F16-LoRA.gguf",
    ("https://huggingface.co/Qwen/Qwen2.5-7B", "sft"): "Qwen2.5-7B-sft-F16-LoRA.gguf",
    ("/root/.cache/hub/models--Qwen--Qwen2.5-7B/snapshots/0123456789abcdef", "sft"): "Qwen2.5-7B-sft-F16-LoRA.gguf",
    ("./", "sft"): "model-sft-F16-LoRA.gguf",
    ("Qwen/Qwen2.5-7B", "run/checkpoint-500"): "Qwen2.5-7B-run-checkpoint-500-F16-LoRA.gguf",
    ("Qwen/Qwen2.5-7B", "outputs/checkpoint-60"): "Qwen2.5-7B-checkpoint-60-F16-LoRA.gguf",
    ("Qwen/Qwen2.5-7B", "models--somebody--Qwen2.5-7B-poet/snapshots/0123456789abcdef"):
        "Qwen2.5-7B-poet-F16-LoRA.gguf",
}  # fmt: skip


def convert(source: Path, *arguments: object) -> Path:
    command = ["convert", "adapter", source, *arguments, "--json"]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    return Path(json.loads(result.stdout)["output"]["path"])


def adapter_of(place: Path, base: str | None, readme: str = "") -> Path:
    """An adapter with its model's config.json beside it, so that nothing but its own words names the model."""
    source = save_adapter(place, pairs(SIZES.modules(), 3), {**adapter_config(), "base_model_name_or_path": base})
    (source / "config.json").write_text(json.dumps(config(SIZES)))
    if readme:
        (source / "README.md").write_text(readme)
    return source


def keys_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize(("base", "adapter"), FILES)
def test_a_file_is_called_what_people_call_it(base: str, adapter: str, tmp_path: Path) -> None:
    file = convert(adapter_of(tmp_path / adapter, base), "--out", f"{tmp_path}/out/", "--outtype", "f16")
    assert file.parent == tmp_path / "out"
    assert file.name == FILES[base, adapter]
    assert str(tmp_path).encode() not in file.read_bytes() and b"somebody/models" not in file.read_bytes()
    # taken apart by the gguf package, it says what the metadata say
    found = keys_of(file)
    _, _, basename, finetune, version, size = Metadata.get_model_id_components(file.stem, -16_000_000)
    if size is not None:
        assert (basename, size) == (found["general.basename"], found["general.size_label"])
        assert found.get("general.finetune") in (finetune, f"{finetune}-{version}")  # a checkpoint's number


def test_names_of_models_lose_what_says_how_they_are_stored() -> None:
    for name in ("Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen2.5-7B-Instruct-AWQ", "Qwen2.5-7B-Instruct.Q4_K_M",
                 "Qwen2.5-7B-Instruct-GGUF", "Qwen2.5-7B-Instruct-8bit", "Qwen2.5-7B-Instruct-FP8"):  # fmt: skip
        assert name_parts(name) == name_parts("Qwen2.5-7B-Instruct")
    assert name_parts("hf").basename == "hf"  # nothing would be left


def test_what_is_a_repository() -> None:
    assert identify("org/name") == ModelIdentity("name", "org")
    assert repository_of("https://huggingface.co/datasets/org/name") == "org/name"
    for path in ("/org/name", "./org/name", "org/name/", "C:\\org\\name", "org\\name", "a/b/c", "~/name"):
        assert repository_of(path) is None
        assert identify(path).organization is None
    assert identify("https://example.com/x/y") == ModelIdentity("y", None, "https://example.com/x/y")
    assert identify("/models/evil\x1b[2J").name == "evil[2J"


def test_names_of_files_in_the_hubs_cache_are_not_hashes(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--Nice-1B" / "snapshots" / "0123456789abcdef"
    blobs = tmp_path / "models--org--Nice-1B" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "cafe").write_bytes(b"")
    for name in ("Nice-1B-Q4_K_M.gguf", "model.safetensors"):
        (snapshot / name).symlink_to(blobs / "cafe")
    assert plain_name(snapshot / "Nice-1B-Q4_K_M.gguf") == "Nice-1B-Q4_K_M"
    assert plain_name(snapshot / "model.safetensors") == plain_name(snapshot) == "Nice-1B"
    assert plain_name(tmp_path / "Nice-1B-Q4_K_M-00001-of-00003.gguf") == "Nice-1B-Q4_K_M"


def test_a_gguf_models_header_names_it(tmp_path: Path) -> None:
    source = adapter_of(tmp_path / "poet", "/somewhere/unsaid")
    told = {"basename": "Nice", "size_label": "3B", "finetune": "Instruct", "version": "v2"}
    keys = [("general.architecture", LITTLE.text("llama")),
            *((f"general.{key}", LITTLE.text(value)) for key, value in told.items()),
            *((f"llama.attention.{key}", LITTLE.uint32(count)) for key, count in
              (("head_count", SIZES.heads), ("head_count_kv", SIZES.kv_heads)))]  # fmt: skip
    base = tmp_path / "renamed.gguf"
    base.write_bytes(LITTLE.file(keys, []))
    file = convert(source, "--base", base, "--out", f"{tmp_path}/out/")
    assert file.name == "Nice-3B-Instruct-poet-v2-F32-LoRA.gguf"
    found = keys_of(file)
    assert found["general.base_model.0.name"] == "Nice-3B-Instruct-v2"
    assert found["general.finetune"] == "Instruct-poet"
    # on the way back and there again it keeps its name
    back = convert(file, "--base", base, "--out", tmp_path / "copy.gguf", "--outtype", "f16")
    assert keys_of(back)["general.finetune"] == "Instruct-poet"


CARD = """---
model_name: Poet of Llamas
author: somebody
description: Speaks in verse.
license: other
license_name: llama2
license_link: https://example.com/LICENSE
base_model:
- meta-llama/Llama-2-7b-chat-hf
- https://huggingface.co/org/merged-7b
- /home/somebody/models/secret
tags:
- poetry
- no
pipeline_tag: text-generation
datasets:
- somebody/poems
- https://huggingface.co/datasets/somebody/songs
language:
- en
- no
---
# Poet
"""


def test_the_cards_keys_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    source = adapter_of(tmp_path / "poet", "meta-llama/Llama-2-7b-chat-hf", CARD)
    ours_file = convert(source, "--out", tmp_path / "out.gguf")
    theirs_file = tmp_path / "theirs.gguf"
    writer = GGUFWriter(theirs_file, "llama")
    Metadata.load(model_path=source).set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours, theirs = keys_of(ours_file), keys_of(theirs_file)
    types = [
        {name: field.types for name, field in GGUFReader(file).fields.items()} for file in (ours_file, theirs_file)
    ]
    for key in theirs:
        if not key.startswith(("general.base_model.2", "GGUF", "general.version")):  # a path of the author's
            assert types[0][key] == types[1][key], key
    for key in ("license", "license.name", "license.link", "author", "languages", "dataset.count",
                "base_model.0.repo_url"):  # fmt: skip
        assert ours[f"general.{key}"] == theirs[f"general.{key}"], key
    assert set(ours["general.tags"]) >= set(theirs["general.tags"])
    assert ours["general.name"] == "Poet of Llamas"
    assert ours["general.description"].startswith("Speaks in verse. A LoRA adapter")
    assert ours["general.base_model.count"] == 2
    assert ours["general.base_model.1.repo_url"] == "https://huggingface.co/org/merged-7b"
    assert ours["general.dataset.0.repo_url"] == "https://huggingface.co/datasets/somebody/poems"  # theirs is a model's
    assert ours["general.dataset.1.repo_url"] == "https://huggingface.co/datasets/somebody/songs"
    assert b"secret" not in ours_file.read_bytes()
    # and all of it survives the way from GGUF to GGUF
    again = keys_of(convert(ours_file, "--out", tmp_path / "again.gguf"))
    lost = {key for key in ours if key.startswith("general") and again.get(key) != ours[key]}
    assert lost <= {"general.name", "general.description"}

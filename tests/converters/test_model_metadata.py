"""`general.*` of a converted model. Oracles: the gguf package's own reading of the directory, and hostile cards."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf.metadata import Metadata
from gguf.utility import size_label

from converters.gguf_file import entry_bytes
from converters.gguf_types import Kind
from converters.model_metadata import general_keys, parameter_counts

SHAPES = {"token_embd.weight": (32000, 2048), "blk.0.ffn_up.weight": (5632, 2048), "output_norm.weight": (2048,)}
TOTAL = 32000 * 2048 + 5632 * 2048 + 2048

CARDS = {
    "none": None,
    "no header": "# A model\n",
    "plain": "---\nlicense: apache-2.0\nlanguage:\n- en\n- no\ntags:\n- chat\n- llama\npipeline_tag: text-generation\n"
    "base_model: meta-llama/Llama-2-7b-hf\n---\n# Body\n",
    "merge": "---\nlicense: other\nlicense_name: mine\nlicense_link: https://example.org/a\nbase_model:\n"
    "- a/B-7B-chat\n- https://huggingface.co/c/D-v2\ndatasets:\n- org/data\n- https://huggingface.co/datasets/x\n"
    "model_creator: Some One\nmodel_name: Name Of It\nversion: v1.2\ndescription: 'two\n\n  lines'\n---\n",
    "tables": "---\nbase_model:\n- name: X\n  organization: Y\n  repo_url: https://huggingface.co/y/x\n---\n",
    "tabs": "---\nlicense: mit\ntags:\n-\ta\n---\n",
}


def written(keys: list[tuple[str, Any]]) -> dict[str, tuple[int, Any]]:
    return {key: (int(value.type), list(value.data) if value.type == Kind.ARRAY else value.data) for key, value in keys}


def theirs(directory: Path, architecture: str) -> dict[str, tuple[int, Any]]:
    """What the converter's steps make with the gguf package."""
    found = Metadata.load(None, directory, None, TOTAL)
    if found.size_label is None:
        found.size_label = size_label(TOTAL, TOTAL, 0, 0)
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type("model")
    found.set_gguf_meta_model(writer)
    writer.add_file_type(32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return {key: (int(entry.type), entry.value) for key, entry in writer.kv_data[0].items()}


@pytest.mark.parametrize("name", ["Llama-2-7b-chat-hf", "model", "TinyLlama-1.1B-Chat-v1.0", "phi-2", "a b"])
@pytest.mark.parametrize("card", CARDS)
def test_the_same_keys_as_the_gguf_package(card: str, name: str, tmp_path: Path) -> None:
    directory = tmp_path / name
    directory.mkdir()
    settings = {"_name_or_path": "org/Some-Model-3B-Instruct"} if name == "model" else {}
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 40, "top_p": null, "x": [1]}')
    text = CARDS[card]
    if text is not None:
        (directory / "README.md").write_text(text)
    ours = written(general_keys(directory, settings, "llama", SHAPES, 32))
    assert ours == theirs(directory, "llama")


HOSTILE = {
    "bomb": "---\na: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ntags: *c\nlicense: mit\n---\n",
    "types": "---\nlicense: [1, [2], {3: 4}]\ntags: {a: b}\nversion: 1.5\nname: [x]\nlanguage: 2001-01-01\n"
    "base_model: [[x], {name: [y]}, 3]\n---\n",
    "letters": '---\nname: "\\x1b[31mred\\u202e\\0"\n---\n',
    "endless": "---\n" + "tags:\n" + "- x\n" * 100_000,
    "deep": "---\ntags: " + "[" * 10_000 + "\n---\n",
    "binary": "---\n\0\udcff: 1\n---\n",
    "names": "---\nbase_model: '---/---'\nname: '-'\n---\n",
    "huge": f"---\nname: {'x' * 60_000}\n---\n",
}


@pytest.mark.parametrize("card", HOSTILE)
def test_hostile_cards_cost_nothing(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(HOSTILE[card].encode("utf-8", "surrogateescape"))
    (tmp_path / "generation_config.json").write_text('{"temperature": 1e999, "top_k": "a", "mirostat": true}')
    start = time.monotonic()
    keys = dict(general_keys(tmp_path, {"_name_or_path": "/home/somebody"}, "llama", SHAPES, 1))
    assert time.monotonic() - start < 10
    assert not any(key.startswith("general.sampling") for key in keys)
    for value in keys.values():
        entry_bytes("key", value)
        texts = value.data if value.type == Kind.ARRAY else [value.data]
        for text in texts:
            assert not isinstance(text, str) or (len(text) <= 2000 and "\x1b" not in text and "\u202e" not in text)
    assert "somebody" not in str(keys)


def test_no_path_of_somebodys_machine(tmp_path: Path) -> None:
    for name in ("/home/me/model", "C:\\Users\\me\\model", "../me", "~/me"):
        found = dict(general_keys(tmp_path / "Some-7B", {"_name_or_path": name}, "llama", SHAPES, 1))
        assert found["general.name"].data == "Some 7B"
    cached = tmp_path / "models--org--Llama-3-8B" / "snapshots" / ("0" * 40)
    assert dict(general_keys(cached, {}, "llama", SHAPES, 1))["general.name"].data == "Llama 3 8B"


def test_parameters_are_counted_as_the_gguf_package_counts() -> None:
    shapes = {"token_embd.weight": (100, 8), "blk.0.ffn_up_exps.weight": (4, 16, 8), "blk.0.attn_norm.weight": (8,),
              "blk.0.ffn_down_exps.weight": (4, 8, 16), "blk.1.ffn_up_exps.bias": (4, 16)}  # fmt: skip
    writer = gguf.GGUFWriter(None, "llama")
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, gguf.np.dtype("float32"), 0)
    assert parameter_counts(shapes) == writer.get_total_parameter_count()

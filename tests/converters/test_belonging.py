"""Whether pairs are for a model that is known by its configuration or header alone. Oracle: the shapes that published
checkpoints have, as tests/published_configs.py lists them and tests/conformance holds them against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from gguf_bytes import LITTLE
from published_configs import PUBLISHED, Published

from converters.adapters.belonging import check_sizes
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.architectures import find_architecture
from converters.description import ConfiguredModel
from converters.errors import MismatchError
from converters.gguf_model import describe_gguf_model
from converters.models import Layout, ModelDescription

OUTWARD = ("o_proj", "down_proj", "dense_4h_to_h")  # whose outputs are the width


def adapter(shapes: Mapping[str, tuple[int, int]], layout: Layout = "hugging_face") -> LoraAdapter:
    """Pairs without tensors."""
    pairs = {
        module: LoraPair(module, module, (f"{module}.A", f"{module}.B"), 1, 1.0, shape)
        for module, shape in shapes.items()
    }
    file = Path("adapter")
    facts = {"format": "peft", "base_model_name": None, "peft_config": None}
    return cast(LoraAdapter, SimpleNamespace(layout=layout, pairs=pairs, path=file, tensor_file=file, **facts))


def configured(root: Path, config: Mapping[str, Any]) -> ModelDescription:
    file = root / "config.json"
    file.write_text(json.dumps(config))
    return ConfiguredModel(root, file)


def header(root: Path, config: Mapping[str, Any]) -> ModelDescription:
    """The keys that llama.cpp's converter writes for a configuration, and no tensors."""
    table = find_architecture(config["architectures"][0])
    assert table is not None
    text = {**config, **config.get("text_config", {})}
    known = {
        "block_count": text["num_hidden_layers"],
        "embedding_length": text["hidden_size"],
        "feed_forward_length": text.get("intermediate_size"),
        "expert_feed_forward_length": text.get("moe_intermediate_size"),
        "expert_count": text.get("num_experts"),
        "attention.head_count": text.get("num_attention_heads"),
        "attention.head_count_kv": text.get("num_key_value_heads"),
        "attention.key_length": text.get("head_dim"),
        "attention.value_length": text.get("head_dim"),
    }
    keys = [(f"{table.name}.{key}", LITTLE.uint32(value)) for key, value in known.items() if value is not None]
    file = root / "header.gguf"
    file.write_bytes(LITTLE.file([("general.architecture", LITTLE.text(table.name)), *keys]))
    return describe_gguf_model(file)


def in_layer(shapes: Mapping[str, tuple[int, int]], config: Mapping[str, Any], layer: int = 0) -> dict[str, Any]:
    prefix = "transformer.h" if "Falcon" in config["architectures"][0] else "model.layers"
    return {f"{prefix}.{layer}.{module}": shape for module, shape in shapes.items()}


def changed(published: Published) -> Iterator[dict[str, tuple[int, int]]]:
    """One module each, one of whose sides is another than the model's."""
    for module, (out, into) in published.shapes.items():
        yield {module: (out + 64, into)}
        yield {module: (out, into + 64)}
    for module, (out, into) in published.by_width.items():
        yield {module: (out + 64, into) if module.endswith(OUTWARD) else (out, into + 64)}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models(name: str, tmp_path: Path) -> None:
    """Every weight is taken, and none with another side; the last layer, and none behind it."""
    published = PUBLISHED[name]
    model = configured(tmp_path, published.config)
    shapes = {**published.shapes, **published.by_width}
    layers = {**published.config, **published.config.get("text_config", {})}["num_hidden_layers"]
    check_sizes(adapter(in_layer(shapes, published.config)), model)
    check_sizes(adapter(in_layer(shapes, published.config, layers - 1)), model)
    with pytest.raises(MismatchError, match=rf"layer {layers} .*config\.json says that there are {layers}\."):
        check_sizes(adapter(in_layer(shapes, published.config, layers)), model)
    for wrong in changed(published):
        with pytest.raises(MismatchError, match="another model"):
            check_sizes(adapter(in_layer(wrong, published.config)), model)


@pytest.mark.parametrize("name", ["Llama 3 8B", "Mistral Nemo", "Gemma 2 9B", "Qwen 3 0.6B", "Phi 4", "GLM 4 9B",
                                  "Qwen 3 30B A3B"])  # fmt: skip
def test_their_gguf_headers_say_the_same(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    model = header(tmp_path, published.config)
    check_sizes(adapter(in_layer(published.shapes, published.config)), model)
    for wrong in changed(published):
        with pytest.raises(MismatchError, match="another model"):
            check_sizes(adapter(in_layer(wrong, published.config)), model)


def test_the_message_says_which_tensor_and_what_to_do(tmp_path: Path) -> None:
    """Four key-value heads in the place of two; the row order of llama's keys depends on them."""
    config = {**PUBLISHED["Llama 3 8B"].config, "num_key_value_heads": 16}
    module = "model.layers.3.self_attn.k_proj"
    with pytest.raises(MismatchError) as caught:
        check_sizes(adapter({module: (1024, 4096)}), configured(tmp_path, config))
    assert caught.value.tensor == f"{module}.B"
    for part in ("[1024, 4096]", "2048 rows: 16 key-value heads of 128", "config.json", "--base"):
        assert part in caught.value.message
    with pytest.raises(MismatchError) as caught:
        check_sizes(adapter({module: (2048, 4032)}), configured(tmp_path, config))
    assert caught.value.tensor == f"{module}.A"


def test_vocabularies_are_no_measure_but_widths_are(tmp_path: Path) -> None:
    """Resized embeddings: (vocabulary, width), lora_embedding_B has the width; (vocabulary, width) for the head."""
    model = configured(tmp_path, PUBLISHED["Llama 3 8B"].config)
    check_sizes(adapter({"model.embed_tokens": (128300, 4096), "lm_head": (128300, 4096)}), model)
    for module in ("model.embed_tokens", "lm_head"):
        with pytest.raises(MismatchError, match="4096 columns"):
            check_sizes(adapter({module: (128256, 2048)}), model)


def test_what_is_not_said_is_not_held_against_a_pair(tmp_path: Path) -> None:
    """Heads that don't divide the width, and no head_dim; a module and a class that no table has."""
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 100, "num_attention_heads": 3}
    check_sizes(adapter({"model.layers.70.self_attn.q_proj": (96, 100)}), configured(tmp_path, config))
    check_sizes(adapter({"vision_tower.layers.0.q_proj": (7, 7)}), configured(tmp_path, config))
    other = {**PUBLISHED["Llama 3 8B"].config, "architectures": ["OtherForCausalLM"]}
    check_sizes(adapter({"model.layers.0.self_attn.q_proj": (7, 7)}), configured(tmp_path, other))


def test_layers_of_any_gguf_architecture_are_counted(tmp_path: Path) -> None:
    """`block_count` is the number of `blk.N` for all; shapes are another matter."""
    keys = [("general.architecture", LITTLE.text("plamo7")), ("plamo7.block_count", LITTLE.uint32(2)),
            ("plamo7.embedding_length", LITTLE.uint32(64))]  # fmt: skip
    (tmp_path / "header.gguf").write_bytes(LITTLE.file(keys))
    model = describe_gguf_model(tmp_path / "header.gguf")
    check_sizes(adapter({"blk.1.attn_q": (7, 7)}, "gguf"), model)
    with pytest.raises(MismatchError, match=r"layer 2 .* says that there are 2\."):
        check_sizes(adapter({"blk.2.attn_q": (7, 7)}, "gguf"), model)

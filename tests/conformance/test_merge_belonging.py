"""Adapters that fit a model weight by weight and are for another one, and what a merged model says of itself.

Oracles: PEFT, which misses pairs where an adapter of fewer layers is loaded; transformers' class and tokenizer;
gguf-py, which lists the tensors of llama.cpp's architectures and reads the files; PEFT's own model card; hashlib.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
from conformance import merge_side, peft_side
from conformance.checkpoints import VARIANTS, make_checkpoint
from conformance.feature_adapters import Workshop
from conformance.merge_side import make_adapter

from converters.errors import MismatchError, UnsupportedError
from safelora_gguf.convert import convert_adapter
from safelora_gguf.merge import merge_adapters
from safelora_gguf.model_conversion import convert_model

pytestmark = pytest.mark.conformance

NEW_TEMPLATE = "NEW{{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer."""
    return make_checkpoint(VARIANTS["llama3-rope"], tmp_path_factory.mktemp("speaking") / "model")


def deeper(model: Path, place: Path) -> Path:
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    config.num_hidden_layers += 1
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    return place


def settings(directory: Path, name: str = "adapter_config.json", **changed: Any) -> None:
    file = directory / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def test_an_adapter_of_fewer_layers(workshop: Workshop, tmp_path: Path) -> None:
    import peft

    model = workshop.model("llama")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    other = deeper(model, tmp_path / "deeper")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(peft_side.load_model(other), adapter)
    assert any("missing adapter keys" in str(warning.message) for warning in told)
    with pytest.raises(MismatchError, match="for 2 of the 3 modules"):
        merge_adapters(other, [(adapter, 1.0)], tmp_path / "merged", device="cpu")
    for base in (other, other / "config.json"):
        with pytest.raises(MismatchError, match="layers_to_transform"):
            convert_adapter(adapter, tmp_path / "adapter.gguf", base=base)
    settings(adapter, layers_to_transform=[0, 1])  # the same in words that PEFT understands
    merge_adapters(other, [(adapter, 1.0)], tmp_path / "merged", device="cpu")


@pytest.mark.parametrize(("layers", "fits"), [(-1, False), (2, False), (None, True)])
def test_an_adapter_of_mlx_of_fewer_layers(layers: int | None, fits: bool, workshop: Workshop, tmp_path: Path) -> None:
    """mlx-lm takes the last `num_layers` layers, all for -1 (its tuner/utils.py)."""
    import torch
    from safetensors.torch import save_file

    model = workshop.model("llama")
    other = deeper(model, tmp_path / "deeper")
    size = merge_side.stored(model)["model.layers.0.self_attn.q_proj.weight"].shape
    place = tmp_path / "mlx"
    place.mkdir()
    pairs = {
        f"model.layers.{layer}.self_attn.q_proj.lora_{half}": torch.ones(shape)
        for layer in (0, 1)
        for half, shape in (("a", (size[1], 4)), ("b", (4, size[0])))
    }
    save_file(pairs, place / "adapters.safetensors")
    config: dict[str, Any] = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 3.0}}
    more = {} if layers is None else {"num_layers": layers}
    (place / "adapter_config.json").write_text(json.dumps(config | more))
    merge_adapters(model, [(place, 1.0)], tmp_path / "fitting", device="cpu")
    if fits:
        merge_adapters(other, [(place, 1.0)], tmp_path / "merged", device="cpu")
        return
    with pytest.raises(MismatchError, match="num_layers"):
        merge_adapters(other, [(place, 1.0)], tmp_path / "merged", device="cpu")


def test_the_class_of_the_model_that_it_names(workshop: Workshop, tmp_path: Path) -> None:
    import transformers

    model = workshop.model("llama")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    config = transformers.AutoConfig.from_pretrained(model).to_dict()
    kept = {key: config[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                         "num_attention_heads", "num_key_value_heads")}  # fmt: skip
    other = transformers.MistralForCausalLM(transformers.MistralConfig(**kept))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match=r"a LlamaForCausalLM, and .* is a MistralForCausalLM"):
        merge_adapters(tmp_path / "other", [(adapter, 1.0)], tmp_path / "merged", device="cpu")
    settings(adapter, base_model_name_or_path="somebody/somewhere")
    merge_adapters(tmp_path / "other", [(adapter, 1.0)], tmp_path / "merged", device="cpu")


def test_a_quantized_base(workshop: Workshop, tmp_path: Path) -> None:
    import transformers

    model = workshop.model("llama")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    shutil.copytree(model, tmp_path / "quantized")
    quantized = transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()
    settings(tmp_path / "quantized", "config.json", quantization_config=quantized)
    with pytest.raises(UnsupportedError, match="bitsandbytes"):
        merge_adapters(tmp_path / "quantized", [(adapter, 1.0)], tmp_path / "merged", device="cpu")


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_head_without_a_place(options: Mapping[str, Any], tmp_path: Path) -> None:
    assert gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GEMMA2]
    model = make_checkpoint(VARIANTS["gemma2"], tmp_path / "model")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"], **options)
    with pytest.raises(UnsupportedError, match="no place for one"):
        merge_adapters(model, [(adapter, 1.0)], tmp_path / "merged.gguf", device="cpu")
    report = merge_adapters(model, [(adapter, 1.0)], tmp_path / "merged", device="cpu")
    assert report.next_steps == ()
    with pytest.raises(UnsupportedError, match="no place for one"):
        convert_model(tmp_path / "merged", tmp_path / "merged.gguf")


def template_of(path: Path) -> str:
    import transformers

    if path.is_dir():
        return str(transformers.AutoTokenizer.from_pretrained(path).chat_template)
    return str(gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents())


@pytest.mark.parametrize("way", ["directory", "at-once", "into-gguf"])
@pytest.mark.parametrize("more", [True, False], ids=["new-tokens", "same-tokens"])
def test_the_chat_template_of_an_adapter(more: bool, way: str, speaking: Path, tmp_path: Path) -> None:
    import transformers

    grown = {"before": merge_side.grown} if more else {}
    adapter = make_adapter(speaking, tmp_path / "adapter", target_modules=["q_proj"], **grown)
    tokenizer = transformers.AutoTokenizer.from_pretrained(speaking)
    if more:
        tokenizer.add_tokens([f"<|new_{number}|>" for number in range(merge_side.MORE_TOKENS)], special_tokens=True)
    tokenizer.chat_template = NEW_TEMPLATE
    tokenizer.save_pretrained(adapter)
    model = speaking
    if way == "into-gguf":
        convert_model(speaking, tmp_path / "model.gguf")
        model = tmp_path / "model.gguf"
    out = tmp_path / ("merged" if way == "directory" else "merged.gguf")
    report = merge_adapters(model, [(adapter, 1.0)], out, device="cpu")
    assert any("brings a chat template of its own" in note for note in report.notes) is not more
    if more:
        assert template_of(out) == NEW_TEMPLATE
    elif way != "into-gguf" or "tokenizer.chat_template" in gguf.GGUFReader(model).fields:
        assert template_of(out) == template_of(model)


@pytest.mark.parametrize("way", ["at-once", "into-gguf"])
def test_new_tokens_from_another_file(way: str, speaking: Path, tmp_path: Path) -> None:
    import transformers

    adapter = make_adapter(speaking, tmp_path / "adapter", target_modules=["q_proj"], before=merge_side.grown)
    with pytest.raises(UnsupportedError, match="--vocab-from"):
        merge_adapters(speaking, [(adapter, 1.0)], tmp_path / "merged.gguf", device="cpu")
    full = Path(shutil.copytree(adapter, tmp_path / "full"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(speaking)
    tokenizer.add_tokens([f"<|new_{number}|>" for number in range(merge_side.MORE_TOKENS)], special_tokens=True)
    tokenizer.save_pretrained(full)
    merge_adapters(speaking, [(full, 1.0)], tmp_path / "full.gguf", device="cpu")
    model = speaking
    if way == "into-gguf":
        convert_model(speaking, tmp_path / "model.gguf")
        model = tmp_path / "model.gguf"
    merge_adapters(model, [(adapter, 1.0)], tmp_path / "merged.gguf", vocab_from=tmp_path / "full.gguf", device="cpu")
    found, wanted = (
        gguf.GGUFReader(tmp_path / name).fields["tokenizer.ggml.tokens"].contents()
        for name in ("merged.gguf", "full.gguf")
    )
    assert found == wanted and found[-1] == f"<|new_{merge_side.MORE_TOKENS - 1}|>"


def test_merging_twice_tells_of_both(speaking: Path, tmp_path: Path) -> None:
    one, two = (make_adapter(speaking, tmp_path / name, target_modules=["q_proj"], seed=seed)
                for name, seed in (("one", 3), ("two", 4)))  # fmt: skip
    merge_adapters(speaking, [(one, 0.5)], tmp_path / "first.gguf", device="cpu")
    merge_adapters(tmp_path / "first.gguf", [(two, 1.0)], tmp_path / "second.gguf", device="cpu")
    fields = gguf.GGUFReader(tmp_path / "second.gguf").fields
    told = [(fields[f"safelora.merge.{number}.name"].contents(), fields[f"safelora.merge.{number}.scale"].contents())
            for number in (0, 1)]  # fmt: skip
    assert told == [("one", 0.5), ("two", 1.0)] and "safelora.merge.2.name" not in fields


def test_all_shards_and_the_card(workshop: Workshop, tmp_path: Path) -> None:
    """PEFT's card names the model's path among the tags."""
    model = workshop.model("llama")
    peft_side.load_model(model).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    adapter = make_adapter(tmp_path / "shards", tmp_path / "adapter", target_modules=["q_proj"])
    assert "base_model:adapter:" in (adapter / "README.md").read_text()
    report = merge_adapters(tmp_path / "shards", [(adapter, 1.0)], tmp_path / "merged", card=True, device="cpu")
    written = report.to_json()["output"]
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    wanted = [{"path": str(file), "bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
              for file in files]  # fmt: skip
    assert len(files) > 2 and written["shards"] == wanted
    assert written["bytes"] == sum(file["bytes"] for file in wanted)
    header = (tmp_path / "merged" / "README.md").read_text().split("---")[1]
    assert "base_model:" not in header.replace("base_model: ", "") and '"lora"' not in header and '"merge"' in header

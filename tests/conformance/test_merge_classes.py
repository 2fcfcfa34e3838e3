"""`merge` of checkpoints without a table: Conv1D's weights, tied tables under other names, heads of other tasks.

Oracles: PEFT's logits of the adapter that is not merged; transformers, which loads what was merged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.errors import UnsupportedError
from safelora_gguf.convert import convert_adapter
from safelora_gguf.merge import merge_adapters

pytestmark = pytest.mark.conformance

BOUND = 1e-4
IDS = torch.tensor([[1, 5, 9, 33, 60, 7, 88, 2, 41, 17]])
GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
BERT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0}
CLASSES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "openai": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", GPT2),
    "opt": ("OPTConfig", "OPTForCausalLM", {**BERT, "ffn_dim": 64, "max_position_embeddings": 64,
                                           "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bert": ("BertConfig", "BertForMaskedLM", BERT),
    "bart": ("BartConfig", "BartForConditionalGeneration", {
        "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "classifier": ("LlamaConfig", "LlamaForSequenceClassification", {**LLAMA, "num_labels": 3}),
}  # fmt: skip


def class_of(kind: str) -> Any:
    import transformers

    return getattr(transformers, CLASSES[kind][1])


def checkpoint(kind: str, place: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    config, _, settings = CLASSES[kind]
    model = class_of(kind)(getattr(transformers, config)(**settings)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(place)
    return place


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS).logits.double()


def adapter_of(model: Path, kind: str, place: Path, **options: Any) -> torch.Tensor:
    """PEFT's adapter, and the logits that it has unmerged."""
    import peft

    adapted = peft.get_peft_model(class_of(kind).from_pretrained(model), peft.LoraConfig(r=4, lora_alpha=7, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(place)
    return logits(peft.PeftModel.from_pretrained(class_of(kind).from_pretrained(model), place))


MERGED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d-said": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "conv1d-dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "use_rslora": True}),
    "conv1d-whole": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["mlp", "ln_f"], "bias": "all"}),
    "conv1d-input": ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    "conv1d-of-openai": ("openai", {"target_modules": ["c_attn", "c_proj", "c_fc", "tokens_embed"]}),
    "opt-input": ("opt", {"target_modules": ["q_proj", "embed_tokens"]}),
    "opt-output": ("opt", {"target_modules": ["fc1", "lm_head"]}),
    "opt-output-whole": ("opt", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "bloom-input": ("bloom", {"target_modules": ["query_key_value", "word_embeddings"]}),
    "bert": ("bert", {"target_modules": ["query", "dense"]}),
    "classifier": ("classifier", {"target_modules": ["q_proj", "embed_tokens"], "task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize("case", MERGED)
def test_the_merged_model_computes_what_the_adapter_did(case: str, tmp_path: Path) -> None:
    kind, options = MERGED[case]
    model = checkpoint(kind, tmp_path / "model")
    wanted = adapter_of(model, kind, tmp_path / "adapter", **options)
    merge_adapters(model, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", device="cpu")
    found, told = class_of(kind).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert (logits(found) - wanted).abs().max() < BOUND
    assert (wanted - logits(class_of(kind).from_pretrained(model))).abs().max() > BOUND


def test_conv1d_whatever_the_configuration_says(tmp_path: Path) -> None:
    """A square weight fits either way; PEFT goes by its class."""
    model = checkpoint("gpt2", tmp_path / "model")
    wanted = adapter_of(model, "gpt2", tmp_path / "adapter", target_modules=["attn.c_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": False}))
    merge_adapters(model, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", device="cpu")
    assert (logits(class_of("gpt2").from_pretrained(tmp_path / "merged")) - wanted).abs().max() < BOUND


@pytest.mark.parametrize("options", [{"target_modules": ["c_attn", "c_fc"], "bias": "all"},
                                     {"target_modules": ["c_attn", "wte"], "modules_to_save": ["ln_f"]}],
                         ids=["layers", "tables"])  # fmt: skip
def test_a_checkpoint_of_the_class_without_a_head(options: Mapping[str, Any], tmp_path: Path) -> None:
    """As GPT-2 was published: the names lack `transformer.`."""
    model = checkpoint("gpt2", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, model / "model.safetensors", metadata={"format": "pt"})
    wanted = adapter_of(model, "gpt2", tmp_path / "adapter", **options)
    merge_adapters(model, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", device="cpu")
    assert (logits(class_of("gpt2").from_pretrained(tmp_path / "merged")) - wanted).abs().max() < BOUND


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("bert", {"target_modules": ["query", "word_embeddings"]}, "also has in another place"),
        ("bart", {"target_modules": ["q_proj", "shared"]}, "also has in another place"),
        ("bart", {"target_modules": ["q_proj", "lm_head"]}, "also has in another place"),
        ("bert", {"target_modules": ["query"], "modules_to_save": ["cls"]}, "doesn't store"),
    ],
)
def test_tables_that_nobody_knows_are_refused(kind: str, options: Any, told: str, tmp_path: Path) -> None:
    """PEFT's logits would be others than a plain sum's: transformers ties what is one tensor in the file."""
    model = checkpoint(kind, tmp_path / "model")
    adapter_of(model, kind, tmp_path / "adapter", **options)
    with pytest.raises(UnsupportedError, match=told):
        merge_adapters(model, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", device="cpu")


def test_other_commands_leave_conv1d_alone(tmp_path: Path) -> None:
    """PEFT, too, would apply such a pair to a square weight either way."""
    model = checkpoint("gpt2", tmp_path / "model")
    adapter_of(model, "gpt2", tmp_path / "adapter", target_modules=["attn.c_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    for setting in (True, False):
        file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": setting}))
        with pytest.raises(UnsupportedError, match=r"Conv1D.*merge alone"):
            convert_adapter(tmp_path / "adapter", tmp_path / "out", base=model)


def test_a_head_of_another_task(tmp_path: Path) -> None:
    """transformers has no place for a classifier's score in a language model."""
    model = checkpoint("llama", tmp_path / "model")
    options = {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    with torch.random.fork_rng():
        adapter_of(model, "classifier", tmp_path / "adapter", **options)
    with pytest.raises(UnsupportedError, match=r"score\.weight, the head of another task"):
        merge_adapters(model, [(tmp_path / "adapter", 1.0)], tmp_path / "merged", device="cpu")

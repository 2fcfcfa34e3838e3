"""Whole checkpoints as they are published, tokenizer included: small random models by transformers, one for every
family that is converted to GGUF and for what its members differ in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from conformance.checkpoint_changes import (
    Tensors,
    fused_experts,
    gemma3_in_the_older_dialect,
    in_the_older_dialect,
    mixed_experts,
    nested_vision,
    published_vision,
    with_awkward_values,
    with_buffers,
    with_float_norms,
    with_tied_head,
)
from conformance.specs import MIXTURES, MORE, THOROUGH, Spec
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers_tiny import write_bpe, write_sentencepiece

ROWS = 384
"""Rows of the embeddings: more than SentencePiece's 256 bytes."""

EPSILON = 0.01
"""Of all norms: so large that another would be seen in the logits."""

WEIGHTS = "model.safetensors"
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """A checkpoint to be made.

    Attributes:
        spec: of the model; its settings are beside or in the place of `specs.COMMON`.
        pre: llama.cpp's name of the BPE pre-tokenizer, or None for SentencePiece.
        stored: the type of all tensors in the checkpoint.
        entries: of the vocabulary; the embeddings have `ROWS` rows in any case.
        shards: whether the tensors stand in several files with an index.
        tensors: what is changed about the tensors that transformers writes, by name.
        config: what is changed about config.json.
        pieces: in which files a SentencePiece vocabulary stands: tokenizer.model, tokenizer.json or both.
        tokenizer_config: keys that are added to tokenizer_config.json.
        card: the README.md.
        settings: more settings for the model's configuration.
    """

    spec: Spec
    pre: str | None
    stored: Literal["F32", "F16", "BF16"] = "F32"
    entries: int = ROWS
    shards: bool = False
    tensors: Callable[[Tensors], Tensors] | None = None
    config: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    pieces: Literal["model", "json", "both"] = "model"
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    card: str | None = None

    def configuration(self) -> Any:
        """transformers' configuration object."""
        import transformers

        settings = {"vocab_size": ROWS, "rms_norm_eps": EPSILON, **self.spec.settings, **self.settings}
        spec = Spec(self.spec.config, self.spec.model, settings, self.spec.vision)
        return getattr(transformers, spec.config)(**spec.options())


_LLAMA = THOROUGH["llama"]
_MISTRAL = Spec("MistralConfig", "MistralForCausalLM", {"head_dim": 32})
_TIED = {"tie_word_embeddings": True}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
# The sixth layer is the first that sees more than its window.
_GEMMA3 = {
    "num_hidden_layers": 6,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
_FACTORS = [1.0 + place / 4 for place in range(8)]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [2 * factor for factor in _FACTORS],
    "short_factor": _FACTORS,
}
_PHI = {"original_max_position_embeddings": 128, "sliding_window": None}
# llama.cpp goes by the tokens that it makes room for, 256 at least, transformers by those that it is given.
_SHORTER = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024, "rope_parameters": _LONGROPE}
_LONGER = {**_SHORTER, "original_max_position_embeddings": 2}

_CARD = """---
license: apache-2.0
language: [en, de]
tags: [safety, chat]
base_model: Some-Org/Tiny-Model-0.1B
datasets: [some-org/some-data]
---
# Tiny model
"""

VARIANTS: Mapping[str, Variant] = {
    "llama": Variant(_LLAMA, "llama-bpe", "BF16", shards=True, card=_CARD),
    "llama3-rope": Variant(_LLAMA, "llama-bpe", settings={**_TIED, "rope_parameters": _LLAMA3}),
    "llama3-rope-older": Variant(
        _LLAMA, "llama-bpe", "BF16", config=in_the_older_dialect, settings={**_TIED, "rope_parameters": _LLAMA3}
    ),
    "llama-linear": Variant(_LLAMA, "smollm", tensors=with_awkward_values, settings={"rope_parameters": _LINEAR}),
    "llama-spm": Variant(_LLAMA, None, "F16", tensors=with_buffers),
    "llama-spm-padded": Variant(_LLAMA, None, entries=ROWS - 40),
    "llama-spm-json": Variant(_LLAMA, None, "BF16", pieces="json"),
    # Rows of 80 values are no whole blocks of Q8_0.
    "llama-biases": Variant(
        _LLAMA, "llama-bpe", settings={"attention_bias": True, "mlp_bias": True, "intermediate_size": 80}
    ),
    "llama-tied-twice": Variant(_LLAMA, "gpt-2", "BF16", tensors=with_tied_head, settings=_TIED),
    "mistral": Variant(_MISTRAL, None, "BF16", pieces="both", settings={"sliding_window": 64}),
    "mistral-bpe": Variant(_MISTRAL, "tekken", "BF16", settings={"sliding_window": None}),
    "mixtral": Variant(MIXTURES["mixtral"], None, "BF16", shards=True),
    # Every fourth layer does without rotary embeddings.
    "smollm3": Variant(MORE["smollm3"], "llama-bpe", "BF16", settings={**_TIED, "num_hidden_layers": 4}),
    "qwen2": Variant(THOROUGH["qwen2"], "qwen2", "BF16", entries=ROWS - 30, settings=_TIED),
    "qwen2-yarn": Variant(THOROUGH["qwen2"], "qwen2", settings={"rope_parameters": _YARN}),
    "qwen3": Variant(THOROUGH["qwen3"], "qwen2", "BF16", entries=ROWS - 30, tensors=with_float_norms),
    "qwen2moe": Variant(MIXTURES["qwen2moe"], "qwen2", "BF16"),
    "qwen2moe-mixed": Variant(MIXTURES["qwen2moe"], "qwen2", "BF16", tensors=mixed_experts),
    "qwen3moe": Variant(MIXTURES["qwen3moe"], "qwen2", shards=True),
    "qwen3moe-fused": Variant(MIXTURES["qwen3moe"], "qwen2", "BF16", tensors=fused_experts),
    "gemma": Variant(MORE["gemma"], None, "BF16", tensors=with_tied_head),
    "gemma2": Variant(MORE["gemma2"], None),
    "gemma2-half": Variant(MORE["gemma2"], None, "F16"),
    "gemma3": Variant(MORE["gemma3"], None, "BF16", settings={"num_hidden_layers": 6}),
    "gemma3-vision": Variant(MORE["gemma3-vision"], None, "BF16", settings=_GEMMA3),
    "gemma3-nested": Variant(MORE["gemma3-vision"], None, tensors=nested_vision),
    "gemma3-published": Variant(
        MORE["gemma3-vision"],
        None,
        "BF16",
        entries=ROWS - 20,
        tensors=published_vision,
        config=gemma3_in_the_older_dialect,
        settings=_GEMMA3,
    ),
    # llama.cpp looks for tokens of its own in a model whose name has "phi3" or "phi-3" in it.
    "phi": Variant(MORE["phi3"], None, "BF16", pieces="both", settings=_PHI),
    "phi-longrope": Variant(MORE["phi3"], None, settings={**_PHI, **_SHORTER}),
    "phi-longrope-long": Variant(MORE["phi3"], None, "BF16", settings={**_PHI, **_LONGER}),
    "phi-bpe": Variant(
        MORE["phi3"], "gpt-2", "BF16", tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}, settings=_PHI
    ),
    "phi-partial": Variant(
        MORE["phi3"],
        "gpt-4o",
        settings={**_PHI, **_TIED, "rope_parameters": {**_DEFAULT, "partial_rotary_factor": 0.5}},
    ),
    "granite": Variant(MORE["granite"], "refact", "BF16", settings=_TIED),
    "olmo2": Variant(MORE["olmo2"], "dbrx"),
    "olmo3": Variant(MORE["olmo3"], "dbrx", "BF16", settings={"num_hidden_layers": 4}),
}
"""What is converted."""


def make_checkpoint(variant: Variant, directory: Path) -> Path:
    """Writes a seeded model and its tokenizer."""
    directory.mkdir(parents=True)
    _write_tokenizer(variant, directory)
    model = _noisy_model(variant)
    size = {"max_shard_size": "100KB"} if variant.shards else {}
    model.to(TYPES[variant.stored]).save_pretrained(directory, **size)
    if variant.tensors is not None:
        _change_tensors(directory, variant.tensors)
    if variant.config is not None:
        file = directory / "config.json"
        file.write_text(json.dumps(variant.config(json.loads(file.read_text())), indent=2))
    if variant.card is not None:
        (directory / "README.md").write_text(variant.card)
    return directory


def _write_tokenizer(variant: Variant, directory: Path) -> None:
    if variant.pre is None:
        family = "gemma" if variant.spec.model.startswith("Gemma") else "llama"
        write_sentencepiece(directory, variant.entries, family=family, tokenizer_json=variant.pieces != "model")
        if variant.pieces == "json":
            (directory / "tokenizer.model").unlink()
    else:
        write_bpe(directory, variant.pre, variant.entries)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **variant.tokenizer_config}))


def _change_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    with safe_open(directory / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS, metadata)


def _noisy_model(variant: Variant) -> Any:
    """A seeded model in float32 whose logits differ by several units."""
    import transformers

    model = getattr(transformers, variant.spec.model)(variant.configuration()).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_values(name, parameter, noise))
    return model


def _values(name: str, neutral: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """From what transformers starts a parameter with: a norm's is 1, or 0 where 1 + weight is meant."""
    if name.endswith("norm.weight"):
        return neutral + 0.2 * noise
    if noise.ndim == 1 or "embed" in name:
        return 0.5 * noise
    strong = "lm_head" in name or name.endswith("mlp.gate.weight")  # no two experts are almost equally good
    return noise * (3.0 if strong else 1.0) / noise.shape[-1] ** 0.5

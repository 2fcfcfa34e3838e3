"""One adapter for every feature in the README's table, made and saved by PEFT wherever PEFT can make it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from conformance import feature_truth, peft_side
from conformance.feature_truth import Deltas
from conformance.specs import COMMON, PROJECTIONS, SMALL_VISION, Spec
from safetensors.torch import load_file, save_file

INVOCATION = (5, 6)
"""aLoRA's invocation tokens."""
EXPERTS = 4
EXPERT_SHAPES = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}  # (out, in)
_MIXTURE = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 32,
    "decoder_sparse_step": 1,
}
SPECS: Mapping[str, Spec] = {
    "llama": Spec("LlamaConfig", "LlamaForCausalLM"),
    "tied": Spec("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": Spec("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3moe": Spec("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _MIXTURE),
    "gemma2": Spec("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": Spec(
        "Gemma3Config", "Gemma3ForConditionalGeneration", {"head_dim": 32, "tie_word_embeddings": True}, SMALL_VISION
    ),
    "mistral3": Spec(
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral"},
        {**SMALL_VISION, "head_dim": 16},
    ),
}
"""The models that the adapters are for, by GGUF's name of their architecture (and a Llama with tied embeddings)."""


@dataclass(frozen=True)
class Adapter:
    """What is converted, and what it means.

    Attributes:
        path: the adapter's directory.
        base: what both converters get as --base; None for none.
        model: the model that PEFT puts it on.
        original: the adapter as PEFT loads it, where `path` is changed in form alone.
        formula: the truth where PEFT can't load it.
        outtype: what both converters get as --outtype.
    """

    path: Path
    base: Path | None
    architecture: str
    model: Path
    original: Path
    formula: Deltas | None = None
    outtype: str = "f32"

    @cached_property
    def truth(self) -> Deltas:
        """What it does to the weights of a model in llama.cpp."""
        changed = feature_truth.merged(self.model, self.original) if self.formula is None else self.formula
        return feature_truth.in_gguf(self.architecture, changed)


@dataclass
class Workshop:
    """Makes every model once."""

    root: Path
    _models: dict[str, Path] = field(default_factory=dict)

    def model(self, kind: str) -> Path:
        import transformers

        if kind not in self._models:
            spec = SPECS[kind]
            torch.manual_seed(0)
            model = getattr(transformers, spec.model)(getattr(transformers, spec.config)(**spec.options()))
            model.float().save_pretrained(self.root / kind)
            self._models[kind] = self.root / kind
        return self._models[kind]

    def configured(self, kind: str, directory: Path, **more: Any) -> Path:
        """A directory that holds a model's config.json and no weights."""
        directory.mkdir(parents=True)
        settings = json.loads((self.model(kind) / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**settings, **more}))
        return directory


Make = Callable[[Workshop, Path], Adapter]


def lora(
    kind: str = "llama", outtype: str = "f32", load: Callable[[Path], Any] = peft_side.load_model, **options: Any
) -> Make:
    """PEFT's adapter with these options of its LoraConfig, every part of it trained."""

    def make(workshop: Workshop, place: Path) -> Adapter:
        import peft

        targets = rf".*language_model.*\.({'|'.join(PROJECTIONS)})" if SPECS[kind].vision else list(PROJECTIONS)
        config = {"r": 4, "lora_alpha": 8, "target_modules": targets, **options}
        model = workshop.model(kind)
        adapted = peft.get_peft_model(load(model), peft.LoraConfig(task_type="CAUSAL_LM", **config))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(place, save_embedding_layers=False)
        architecture = "llama" if kind == "tied" else kind
        return Adapter(place, model, architecture, model, place, outtype=outtype)

    return make


def renamed(rename: Callable[[str], str], made: Make) -> Make:
    """Another adapter with its tensors under other names, as some trainers save them."""

    def make(workshop: Workshop, place: Path) -> Adapter:
        adapter = made(workshop, place / "original")
        tensors = load_file(adapter.path / "adapter_model.safetensors")
        renamed = {rename(name): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        copy = place / "adapter"
        copy.mkdir()
        shutil.copy(adapter.path / "adapter_config.json", copy)
        save_file(renamed, copy / "adapter_model.safetensors", {"format": "pt"})
        return replace(adapter, path=copy)

    return make


def on_base(give: Callable[[Workshop, Adapter, Path], Path | None], made: Make | None = None) -> Make:
    """A plain adapter with another `--base`, or none."""

    def make(workshop: Workshop, place: Path) -> Adapter:
        adapter = (made or lora())(workshop, place / "adapter")
        return replace(adapter, base=give(workshop, adapter, place))

    return make


def packed_config(workshop: Workshop, adapter: Adapter, place: Path) -> Path:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return workshop.configured(adapter.architecture, place / "base", quantization_config=settings)


def index_alone(workshop: Workshop, adapter: Adapter, place: Path) -> Path:
    base = workshop.configured(adapter.architecture, place / "base")
    names = load_file(adapter.model / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base


def config_alone(workshop: Workshop, adapter: Adapter, place: Path) -> Path:
    return workshop.configured(adapter.architecture, place / "base") / "config.json"


def config_directory(workshop: Workshop, adapter: Adapter, place: Path) -> Path:
    return workshop.configured(adapter.architecture, place / "base")


def gguf_header(workshop: Workshop, adapter: Adapter, place: Path) -> Path:
    import gguf

    writer = gguf.GGUFWriter(place / "base.gguf", adapter.architecture)
    writer.add_head_count(COMMON["num_attention_heads"])
    writer.add_head_count_kv(COMMON["num_key_value_heads"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place / "base.gguf"


def beside(workshop: Workshop, adapter: Adapter, place: Path) -> None:
    """Nothing: config.json lies in the adapter's directory, whose own words name a repository."""
    shutil.copy(adapter.model / "config.json", adapter.path)
    _name_base(adapter, "somebody/a-model-of-the-hub")


def local_path(workshop: Workshop, adapter: Adapter, place: Path) -> None:
    _name_base(adapter, str(adapter.model))


def _name_base(adapter: Adapter, name: str) -> None:
    _configure(adapter.path, base_model_name_or_path=name)


def _configure(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def invoked(workshop: Workshop, place: Path) -> Adapter:
    """An aLoRA: the plain update once its tokens were seen, which is why PEFT merges only the plain one."""
    adapter = lora()(workshop, place / "original")
    copy = shutil.copytree(adapter.path, place / "adapter")
    _configure(copy, alora_invocation_tokens=list(INVOCATION))
    return replace(adapter, path=copy)


def transposed(workshop: Workshop, place: Path) -> Adapter:
    """A copied setting; PEFT itself, which sets it aside for nn.Linear, would not save it."""
    adapter = lora()(workshop, place)
    _configure(place, fan_in_fan_out=True)
    return adapter


def older_stacks(**options: Any) -> Make:
    """Before 0.19 PEFT took every stack to be (experts, in, out), as a model can still tell it to."""

    def load(path: Path) -> Any:
        model = peft_side.load_model(path)
        for layer in model.model.layers:
            layer.mlp.experts.is_transposed = True
        return model

    def make(workshop: Workshop, place: Path) -> Adapter:
        adapter = lora("qwen3moe", load=load, **options)(workshop, place)
        truth = feature_truth.merged(adapter.model, place, load)
        _configure(place, peft_version="0.18.1")
        return replace(adapter, formula=truth)

    return make


def pickled(workshop: Workshop, place: Path) -> Adapter:
    adapter = lora()(workshop, place / "original")
    copy = place / "adapter"
    copy.mkdir()
    shutil.copy(adapter.path / "adapter_config.json", copy)
    torch.save(load_file(adapter.path / "adapter_model.safetensors"), copy / "adapter_model.bin")
    return replace(adapter, path=copy)


def experts_one_by_one(*experts: int) -> Make:
    """Pairs of single experts, as transformers 4 had modules for each. Truth: PEFT's scaling * B @ A, written out."""

    def make(workshop: Workshop, place: Path) -> Adapter:
        generator = torch.Generator().manual_seed(4)
        tensors, truth = {}, {}
        for layer in range(COMMON["num_hidden_layers"]):
            for name, (out, into) in EXPERT_SHAPES.items():
                delta = np.zeros((EXPERTS, out, into))
                for expert in experts:
                    a, b = (0.1 * torch.randn(size, generator=generator) for size in ((4, into), (out, 4)))
                    key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                    tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                    delta[expert] = 8 / 4 * (b.double() @ a.double()).numpy()
                truth[f"model.layers.{layer}.mlp.experts.{name}"] = delta
        models.save_adapter(place, tensors, models.adapter_config(r=4, alpha=8))
        return Adapter(place, workshop.model("qwen3moe"), "qwen3moe", workshop.model("qwen3moe"), place, truth)

    return make

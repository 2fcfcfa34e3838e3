"""Small models and adapters for the tests of merging, and what merging makes of them, tensor by tensor in float64.

Adapters are written with the safetensors and gguf packages, deltas are written out: scaling * B @ A.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import models
import torch
from gguf_models import permuted
from safetensors.torch import save_file

from converters.changed_model import ChangedModel
from converters.opening import open_adapter, open_model
from safelora_gguf.merging.edits import MergePlan, plan_merge

SIZES = models.Sizes()
TIED = models.Sizes(tied=True)
SETTINGS = models.config(SIZES)
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
CPU = torch.device("cpu")
Tensors = Mapping[str, torch.Tensor]


def noise(*shape: int, seed: int = 7) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def checkpoint(path: Path, sizes: models.Sizes = SIZES) -> tuple[Path, Tensors]:
    tensors = models.weights(sizes, 1)
    return models.save_model(path, tensors, models.config(sizes)), tensors


def plan(model: Path, *adapters: tuple[Path, float]) -> MergePlan:
    return plan_merge(open_model(model), [(open_adapter(path, dora=True), scale) for path, scale in adapters], CPU)


def merged(model: Path, *adapters: tuple[Path, float]) -> dict[str, torch.Tensor]:
    changed = ChangedModel(open_model(model), plan(model, *adapters).edits)
    return {name: changed.load(name).double() for name in changed.infos}


def delta(pairs: Tensors, module: str, scaling: float = 2.0) -> torch.Tensor:
    a, b = (pairs[f"{PREFIX}{module}.lora_{half}.weight"].double() for half in "AB")
    return scaling * b @ a


def assert_is(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name].double(), rtol=1e-5, atol=1e-6, msg=name)


def with_pairs(before: Tensors, pairs: Tensors, scale: float = 1.0, scaling: float = 2.0) -> dict[str, torch.Tensor]:
    wanted = {name: tensor.double() for name, tensor in before.items()}
    for key in pairs:
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            wanted[f"{module}.weight"] = wanted[f"{module}.weight"] + scale * delta(pairs, module, scaling)
    return wanted


def in_llama_cpp(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names, found = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES.layers), {}
    heads = {"q_proj": SIZES.heads, "k_proj": SIZES.kv_heads}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        count = heads.get(module.rpartition(".")[2])
        ordered = torch.from_numpy(permuted(tensor.numpy(), count)) if count else tensor
        found[f"{names.get_name(module)}.weight"] = ordered
    return found


def dora_adapter(path: Path, pairs: Tensors, magnitudes: Tensors) -> Path:
    tensors = {**pairs, **{f"{PREFIX}{module}.lora_magnitude_vector": m for module, m in magnitudes.items()}}
    return models.save_adapter(path, tensors, models.adapter_config(use_dora=True))


def with_whole(path: Path, tensors: Tensors, **settings: Any) -> Path:
    pairs = models.pairs({"model.layers.0.self_attn.q_proj": SIZES.modules()["model.layers.0.self_attn.q_proj"]}, 3)
    whole = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    return models.save_adapter(path, {**pairs, **whole}, models.adapter_config(**settings))


def mlx_adapter(path: Path, tensors: Tensors, **settings: Any) -> Path:
    path.mkdir()
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 3.0}, **settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), path / "adapters.safetensors")
    return path


def embedding_pair(seed: int = 3) -> dict[str, torch.Tensor]:
    key = f"{PREFIX}{EMBEDDING}.lora_embedding_"
    return {f"{key}A": noise(4, SIZES.vocab, seed=seed), f"{key}B": noise(SIZES.hidden, 4, seed=seed + 1)}

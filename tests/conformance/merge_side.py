"""Adapters of every kind as PEFT makes them, and what PEFT's forward pass says that they do: nothing is merged here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conformance import peft_side, reference
from safetensors.torch import load_file

from converters.changed_model import ChangedModel
from converters.names import canonical
from converters.opening import open_adapter, open_model
from safelora_gguf.merging.edits import MergePlan, plan_merge

Adapters = Sequence[tuple[Path, float]]
CPU = torch.device("cpu")
MORE_TOKENS = 4


def grown(model: Any) -> None:
    """A model with more tokens than its checkpoint has, as it is while such an adapter is trained."""
    torch.manual_seed(5)
    model.resize_token_embeddings(model.config.vocab_size + MORE_TOKENS, mean_resizing=False)


def make_adapter(
    model: Path, place: Path, *, before: Callable[[Any], None] | None = None, seed: int = 3, **options: Any
) -> Path:
    """PEFT's adapter with these options of its LoraConfig, every part of it moved once."""
    import peft

    loaded = peft_side.load_model(model)
    if before is not None:
        before(loaded)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **options})
    adapted = peft.get_peft_model(loaded, config)
    generator, seen = torch.Generator().manual_seed(seed), set()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(place)
    return place


def unmerged(model: Path, adapter: Path, before: Callable[[Any], None] | None = None) -> np.ndarray:
    """The logits of the adapter on its model, as PEFT runs it: what was trained."""
    import peft

    loaded = peft_side.load_model(model)
    if before is not None:
        before(loaded)
    return peft_side.logits_of(peft.PeftModel.from_pretrained(loaded, adapter).eval())


def merged_by_peft(model: Path, adapter: Path) -> Mapping[str, np.ndarray]:
    """PEFT's merge_and_unload, in float64, by canonical names."""
    import peft

    loaded = peft.PeftModel.from_pretrained(peft_side.load_model(model), adapter).double()
    return {
        canonical(name): reference.float64(tensor) for name, tensor in loaded.merge_and_unload().state_dict().items()
    }


def planned(model: Path, adapters: Adapters) -> MergePlan:
    return plan_merge(open_model(model), [(open_adapter(path, dora=True), scale) for path, scale in adapters], CPU)


def merged(model: Path, adapters: Adapters) -> Mapping[str, np.ndarray]:
    """Every tensor of ours in float64, nothing of it rounded."""
    changed = ChangedModel(open_model(model), planned(model, adapters).edits)
    return {name: reference.float64(changed.load(name)) for name in changed.infos}


def stored(directory: Path) -> Mapping[str, np.ndarray]:
    """Every tensor of a checkpoint in float64 by its own name, read by the safetensors package."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= {name: reference.float64(tensor) for name, tensor in load_file(file).items()}
    return found


def off_by(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative to what is wanted, where that is not all zeros."""
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0))

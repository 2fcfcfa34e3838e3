"""Weights that transformers stores as (in, out): those of its Conv1D, a linear layer turned over.

Which classes have them is read off transformers' models (GPT-2, ImageGPT, OpenAI GPT, Decision Transformer, CLVP); a
square weight doesn't tell. PEFT knows them by their class, whatever an adapter's fan_in_fan_out says.
"""

from __future__ import annotations

from converters.models import ModelDescription

_CLASSES = ("GPT2", "ImageGPT", "OpenAIGPT", "DecisionTransformer", "Clvp")
_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def has_conv1d(model: ModelDescription) -> bool:
    """Whether a model in Hugging Face's layout is of a class that has such weights."""
    return model.layout == "hugging_face" and (model.model_class or "").startswith(_CLASSES)


def is_conv1d(model: ModelDescription, module: str) -> bool:
    """Whether a module's weight is one of them."""
    return module.rpartition(".")[2] in _MODULES and has_conv1d(model)

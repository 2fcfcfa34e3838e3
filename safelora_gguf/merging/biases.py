"""Biases that a model hasn't and a merged one has: whether whoever runs the model would apply them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from converters.architectures import Architecture
from converters.changes import Change, Edits
from converters.errors import UnsupportedError
from converters.expected_biases import BY_ATTENTION_BIAS, BY_MLP_BIAS, IN_LLAMA_CPP, WITHOUT_KEYS
from converters.layouts import find_table
from converters.models import Model
from converters.names import canonical, first_few

if TYPE_CHECKING:
    import torch

_WEIGHT, _BIAS = ".weight", ".bias"

# The keys of config.json that give transformers' modules their biases, and for which modules.
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}
_KEYS = {"attention_bias": _ATTENTION, "mlp_bias": _FEED_FORWARD}


def check_new_biases(model: Model, names: Sequence[str]) -> None:
    """That the model's architecture can have biases that this model hasn't.

    Args:
        names: of the biases, as the model's file would have them.

    Raises:
        UnsupportedError: it can't.
    """
    table = find_table(model)
    unknown = [name for name in names if not _has_place(model, table, name)]
    if unknown:
        raise UnsupportedError(
            f"{model.architecture} has no place for new biases: {first_few(unknown)}. Keep the adapter as PEFT loads "
            f"it, or merge it without them",
            file=model.path,
        )


def config_of_biases(names: Sequence[str]) -> dict[str, bool]:
    """The keys of config.json without which transformers would not read the biases; see `with_zero_biases`."""
    kinds = {_kind(canonical(name)) for name in names}
    return {key: True for key, modules in _KEYS.items() if kinds & modules}


def with_zero_biases(model: Model, edits: Edits) -> Edits:
    """Edits of a checkpoint with zeros as the biases of all modules that the same key of config.json gives one to."""
    wanted = set().union(*(modules for key, modules in _KEYS.items() if edits.config.get(key) is True))
    there = {canonical(name) for name in (*model.infos, *edits.changes)}
    added: dict[str, Change] = {}
    for name, info in model.infos.items():
        owner = canonical(name)
        bias = f"{owner.removesuffix(_WEIGHT)}{_BIAS}"
        if owner.endswith(_WEIGHT) and _kind(owner) in wanted and ".layers." in owner and bias not in there:
            own = f"{name.removesuffix(_WEIGHT)}{_BIAS}"
            added[own] = Change(own, partial(_zeros, info.shape[0]), info.shape[:1], after=name)
    return replace(edits, changes={**edits.changes, **added})


def _zeros(size: int, start: int, stop: int) -> torch.Tensor:
    import torch

    return torch.zeros(stop - start, size)


def _has_place(model: Model, table: Architecture | None, name: str) -> bool:
    if model.layout == "gguf":
        return _kind(name) in IN_LLAMA_CPP.get(model.architecture, ())
    if table is None or model.model_class in WITHOUT_KEYS:
        return False
    kind = _kind(canonical(name))
    return (kind in _ATTENTION and table.name in BY_ATTENTION_BIAS) or (
        kind in _FEED_FORWARD and table.name in BY_MLP_BIAS
    )


def _kind(name: str) -> str:
    """The module's own name: `q_proj` of `model.layers.0.self_attn.q_proj.bias`."""
    return name.rpartition(".")[0].rpartition(".")[2]

"""An adapter_config.json for pairs that come without one: what `peft_config` reads, made from ranks and scalings."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from converters.names import natural_order

_WRITTEN_AS = "0.19.0"  # stacks have their model's order from this PEFT on, which readers can't always tell from shapes

_T = TypeVar("_T", int, float)


@dataclass(frozen=True)
class ConfigEntry:
    """What a configuration must say about one pair.

    Attributes:
        module: its name in the model that PEFT adapts, `model.layers.0.self_attn.q_proj`.
        scaling: the true factor of B @ A.
        parameter: whether PEFT adapts it as one of `target_parameters`; the name is then the parameter's.
    """

    module: str
    rank: int
    scaling: float
    parameter: bool = False


def peft_config_for(
    entries: Sequence[ConfigEntry], base_model_name: str | None = None, *, invocation_tokens: Sequence[int] = ()
) -> bytes:
    """The bytes of an adapter_config.json; equal calls give equal bytes.

    `r` and `lora_alpha` are what most modules have, and every other module has a pattern of its own. The modules
    are listed by their whole names: their last parts would have PEFT adapt modules that have no pair.

    Args:
        entries: one for every pair, embeddings included; at least one.
        base_model_name: a repository or a path.
        invocation_tokens: aLoRA's, if any.
    """
    ordered = sorted(entries, key=lambda entry: natural_order(entry.module))
    modules = [entry.module for entry in ordered]
    assert 0 < len(set(modules)) == len(modules), "every pair has one module, and there is a pair"
    r, rank_pattern = _majority({entry.module: entry.rank for entry in ordered})
    alpha, alpha_pattern = _majority({entry.module: _alpha(entry) for entry in ordered})
    config: dict[str, Any] = {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "target_modules": [entry.module for entry in ordered if not entry.parameter],
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    if any(entry.parameter for entry in ordered):
        config["target_parameters"] = [entry.module for entry in ordered if entry.parameter]
        config["peft_version"] = _WRITTEN_AS
    if invocation_tokens:
        config["alora_invocation_tokens"] = list(invocation_tokens)
    return (json.dumps(config, indent=2, allow_nan=False) + "\n").encode("ascii")


def _alpha(entry: ConfigEntry) -> int | float:
    """The alpha for which PEFT's alpha / r is the scaling to the last bit; scaling * r itself where there is none.

    Whole numbers come first: most scalings were a whole alpha over r before they were rounded.
    """
    product = entry.scaling * entry.rank
    neighbours = (round(product), product, math.nextafter(product, -math.inf), math.nextafter(product, math.inf))
    return next((alpha for alpha in neighbours if alpha / entry.rank == entry.scaling), product)


def _majority(values: Mapping[str, _T]) -> tuple[_T, dict[str, _T]]:
    """The commonest value, the first of equally common ones, and patterns for the modules that have another."""
    ((common, _),) = Counter(values.values()).most_common(1)
    endings = {ending for module in values for ending in _endings(module)}
    others = {module: value for module, value in values.items() if value != common}
    return common, {_pattern(module, anchored=module in endings): value for module, value in others.items()}


def _endings(module: str) -> Iterator[str]:
    """`b.c` and `c` of `a.b.c`."""
    while "." in module:
        module = module.partition(".")[2]
        yield module


def _pattern(module: str, *, anchored: bool) -> str:
    r"""A pattern for one module and none of the others, by PEFT's rule `^(.*\.)?(pattern)$`.

    Only a module whose name ends another's needs an anchor. The others do without, so that they still match where
    the model sits inside a wrapper, as their names in `target_modules` do.
    """
    return f"^{re.escape(module)}" if anchored else re.escape(module)

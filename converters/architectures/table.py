"""The form of a table entry: names in both layouts and the transforms between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from converters.architectures.transforms import HeadCounts, Transform

if TYPE_CHECKING:
    import torch

_LAYER = "{i}"


@dataclass(frozen=True)
class Rule:
    """One kind of module: its name in a checkpoint (source) and in GGUF (target), `{i}` standing for the layer.

    Names have no `.weight` or `.bias` at their end; that part is the same on both sides.
    """

    source: str
    target: str
    transforms: tuple[Transform, ...] = ()

    def inverse(self) -> Rule:
        """The rule that leads back."""
        undone = tuple(transform.inverse() for transform in reversed(self.transforms))
        return Rule(self.target, self.source, undone)

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        """A weight or bias, brought into the target's layout."""
        for transform in self.transforms:
            weight = transform.weight(weight, heads)
        return weight

    def check_rows(self, shape: tuple[int, ...], heads: HeadCounts) -> None:
        """Tries the rule on a shape without data.

        Raises:
            FormatError: heads that don't divide the rows.
        """
        import torch

        self.weight(torch.empty(shape, device="meta"), heads)

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        """A LoRA pair A (r, in), B (out, r), brought into the target's layout."""
        for transform in self.transforms:
            a, b = transform.pair(a, b, heads)
        return a, b


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp and the Hugging Face classes that become it.

    Attributes:
        name: `general.architecture` in GGUF.
        classes: names that config.json gives under `architectures`.
        rules: every module that carries weights, norms included.
    """

    name: str
    classes: tuple[str, ...]
    rules: tuple[Rule, ...]

    def to_gguf(self, module: str) -> tuple[str, Rule] | None:
        """The GGUF name of a checkpoint's module and the rule behind it; None when the table lacks it."""
        return _lookup(self._forward, module)

    def to_hugging_face(self, module: str) -> tuple[str, Rule] | None:
        """The checkpoint's name of a GGUF module and the rule that leads there; None when the table lacks it."""
        return _lookup(self._backward, module)

    @cached_property
    def _forward(self) -> dict[str, Rule]:
        return {rule.source: rule for rule in self.rules}

    @cached_property
    def _backward(self) -> dict[str, Rule]:
        return {rule.target: rule.inverse() for rule in self.rules}


def _lookup(rules: dict[str, Rule], module: str) -> tuple[str, Rule] | None:
    """Finds `module` literally or with its one layer number replaced by the placeholder."""
    if module in rules:
        return rules[module].target, rules[module]
    layer = re.search(r"(?<=\.)(0|[1-9]\d{0,5})(?=\.)", module)
    if layer is None:
        return None
    rule = rules.get(module[: layer.start()] + _LAYER + module[layer.end() :])
    return None if rule is None else (rule.target.replace(_LAYER, layer[0]), rule)


def decoder_rules(
    extra: Sequence[Rule] = (), *, query: Sequence[Transform] = (), key: Sequence[Transform] = ()
) -> tuple[Rule, ...]:
    """The modules that the Llama line of decoders shares, with what a family does to queries and keys."""
    layer, attention, mlp = "model.layers.{i}.", "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    return (
        Rule("model.embed_tokens", "token_embd"),
        Rule("model.norm", "output_norm"),
        Rule("lm_head", "output"),
        Rule(layer + "input_layernorm", "blk.{i}.attn_norm"),
        Rule(attention + "q_proj", "blk.{i}.attn_q", tuple(query)),
        Rule(attention + "k_proj", "blk.{i}.attn_k", tuple(key)),
        Rule(attention + "v_proj", "blk.{i}.attn_v"),
        Rule(attention + "o_proj", "blk.{i}.attn_output"),
        Rule(layer + "post_attention_layernorm", "blk.{i}.ffn_norm"),
        Rule(mlp + "gate_proj", "blk.{i}.ffn_gate"),
        Rule(mlp + "up_proj", "blk.{i}.ffn_up"),
        Rule(mlp + "down_proj", "blk.{i}.ffn_down"),
        *extra,
    )

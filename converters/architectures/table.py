"""The form of a table entry: names in both layouts and the transforms between them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from converters.architectures.heads import HeadCounts
from converters.architectures.transforms import Transform

if TYPE_CHECKING:
    import torch

_LAYER = "{i}"
_TEXT = "model."


@dataclass(frozen=True)
class Rule:
    """One kind of module: its name in a checkpoint (source) and in GGUF (target), `{i}` standing for the layer.

    Names have no `.weight` or `.bias` at their end; that part is the same on both sides.

    Attributes:
        one_way: whether another rule leads back from the same target.
    """

    source: str
    target: str
    transforms: tuple[Transform, ...] = ()
    one_way: bool = False

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
        composites: those of the classes that hold such a model beside others, for images say.
    """

    name: str
    classes: tuple[str, ...]
    rules: tuple[Rule, ...]
    composites: tuple[str, ...] = ()

    def to_gguf(self, module: str) -> tuple[str, Rule] | None:
        """The GGUF name of a checkpoint's module and the rule behind it; None when the table lacks it."""
        return _lookup(self._forward, module)

    def to_hugging_face(self, module: str) -> tuple[str, Rule] | None:
        """The checkpoint's name of a GGUF module and the rule that leads there; None when the table lacks it."""
        return _lookup(self._backward, module)

    def name_in(self, model_class: str, module: str) -> str:
        """The name that a module of the rules has in a model of a class, as PEFT must know it.

        transformers has the text half of a composite model in `model.language_model`, whatever its files say
        (see `converters.names.canonical`), and the head beside it.
        """
        wrapped = model_class in self.composites and module.startswith(_TEXT)
        return f"{_TEXT}language_model.{module.removeprefix(_TEXT)}" if wrapped else module

    @cached_property
    def _forward(self) -> dict[str, Rule]:
        return {rule.source: rule for rule in self.rules}

    @cached_property
    def _backward(self) -> dict[str, Rule]:
        return {rule.target: rule.inverse() for rule in self.rules if not rule.one_way}


def _lookup(rules: dict[str, Rule], module: str) -> tuple[str, Rule] | None:
    """Finds `module` literally or with its one layer number replaced by the placeholder."""
    if module in rules:
        return rules[module].target, rules[module]
    layer = re.search(r"(?<=\.)(0|[1-9]\d{0,5})(?=\.)", module)
    if layer is None:
        return None
    rule = rules.get(module[: layer.start()] + _LAYER + module[layer.end() :])
    return None if rule is None else (rule.target.replace(_LAYER, layer[0]), rule)

"""The form of a table entry: names in both layouts and the transforms between them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from converters.architectures.heads import HeadCounts
from converters.architectures.transforms import HeadParts, PermuteHeads, TakeRows, Transform, UngroupHeads
from converters.architectures.writing import ModelWriting

if TYPE_CHECKING:
    import torch

_LAYER, _EXPERT = "{i}", "{e}"
_NUMBER = re.compile(r"(?<=\.)(0|[1-9]\d{0,5})(?=\.)")
_TEXT = "model."
_ENDINGS = ("weight", "bias")
_BESIDE_TEXT = frozenset({"vision_tower", "vision_model", "visual", "multi_modal_projector", "audio_tower"})
_OTHER_FILE = "llama.cpp keeps what is not the language model in a file of its own (mmproj), which no adapter reaches"


@dataclass(frozen=True)
class Rule:
    """One kind of module: its name in a checkpoint (source) and in GGUF (target).

    `{i}` stands for the layer, `{e}` for an expert that is a module of its own; GGUF has all experts in one stack.
    Names have no `.weight` or `.bias` at their end; that part is the same on both sides.

    Attributes:
        one_way: whether another rule leads back from the same target.
        bare: where the source is a parameter without such an ending: the one that it has in GGUF.
        stacked: whether the source holds the matrices of all experts in one tensor; transforms then are for each.
        parameter: whether PEFT adapts it as a parameter (`target_parameters`), since it is no module, or a module of
            a class of its own.
    """

    source: str
    target: str
    transforms: tuple[Transform, ...] = ()
    one_way: bool = False
    bare: Literal["weight", "bias"] | None = None
    stacked: bool = False
    parameter: bool = False

    @property
    def is_part(self) -> bool:
        """Whether the target has a part of the source's values alone."""
        return any(isinstance(transform, TakeRows | HeadParts) for transform in self.transforms)

    @property
    def by_heads(self) -> bool:
        """Whether what it does depends on the model's heads."""
        return any(isinstance(transform, PermuteHeads | UngroupHeads | HeadParts) for transform in self.transforms)

    def inverse(self) -> Rule:
        """The rule that leads back."""
        undone = tuple(transform.inverse() for transform in reversed(self.transforms))
        return replace(self, source=self.target, target=self.source, transforms=undone)

    def only_there(self) -> Rule:
        """The rule, when another one leads back."""
        return replace(self, one_way=True)

    def as_parameter(self) -> Rule:
        """The rule, where PEFT must be given the module's weight as a parameter."""
        return replace(self, parameter=True)

    def weight(self, weight: torch.Tensor, heads: HeadCounts) -> torch.Tensor:
        """A weight (out, in) or bias (out,), brought into the target's layout."""
        for transform in self.transforms:
            weight = transform.weight(weight, heads)
        return weight

    def weight_shape(self, shape: tuple[int, ...], heads: HeadCounts) -> tuple[int, ...]:
        """What `weight` makes of a shape.

        Raises:
            FormatError: heads that don't divide the rows.
        """
        if not self.transforms:
            return shape
        import torch

        return tuple(self.weight(torch.empty(shape, device="meta"), heads).shape)

    def pair(self, a: torch.Tensor, b: torch.Tensor, heads: HeadCounts) -> tuple[torch.Tensor, torch.Tensor]:
        """A LoRA pair A (r, in), B (out, r), brought into the target's layout."""
        for transform in self.transforms:
            a, b = transform.pair(a, b, heads)
        return a, b

    def pair_shape(self, shape: tuple[int, int], heads: HeadCounts) -> tuple[int, int]:
        """(out, in) of the pair that `pair` makes of one for a weight (out, in).

        Raises:
            FormatError: heads that don't divide the rows.
        """
        if not self.transforms:
            return shape
        import torch

        a, b = torch.empty((1, shape[1]), device="meta"), torch.empty((shape[0], 1), device="meta")
        a, b = self.pair(a, b, heads)
        return b.shape[0], a.shape[1]


@dataclass(frozen=True)
class Destination:
    """Where a module goes in the other layout.

    Attributes:
        name: the module, or the stack.
        rule: leads there.
        expert: which matrix of the stack it becomes, where its own name says so.
    """

    name: str
    rule: Rule
    expert: int | None = None


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp and the Hugging Face classes that become it.

    Attributes:
        name: `general.architecture` in GGUF.
        classes: names that config.json gives under `architectures`.
        rules: every module that carries weights, norms included.
        composites: those of the classes that hold such a model beside others, for images say.
        without_pairs: modules of which no pair can be brought over, each with the reason.
        writing: how its models are written as GGUF; None where they are not converted here, but for their adapters.
    """

    name: str
    classes: tuple[str, ...]
    rules: tuple[Rule, ...]
    composites: tuple[str, ...] = ()
    without_pairs: Mapping[str, str] = field(default_factory=dict)
    writing: ModelWriting | None = None

    def to_gguf(self, module: str) -> tuple[Destination, ...]:
        """Where a checkpoint's module goes: to one place in GGUF, or in parts to several. Empty: the table lacks it."""
        return _lookup(self._forward, module)

    def tensors_in_gguf(self, tensor: str) -> Iterator[tuple[str, Destination]]:
        """GGUF's names of a checkpoint's tensor (a weight, a bias, a bare parameter) or of its parts, each with the way
        there."""
        for found in self.to_gguf(tensor):
            if found.rule.bare is not None:
                yield f"{found.name}.{found.rule.bare}", found
        module, dot, ending = tensor.rpartition(".")
        for found in self.to_gguf(module):
            if found.rule.bare is None and ending in _ENDINGS:
                yield found.name + dot + ending, found

    def to_hugging_face(self, module: str) -> Destination | None:
        """Where a GGUF module comes from; None when the table lacks it."""
        return next(iter(_lookup(self._backward, module)), None)

    def no_pairs_because(self, module: str) -> str | None:
        """Why a pair of this module of a checkpoint has no counterpart in GGUF; None where it may have one."""
        if self.composites and _is_beside_text(module):
            return _OTHER_FILE
        return self.without_pairs.get(_pattern(module)[0])

    def name_in(self, model_class: str, module: str) -> str:
        """The name that a module of the rules has in a model of a class, as PEFT must know it.

        transformers has the text half of a composite model in `model.language_model`, the others beside that in
        `model`, whatever its files say (see `converters.names.canonical`), and the head by itself.
        """
        if model_class not in self.composites:
            return module
        if _is_beside_text(module):
            return _TEXT + module.removeprefix(_TEXT)
        return f"{_TEXT}language_model.{module.removeprefix(_TEXT)}" if module.startswith(_TEXT) else module

    @cached_property
    def _forward(self) -> Mapping[str, tuple[Rule, ...]]:
        return _by_source(self.rules)

    @cached_property
    def _backward(self) -> Mapping[str, tuple[Rule, ...]]:
        return _by_source(rule.inverse() for rule in self.rules if not rule.one_way)


def _is_beside_text(module: str) -> bool:
    """Whether a composite model's module is of another part than its language model."""
    return module.removeprefix(_TEXT).partition(".")[0] in _BESIDE_TEXT


def _by_source(rules: Iterable[Rule]) -> Mapping[str, tuple[Rule, ...]]:
    found: dict[str, list[Rule]] = defaultdict(list)
    for rule in rules:
        found[rule.source].append(rule)
    return {source: tuple(same) for source, same in found.items()}


def _lookup(rules: Mapping[str, tuple[Rule, ...]], module: str) -> tuple[Destination, ...]:
    """Finds `module` literally or with its numbers replaced by the placeholders."""
    pattern, layer, expert = (module, "", None) if module in rules else _pattern(module)
    return tuple(Destination(rule.target.replace(_LAYER, layer), rule, expert) for rule in rules.get(pattern, ()))


def _pattern(module: str) -> tuple[str, str, int | None]:
    """The name with placeholders, the layer's number and the expert's."""
    numbers = list(_NUMBER.finditer(module))[:2]
    if not numbers:
        return module, "", None
    pattern = module
    for number, placeholder in reversed(list(zip(numbers, (_LAYER, _EXPERT), strict=False))):
        pattern = pattern[: number.start()] + placeholder + pattern[number.end() :]
    return pattern, numbers[0][0], int(numbers[1][0]) if len(numbers) == 2 else None

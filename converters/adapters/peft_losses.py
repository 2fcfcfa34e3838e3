"""What a PEFT adapter was trained on beside its pairs: no LoRA adapter can hold it, so it is left out and told.

A merged model can; `peft_whole` has it tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from converters.adapters.peft_config import PeftConfig
from converters.errors import FormatError
from converters.names import named

MERGE = "merge the adapter into its model (safelora-gguf merge)"
_MOST_LETTERS = 500_000_000  # that are compared with modules_to_save, about half a second
_HEADS = {"classifier", "score"}  # PEFT announces both for every classifier; a model has one
_TABLES = {
    "embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "tok_embeddings", "embed_in", "embed_out",
    "embeddings", "output_layer",
}  # fmt: skip


class Kind(Enum):
    """What a tensor that belongs to no pair is; the value says it of several."""

    LORA_BIAS = "biases of lora_B (lora_bias)"
    TOKENS = "trained tokens (trainable_token_indices)"
    MODULE = "whole modules trained beside the pairs (modules_to_save)"
    BIAS = "trained biases"
    NORM = "trained norms"
    TABLE = (
        "whole tables saved beside the pairs, part of the update where the vocabulary was resized or they were trained"
    )
    UNTRAINED = "the base model's own, saved along"


_BY_NAME = (
    (re.compile(r".+\.lora_B(\.[^.]+)?\.bias"), Kind.LORA_BIAS),
    (re.compile(r".+\.original_module\..+|.+\.token_adapter\.base_layer\.weight"), Kind.UNTRAINED),
    (re.compile(r".+\.(token_adapter\..+|trainable_tokens_\w+(\.[^.]+)?)"), Kind.TOKENS),
    (re.compile(r".+\.modules_to_save\..+"), Kind.MODULE),
)


@dataclass(frozen=True)
class BesidePairs:
    """The tensors of an adapter that belong to no pair, by what they are, as the file calls them."""

    names: Mapping[Kind, Sequence[str]]

    def __str__(self) -> str:
        return "; ".join(f"{kind.value}: {_first_of(names)}" for kind, names in self.names.items())

    def losses(self, config: PeftConfig) -> tuple[str, ...]:
        """A sentence for each kind, and for what the configuration announces and the file lacks."""
        lost = {kind: names for kind, names in self.names.items() if kind is not Kind.UNTRAINED}
        told = [f"{kind.value}, which pairs can't hold; {MERGE}: {named(names)}" for kind, names in lost.items()]
        return (*told, *self.missing(config))

    def notes(self, config: PeftConfig) -> tuple[str, ...]:
        """A sentence for what is no part of the update and worth knowing."""
        untrained = [name for name in self.names.get(Kind.UNTRAINED, ()) if name.endswith(".bias")]
        told = [f"{Kind.UNTRAINED.value} and no part of its update: {named(untrained)}"] if untrained else []
        if config.bias != "none" and Kind.BIAS not in self.names:
            told.append(f"its configuration says that biases were trained (bias: {config.bias}), and it holds none")
        return tuple(told)

    def missing(self, config: PeftConfig) -> tuple[str, ...]:
        """A sentence for what the configuration announces and the file lacks."""
        there = self.names.get(Kind.MODULE, ())
        found = {module for module in config.modules_to_save if any(f"{module}." in name for name in there)}
        absent = [module for module in config.modules_to_save if module not in found]
        if found & _HEADS:
            absent = [module for module in absent if module not in _HEADS]
        announced = [f"{named(absent)} (modules_to_save)"] if absent else []
        if config.trained_tokens and Kind.TOKENS not in self.names:
            announced.append("single tokens (trainable_token_indices)")
        if config.lora_bias and Kind.LORA_BIAS not in self.names:
            announced.append("biases of lora_B (lora_bias)")
        told = "were trained, too, and its tensors lack them: get the whole adapter and merge it into its model"
        return tuple(f"its configuration says that {what} {told}" for what in announced)


def sort_beside_pairs(names: Mapping[str, str], config: PeftConfig, path: Path) -> tuple[BesidePairs, list[str]]:
    """What tensors are that belong to no pair, and those that are nothing known.

    Args:
        names: by name in the file, the name without PEFT's prefix.

    Raises:
        FormatError: there are more of them, and more modules_to_save, than any adapter has.
    """
    letters = sum(map(len, names.values())) * len(config.modules_to_save)
    if letters > _MOST_LETTERS:
        told = f"has {len(names)} tensors beside its pairs and {len(config.modules_to_save)} modules_to_save"
        raise FormatError(f"{told}, more than any adapter that is in use", file=path)
    found: dict[Kind, list[str]] = {}
    unknown = []
    for name, plain in names.items():
        kind = _kind(plain, config)
        if kind is None:
            unknown.append(name)
        else:
            found.setdefault(kind, []).append(name)
    return BesidePairs(found), unknown


def _kind(plain: str, config: PeftConfig) -> Kind | None:
    kind = next((kind for pattern, kind in _BY_NAME if pattern.fullmatch(plain)), None)
    if kind is not None or ".lora_" in plain:
        return kind
    if any(f"{module}." in plain for module in config.modules_to_save):
        return Kind.MODULE
    module, _, parameter = plain.rpartition(".")
    if parameter == "bias":
        frozen = module.endswith(".base_layer") and config.bias == "none"
        return Kind.UNTRAINED if frozen else Kind.BIAS
    return _kind_of_weight(module.rpartition(".")[2]) if parameter == "weight" else None


def _kind_of_weight(name: str) -> Kind | None:
    if "norm" in name or re.fullmatch(r"ln_\w+", name):
        return Kind.NORM
    return Kind.TABLE if name in _TABLES else None


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

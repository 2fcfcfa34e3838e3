"""Models and adapters in Hugging Face's layout, seen through an architecture's table as GGUF: tensor by tensor, while
they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.lora import LoraAdapter, LoraPair
from converters.architectures import Architecture, HeadCounts, Rule
from converters.errors import FormatError, UnsupportedError
from converters.models import Layout, Model
from converters.names import canonical, natural_order
from converters.tensors import TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Bridge:
    """The way from Hugging Face's layout to GGUF's for one model.

    Attributes:
        heads: of the model, which head-wise transforms depend on.
    """

    architecture: Architecture
    heads: HeadCounts


def place_in_gguf(architecture: Architecture, pair: LoraPair, adapter: Path) -> tuple[str, Rule]:
    """GGUF's name of the module that a Hugging Face pair adapts, and the rule that leads there.

    Raises:
        UnsupportedError: the table has no place for it.
    """
    found = architecture.to_gguf(pair.module)
    if found is None:
        raise UnsupportedError(
            f"the architecture {architecture.name} has no place for this module in GGUF", file=adapter, tensor=pair.key
        )
    return found


class ConvertedModel:
    """A Hugging Face model as a `Model` in GGUF's layout. Tensors that the table lacks (vision, say) are left out."""

    layout: Layout = "gguf"

    def __init__(self, model: Model, bridge: Bridge) -> None:
        self._model = model
        self._bridge = bridge
        self._places = self._find_places()
        self._last: tuple[str, torch.Tensor] | None = None

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: replace(self._model.infos[own], name=name) for name, (own, _) in self._places.items()}

    def load(self, name: str) -> torch.Tensor:
        own, rule = self._places[name]
        try:
            return rule.weight(self._model.load(own), self._bridge.heads)
        except FormatError as error:
            raise FormatError(error.message, file=self.file_of(name), tensor=own) from None

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        own, rule = self._places[name]
        if not rule.transforms:
            return self._model.rows(own, start, stop)
        if self._last is None or self._last[0] != name:  # reordered whole, then handed out in parts
            self._last = None
            weight = self.load(name)
            self._last = name, weight.reshape(-1, weight.shape[-1])
        return self._last[1][start:stop]

    def prefetch(self, name: str) -> None:
        self._model.prefetch(self._places[name][0])

    def rounding(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, int] | None:
        own, rule = self._places[name]
        found = self._model.rounding(own, start, stop)
        assert found is None or not rule.transforms, "rounding is known in the stored order alone"
        return found

    @property
    def path(self) -> Path:
        return self._model.path

    @property
    def format(self) -> str:
        return self._model.format

    @property
    def nbytes(self) -> int:
        return self._model.nbytes

    @property
    def architecture(self) -> str:
        return self._bridge.architecture.name

    @property
    def model_class(self) -> str | None:
        return self._model.model_class

    @property
    def tied_embeddings(self) -> bool:
        return self._model.tied_embeddings

    @property
    def described_by(self) -> Path:
        return self._model.described_by

    @property
    def sources(self) -> tuple[Path, ...]:
        return self._model.sources

    @property
    def repositories(self) -> tuple[str, ...]:
        return self._model.repositories

    def heads(self) -> HeadCounts:
        return self._bridge.heads

    def check_type(self, name: str) -> None:
        self._model.check_type(self._places[name][0])

    def file_of(self, name: str) -> Path:
        return self._model.file_of(self._places[name][0])

    def stored_name(self, name: str) -> str:
        return self._places[name][0]

    def fingerprint(self) -> str:
        return self._model.fingerprint()

    def _find_places(self) -> dict[str, tuple[str, Rule]]:
        """The stored tensor and the rule behind every GGUF name."""
        places: dict[str, tuple[str, Rule]] = {}
        for own in self._model.infos:
            module, dot, ending = canonical(own).rpartition(".")
            found = self._bridge.architecture.to_gguf(module)
            if found is None or ending not in ("weight", "bias"):
                continue
            name = found[0] + dot + ending
            if name in places:
                raise FormatError(f"stands twice, the other time as {places[name][0]}", file=self.path, tensor=own)
            places[name] = own, found[1]
        return places


class ConvertedAdapter:
    """A Hugging Face adapter as a `LoraAdapter` in GGUF's layout.

    Attributes:
        bridge: the way it came.
    """

    layout: Layout = "gguf"

    def __init__(self, adapter: LoraAdapter, bridge: Bridge) -> None:
        self._adapter = adapter
        self.bridge = bridge
        self._places: dict[str, tuple[str, Rule]] = {}
        pairs = [self._pair(pair) for pair in adapter.pairs.values()]
        self.pairs: Mapping[str, LoraPair] = {
            pair.module: pair for pair in sorted(pairs, key=lambda pair: natural_order(pair.module))
        }

    @property
    def path(self) -> Path:
        return self._adapter.path

    @property
    def tensor_file(self) -> Path:
        return self._adapter.tensor_file

    @property
    def format(self) -> str:
        return self._adapter.format

    @property
    def nbytes(self) -> int:
        return self._adapter.nbytes

    @property
    def architecture(self) -> str | None:
        return self.bridge.architecture.name

    @property
    def lora_alpha(self) -> float:
        return self._adapter.lora_alpha

    @property
    def base_model_name(self) -> str | None:
        return self._adapter.base_model_name

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        return self._adapter.invocation_tokens

    @property
    def peft_config(self) -> bytes | None:
        return self._adapter.peft_config

    @cached_property
    def frozen_tables(self) -> Mapping[str, str]:
        found = {self.bridge.architecture.to_gguf(module): name for module, name in self._adapter.frozen_tables.items()}
        return {place[0]: name for place, name in found.items() if place is not None}

    @property
    def notes(self) -> tuple[str, ...]:
        return self._adapter.notes

    @property
    def losses(self) -> tuple[str, ...]:
        return self._adapter.losses

    @property
    def magnitudes(self) -> Mapping[str, str]:
        assert not self._adapter.magnitudes, "a DoRA adapter becomes nearest pairs before its layout changes"
        return {}

    def load_magnitude(self, module: str) -> torch.Tensor:
        raise KeyError(module)

    def rule_of(self, module: str) -> Rule:
        """What brought a pair into this layout; its inverse leads back."""
        return self._places[module][1]

    def load_frozen_table(self, module: str) -> torch.Tensor:
        found = self.bridge.architecture.to_hugging_face(module)
        assert found is not None, "only what came through the table is asked for"
        return self._adapter.load_frozen_table(found[0])

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        own, rule = self._places[module]
        return rule.pair(*self._adapter.load(own), self.bridge.heads)

    def fingerprint(self) -> str:
        return self._adapter.fingerprint()

    def _pair(self, pair: LoraPair) -> LoraPair:
        name, rule = place_in_gguf(self.bridge.architecture, pair, self.path)
        try:
            rule.check_rows(pair.shape, self.bridge.heads)
        except FormatError as error:
            raise FormatError(error.message, file=self.path, tensor=pair.tensors[1]) from None
        self._places[name] = pair.module, rule
        return replace(pair, module=name)

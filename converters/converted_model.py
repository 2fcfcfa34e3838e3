"""Models in Hugging Face's layout, seen through an architecture's table as GGUF: tensor by tensor, while they are
read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from converters.architectures import HeadCounts, Rule
from converters.bridge import Bridge
from converters.errors import FormatError
from converters.models import Layout, Model, ModelSizes
from converters.names import canonical
from converters.tensors import TensorInfo, matrices_within

if TYPE_CHECKING:
    import torch

_PACKED = "_blocks"  # MXFP4's
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class _Place:
    """Where a GGUF tensor comes from.

    Attributes:
        stored: one tensor, or one for every expert in order.
        rule: brings it, or each of its matrices, into GGUF's layout.
        experts: the number of matrices in a stack; None for an ordinary tensor.
    """

    stored: tuple[str, ...]
    rule: Rule
    experts: int | None

    @property
    def as_stored(self) -> bool:
        """Whether its rows are those of its one tensor, in that order."""
        return len(self.stored) == 1 and not self.rule.transforms


def _stems(name: str) -> Iterator[str]:
    """What a tensor's name may begin with where its weight is packed: `q_proj.qweight`, `down_proj_blocks`."""
    yield name.rpartition(".")[0]
    yield name.removesuffix(_PACKED)


class ConvertedModel:
    """A Hugging Face model as a `Model` in GGUF's layout. Tensors that the table lacks (vision, say) are left out."""

    layout: Layout = "gguf"

    def __init__(self, model: Model, bridge: Bridge) -> None:
        self._model = model
        self._bridge = bridge
        self._places = self._find_places()
        self._last: tuple[tuple[str, int], torch.Tensor] | None = None

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: self._info(name, place) for name, place in self._places.items()}

    def load(self, name: str) -> torch.Tensor:
        import torch

        place = self._places[name]
        if place.experts is None:
            return self._transformed(name, self._model.load(place.stored[0]))
        return torch.stack([self._matrix(name, number) for number in range(place.experts)])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        place = self._places[name]
        if place.as_stored:
            return self._model.rows(place.stored[0], start, stop)
        height = math.prod(self.infos[name].shape[(1 if place.experts else 0) : -1])
        parts = [self._some_rows(name, *span) for span in matrices_within(start, stop, height)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def prefetch(self, name: str) -> None:
        for own in self._places[name].stored:
            self._model.prefetch(own)

    def rounding(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, int] | None:
        place = self._places[name]
        found = self._model.rounding(place.stored[0], start, stop)
        assert found is None or place.as_stored, "rounding is known in the stored order alone"
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
    def ties_assumed(self) -> str | None:
        return self._model.ties_assumed

    @property
    def described_by(self) -> Path:
        return self._model.described_by

    @property
    def sources(self) -> tuple[Path, ...]:
        return self._model.sources

    @property
    def repositories(self) -> tuple[str, ...]:
        return self._model.repositories

    @property
    def experts(self) -> int:
        return self._bridge.experts

    @property
    def width(self) -> int | None:
        return self._bridge.width

    def sizes(self) -> ModelSizes:
        return self._model.sizes()

    def heads(self) -> HeadCounts:
        return self._bridge.heads

    def check_type(self, name: str) -> None:
        for own in self._places[name].stored:
            self._model.check_type(own)

    def file_of(self, name: str) -> Path:
        return self._model.file_of(self._places[name].stored[0])

    def stored_name(self, name: str) -> str:
        return self._places[name].stored[0]

    def fingerprint(self) -> str:
        return self._model.fingerprint()

    def unplaced(self) -> list[str]:
        """The stored matrices that GGUF has no place for."""
        placed = {own for place in self._places.values() for own in place.stored}
        return [own for own, info in self._model.infos.items() if own not in placed and len(info.shape) > 1]

    def split(self) -> list[str]:
        """The tensors here that are parts of larger stored matrices."""
        return [name for name, place in self._places.items() if place.rule.is_part]

    def packed_modules(self) -> set[str]:
        """The modules here whose weights are stored in a form that is not read, under names of its own."""
        table = self._bridge.architecture
        stems = (stem for own in self._model.infos for stem in _stems(canonical(own)))
        return {found.name for stem in stems for found in table.to_gguf(stem)}

    def _info(self, name: str, place: _Place) -> TensorInfo:
        """The tensor as it will be; its type and size are still the stored ones. Experts of several types have one that
        holds them all."""
        infos = [self._model.infos[own] for own in place.stored]
        outer = () if place.experts is None else (place.experts,)
        shape = infos[0].shape[1:] if place.experts and len(infos) == 1 else infos[0].shape
        dtype = self._common_type(infos)
        try:
            matrix = place.rule.weight_shape(shape, self._bridge.heads)
        except FormatError as error:
            raise FormatError(error.message, file=self.file_of(name), tensor=place.stored[0]) from None
        before, after = math.prod(shape), math.prod(matrix)
        size = sum(info.nbytes for info in infos) * after // max(before, 1)
        return TensorInfo(name, outer + matrix, dtype, size)

    def _common_type(self, infos: Sequence[TensorInfo]) -> str:
        """The type of all experts' matrices, or one that holds them all.

        Raises:
            FormatError: they differ in shape, or are not all plain floats.
        """
        types = {info.dtype for info in infos}
        for info in infos:
            if info.shape != infos[0].shape or (len(types) > 1 and not types <= _FLOATS):
                told, first = (f"{one.dtype} {list(one.shape)}" for one in (info, infos[0]))
                if told != first:
                    found = f"is {told}, and {infos[0].name} is {first}: experts must be alike"
                    raise FormatError(found, file=self._model.file_of(info.name), tensor=info.name)
        return infos[0].dtype if len(types) == 1 else "F64" if "F64" in types else "F32"

    def _some_rows(self, name: str, number: int, start: int, stop: int) -> torch.Tensor:
        """Rows of one matrix; one that has to be reordered as a whole is kept until another one is asked for."""
        place = self._places[name]
        if not place.rule.transforms:
            return self._model.rows(place.stored[number], start, stop)
        if self._last is None or self._last[0] != (name, number):
            self._last = None
            weight = self.load(name) if place.experts is None else self._matrix(name, number)
            self._last = (name, number), weight.reshape(-1, weight.shape[-1])
        return self._last[1][start:stop]

    def _matrix(self, name: str, number: int) -> torch.Tensor:
        """One expert's weight (out, in) or bias (out,)."""
        place = self._places[name]
        if len(place.stored) > 1:
            return self._transformed(name, self._model.load(place.stored[number]))
        shape = self._model.infos[place.stored[0]].shape[1:]
        height = math.prod(shape[:-1])
        matrix = self._model.rows(place.stored[0], number * height, (number + 1) * height)
        return self._transformed(name, matrix.reshape(shape))

    def _transformed(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        place = self._places[name]
        try:
            return place.rule.weight(weight, self._bridge.heads)
        except FormatError as error:
            raise FormatError(error.message, file=self.file_of(name), tensor=place.stored[0]) from None

    def _find_places(self) -> dict[str, _Place]:
        """The stored tensors and the rule behind every GGUF name.

        Raises:
            FormatError: a tensor stands twice, or an expert is missing.
        """
        places: dict[str, _Place] = {}
        single: dict[str, dict[int, tuple[str, Rule]]] = {}
        for own in self._model.infos:
            for name, found in self._bridge.architecture.tensors_in_gguf(canonical(own)):
                if found.expert is not None:
                    experts = single.setdefault(name, {})
                    self._refuse_twice(own, experts[found.expert][0] if found.expert in experts else None)
                    experts[found.expert] = own, found.rule
                    continue
                self._refuse_twice(own, places[name].stored[0] if name in places else None)
                shape = self._model.infos[own].shape
                stacked = found.rule.stacked and len(shape) > 1
                places[name] = _Place((own,), found.rule, shape[0] if stacked else None)
        for name, experts in single.items():
            self._refuse_twice(experts[min(experts)][0], places[name].stored[0] if name in places else None)
            places[name] = self._stack(name, experts)
        return places

    def _stack(self, name: str, experts: Mapping[int, tuple[str, Rule]]) -> _Place:
        """A stack of experts that have a tensor each."""
        count = max(self._bridge.experts, max(experts) + 1)
        missing = count - len(experts)
        if missing:
            message = f"has {len(experts)} of {count} experts for {name}: the model is incomplete"
            raise FormatError(message, file=self.path, tensor=experts[min(experts)][0])
        stored = tuple(experts[number][0] for number in range(count))
        return _Place(stored, experts[0][1], count)

    def _refuse_twice(self, own: str, other: str | None) -> None:
        if other is not None:
            raise FormatError(f"stands twice, the other time as {other}", file=self.path, tensor=own)

"""The extrapolated rows of a model's tensors, for whatever writes them: W_lox = W_aligned + coef * U_k S_k W_k^T."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from converters.architectures import Rule
from converters.checkpoint import Checkpoint
from converters.errors import UnsupportedError
from converters.layouts import table_of
from converters.models import Model
from converters.names import canonical
from converters.origins import Origin, origins_in
from converters.tensors import matrices_within
from safelora_gguf.lox_steps import Step, Steps
from safelora_gguf.pairing import Triple

Rows = Callable[[int, int], torch.Tensor]
"""Gives rows [start, stop) (stop - start, in) of all matrices one below the other, in float32 on the CPU; asked once
for every row, in order."""

_WEIGHT = ".weight"


def by_tensor(triples: Sequence[Triple]) -> Mapping[str, list[Triple]]:
    """Matrices by the aligned model's tensor that they are in."""
    found: dict[str, list[Triple]] = {}
    for triple in triples:
        found.setdefault(triple.aligned_tensor, []).append(triple)
    return found


class NewRows:
    """The rows of one tensor, where the output is in the run's layout.

    Args:
        triples: the tensor's matrices that change: experts that are alike in both models are missing.
        steps: what is added to each; see `Steps.whole`.
    """

    def __init__(self, models: tuple[Model, Model], triples: Sequence[Triple], steps: Steps) -> None:
        self._base, self._aligned = models
        self._first, self._steps = triples[0], steps
        self._by_number = {triple.pair.expert or 0: triple for triple in triples}
        self._last: tuple[int, Step] | None = None

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """See `Rows`."""
        parts = [self._rows(*span) for span in matrices_within(start, stop, self._first.pair.shape[0])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, number: int, start: int, stop: int) -> torch.Tensor:
        first, triple = number * self._first.pair.shape[0], self._by_number.get(number)
        span = first + start, first + stop
        rows = self._aligned.rows(self._first.aligned_tensor, *span).to(torch.float32, copy=True)
        if triple is None:
            return rows
        if self._steps.whole:
            base = self._base.rows(triple.base_tensor, *span).to(torch.float32)
            return self._steps.add_all(triple, rows, base)
        step = self._step(number, triple)
        if step.a is None or step.b is None:
            return rows
        left, right = (step.a.T[start:stop], step.b.T) if triple.pair.embedding else (step.b[start:stop], step.a)
        return rows.addmm_(left, right)

    def _step(self, number: int, triple: Triple) -> Step:
        """A matrix's step, computed once while its rows are asked for."""
        if self._last is None or self._last[0] != number:
            self._last = None
            self._last = number, self._steps.of(triple)
        return self._last[1]


@dataclass(frozen=True)
class Part:
    """What one tensor in GGUF's layout adds to one of a checkpoint.

    Attributes:
        rule: leads from the checkpoint to GGUF.
        by_number: the matrices that change, by their place in the checkpoint's tensor.
    """

    rule: Rule
    by_number: Mapping[int, Triple]


def parts_of(checkpoint: Checkpoint, triples: Sequence[Triple]) -> Mapping[str, list[Part]]:
    """A checkpoint's tensors that change, where the run is in GGUF's layout.

    Raises:
        UnsupportedError: one of them has no way back from there.
    """
    table = table_of(checkpoint, "")
    origins = origins_in(checkpoint, table)
    found: dict[str, list[Part]] = {}
    for tensor, same in by_tensor(triples).items():
        for origin in origins.get(tensor, ()):
            members = _members(same, origin)
            if not members:
                continue
            reason = table.no_pairs_because(canonical(origin.own).removesuffix(_WEIGHT))
            if reason:
                told = f"can't be brought back from GGUF's form ({reason}); take both models in one format"
                raise UnsupportedError(told, file=checkpoint.file_of(origin.own), tensor=origin.own)
            found.setdefault(origin.own, []).append(Part(origin.rule, members))
    return found


def _members(triples: Sequence[Triple], origin: Origin) -> dict[int, Triple]:
    """The matrices that stand in the checkpoint's tensor, by their place there."""
    places = ((origin.number(triple.pair.expert), triple) for triple in triples)
    return {place: triple for place, triple in places if place is not None}


class RowsBroughtBack:
    """The rows of a checkpoint's tensor, where the run is in GGUF's layout: what is added there goes back by rule."""

    def __init__(
        self, checkpoint: Checkpoint, own: str, parts: Sequence[Part], models: tuple[Model, Model], steps: Steps
    ) -> None:
        self._checkpoint, self._own, self._parts, self._steps = checkpoint, own, parts, steps
        self._base, self._aligned = models
        self._last: tuple[int, torch.Tensor | None] | None = None

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """See `Rows`."""
        height = self._checkpoint.infos[self._own].shape[-2]
        parts = [self._rows(number, number * height, *span) for number, *span in matrices_within(start, stop, height)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, number: int, first: int, start: int, stop: int) -> torch.Tensor:
        rows = self._checkpoint.rows(self._own, first + start, first + stop).to(torch.float32, copy=True)
        if self._last is None or self._last[0] != number:
            self._last = None
            self._last = number, self._addition(number)
        added = self._last[1]
        return rows if added is None else rows.add_(added[start:stop])

    def _addition(self, number: int) -> torch.Tensor | None:
        """Of one matrix, as a whole: rules may move any row anywhere."""
        found = None
        for part in self._parts:
            if number in part.by_number:
                added = self._dense(part.by_number[number])
                if added is not None:
                    back = part.rule.inverse().weight(added, self._aligned.heads())
                    found = back if found is None else found.add_(back)
        return found

    def _dense(self, triple: Triple) -> torch.Tensor | None:
        """What is added to a matrix in the run's layout."""
        if self._steps.whole:
            span = triple.first_row, triple.first_row + triple.pair.shape[0]
            rows = self._aligned.rows(triple.aligned_tensor, *span).to(torch.float32)
            base = self._base.rows(triple.base_tensor, *span).to(torch.float32)
            return self._steps.add_all(triple, rows.clone(), base).sub_(rows)
        step = self._steps.of(triple)
        if step.a is None or step.b is None:
            return None
        return step.a.T @ step.b.T if triple.pair.embedding else step.b @ step.a

"""The rows of one weight's input, of both sets and dealt by fold, as the closed form takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from converters.adapters.lora import LoraPair

if TYPE_CHECKING:
    from safelora_gguf.repair.reading.captured_sets import CapturedSet, RangeInputs
    from safelora_gguf.smoke.protocol import InputGroup

_BLOCK = 1 << 22  # values that are read at a time
_Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """A stretch of rows of one set that count the same, whatever is left out.

    Attributes:
        weights: what each of them counts in its set's second moment, by the fold that is left out; None: by none.
    """

    harmful: bool
    length: int
    weights: Mapping[int | None, float]


@dataclass(frozen=True)
class InputRows:
    """The input of one weight, or of one expert's weight.

    Attributes:
        x: (n, in) in float32: rows of H, then rows of G.
        parts: its stretches, in order.
        mean_squares: the mean diagonal of C_G by the fold that is left out; of a stack the mean over its adapted
            experts. Rows count for an expert as for all others, so that all have one objective.
    """

    x: torch.Tensor
    parts: tuple[Part, ...]
    mean_squares: Mapping[int | None, float]

    @property
    def harmful_tokens(self) -> int:
        return sum(part.length for part in self.parts if part.harmful)

    @property
    def benign_tokens(self) -> int:
        return len(self.x) - self.harmful_tokens

    @property
    def harmful(self) -> torch.Tensor:
        return self.x[: self.harmful_tokens]

    @property
    def benign(self) -> torch.Tensor:
        return self.x[self.harmful_tokens :]

    def counts(self, *, harmful: bool) -> torch.Tensor:
        """(rows,) What each row of a set counts where no fold is left out."""
        parts = [part for part in self.parts if part.harmful == harmful]
        lengths = torch.tensor([part.length for part in parts], dtype=torch.int64)
        return torch.tensor([part.weights[None] for part in parts]).repeat_interleave(lengths)

    def wanted(self, fold: int | None) -> list[float]:
        """What a row of each part counts in C_G; 0 in parts of H and in those that are left out."""
        return [0.0 if part.harmful else part.weights[fold] for part in self.parts]

    def unwanted(self, fold: int | None) -> list[float]:
        """What a row of each part counts in C_H; 0 in parts of G and in those that are left out."""
        return [part.weights[fold] if part.harmful else 0.0 for part in self.parts]


@dataclass(frozen=True)
class _Read:
    """All rows of a group in one set.

    Attributes:
        x: (rows, in): those that can be used, stretch by stretch; of a stack one for each slot.
        stretches: (rows,) the stretch that each is in.
        weights: (stretches,) what each of its rows counts, by the fold that is left out.
        experts: (rows, one or more) that each went to; None for an ordinary weight.
    """

    x: torch.Tensor
    stretches: _Rows
    weights: Mapping[int | None, npt.NDArray[np.float64]]
    experts: npt.NDArray[np.int32] | None

    def of_expert(self, expert: int | None) -> _Rows:
        if self.experts is None or expert is None:
            return np.arange(len(self.stretches))
        return np.flatnonzero((self.experts == expert).any(axis=1))


def input_rows(
    found: RangeInputs, pairs: Sequence[LoraPair], folds: Sequence[int | None]
) -> Iterator[tuple[list[LoraPair], InputRows]]:
    """The pairs whose weights are in the range, input by input; pairs that share one come together.

    Args:
        folds: those that may be left out; the others' rows are in parts of their own, whatever their folds.
    """
    for groups, members in _by_group(found, pairs).items():
        x, sets = _both(found, groups, folds)
        by_expert: dict[int | None, list[LoraPair]] = {}
        for pair in members:
            by_expert.setdefault(pair.expert, []).append(pair)
        squares = _mean_squares(sets[1], list(by_expert))
        for expert, own in by_expert.items():
            rows = [one.of_expert(expert) for one in sets]
            yield own, InputRows(_chosen(x, sets, rows), _parts(sets, rows), squares)


def _by_group(found: RangeInputs, pairs: Sequence[LoraPair]) -> dict[tuple[InputGroup, InputGroup], list[LoraPair]]:
    """Pairs by the groups of H and G that their weights' inputs are in."""
    result: dict[tuple[InputGroup, InputGroup], list[LoraPair]] = {}
    there = set(found.weights)
    for pair in pairs:
        weight = f"{pair.weight}.weight"
        if weight in there:
            groups = found.harmful.group_of(weight), found.benign.group_of(weight)
            result.setdefault(groups, []).append(pair)
    return result


def _both(
    found: RangeInputs, groups: tuple[InputGroup, InputGroup], folds: Sequence[int | None]
) -> tuple[torch.Tensor, list[_Read]]:
    """All rows of H, then of G, and each for itself."""
    sets = list(zip((found.harmful, found.benign), groups, strict=True))
    dealt = [_stretches(one, folds) for one, _ in sets]
    orders = [order for order, _, _ in dealt]
    x = torch.empty(
        sum(len(order) * group.slots for (_, group), order in zip(sets, orders, strict=True)), groups[0].width
    )
    result, start = [], 0
    for (one, group), (order, stretches, weights) in zip(sets, dealt, strict=True):
        own = x[start : start + len(order) * group.slots]
        _read(own.view(len(order), group.slots, group.width), one, group, order)
        experts = one.reader.experts(group)[order].reshape(len(own), -1) if group.used else None
        result.append(_Read(own, np.repeat(stretches, group.slots), weights, experts))
        start += len(own)
    return x, result


def _stretches(
    captured: CapturedSet, folds: Sequence[int | None]
) -> tuple[_Rows, _Rows, dict[int | None, npt.NDArray[np.float64]]]:
    """The usable rows in the order of their stretches, the stretch of each, and what its rows count by fold."""
    used = np.flatnonzero(captured.without(None))
    left_out = np.isin(captured.folds, [fold for fold in folds if fold is not None])
    kinds = np.stack([captured.parts(), np.where(left_out, captured.folds, -1)], axis=1)[used]
    _, firsts, stretches = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    weights = {fold: captured.weights(fold)[used[firsts]] for fold in dict.fromkeys([None, *folds])}
    stretches = stretches.reshape(-1)  # numpy 2.0 gives it another shape
    order = np.argsort(stretches, kind="stable")
    return used[order], stretches[order], weights


def _read(x: torch.Tensor, captured: CapturedSet, group: InputGroup, order: _Rows) -> None:
    """Fills x (rows, slots, in) with these rows, block by block."""
    place = np.full(group.rows, -1)
    place[order] = np.arange(len(order))
    step = max(1, _BLOCK // (group.slots * group.width))
    for first in range(0, group.rows, step):
        targets = place[first : first + step]
        values = captured.reader.inputs(group, first, first + len(targets))
        there = targets >= 0
        x.numpy()[targets[there]] = values if there.all() else values[there]


def _mean_squares(benign: _Read, experts: Sequence[int | None]) -> dict[int | None, float]:
    """`InputRows.mean_squares`; a row is short enough for float32, their sum is not."""
    by_row = torch.linalg.vector_norm(benign.x, dim=1).double().square().numpy() / benign.x.shape[1]
    rows = np.concatenate([benign.of_expert(expert) for expert in experts])
    return {
        fold: float(by_row[rows] @ weights[benign.stretches[rows]]) / len(experts)
        for fold, weights in benign.weights.items()
    }


def _chosen(x: torch.Tensor, sets: Sequence[_Read], rows: Sequence[_Rows]) -> torch.Tensor:
    """Those rows of both sets; X itself where they are all."""
    if sum(map(len, rows)) == len(x):
        return x
    return torch.cat([one.x[torch.from_numpy(own)] for one, own in zip(sets, rows, strict=True)])


def _parts(sets: Sequence[_Read], rows: Sequence[_Rows]) -> tuple[Part, ...]:
    return tuple(
        Part(harmful, int(length), {fold: float(weights[stretch]) for fold, weights in one.weights.items()})
        for harmful, one, own in zip((True, False), sets, rows, strict=True)
        for stretch, length in zip(*np.unique(one.stretches[own], return_counts=True), strict=True)
    )

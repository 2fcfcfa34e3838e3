"""The merged rows of a model's tensors: what is stored, with the updates of all adapters added in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from converters.adapters.lora import LoraAdapter
from converters.adapters.whole import WholeTensor
from converters.in_cache import widened
from converters.models import Model
from converters.products import gram, norm
from converters.tensors import matrices_within
from safelora_gguf.merging.kernels import add_update, column_squares, dora_factors, dora_rows, row_lengths
from safelora_gguf.merging.pairs import LoadedPair, PlacedPair

_PIECE = 1 << 21  # elements of a table that are read at once where all of it is


@dataclass(frozen=True)
class OwnValues:
    """A tensor of an adapter that acts as it is; `adapter` loads it by `key`."""

    adapter: LoraAdapter
    key: str
    whole: WholeTensor

    def load(self) -> torch.Tensor:
        return self.adapter.load_whole(self.key)


@dataclass(frozen=True)
class Update:
    """What one adapter does to one tensor.

    The new values are, in this order: `replaces`, or the stored ones; `tokens`, each row in the place of one;
    `adds`; and `pairs` on top, DoRA's lengths included. All of that times the scale is
    W + scale * (W' - W), so that a scale of 0 leaves W; rows that W hasn't are taken as they are.

    Attributes:
        adapter: which of a run's, counted from 0.
    """

    adapter: int
    scale: float
    pairs: tuple[PlacedPair, ...] = ()
    replaces: OwnValues | None = None
    tokens: tuple[OwnValues, ...] = ()
    adds: tuple[OwnValues, ...] = ()

    @property
    def is_linear(self) -> bool:
        """Whether it is the products of plain pairs alone."""
        whole = self.replaces or self.tokens or self.adds
        return not whole and not any(placed.module in placed.adapter.magnitudes for placed in self.pairs)

    @property
    def is_whole(self) -> bool:
        """Whether it gives values of its own for some rows."""
        return self.replaces is not None or bool(self.tokens)

    def rows(self) -> int:
        """How many rows of a table its values are for; 0 where it has none of its own."""
        tokens = [max(placed.whole.rows, default=-1) + 1 for placed in self.tokens]
        return max([self.replaces.whole.shape[0] if self.replaces else 0, *tokens])


@dataclass(frozen=True)
class _Span:
    """Rows of one matrix of a tensor.

    Attributes:
        first: the matrix' first row in the tensor.
        start: theirs in the matrix.
    """

    number: int
    first: int
    start: int


class MergedRows:
    """The rows of one tensor; see `converters.changes.Rows`. What was loaded for it is let go with the last row.

    Args:
        source: the stored tensor that is changed; None where zeros are.
        shape: as it becomes: a table may have more rows than it had.
    """

    def __init__(
        self, model: Model, source: str | None, shape: tuple[int, ...], updates: Sequence[Update], device: torch.device
    ) -> None:
        self._model, self._source, self._shape = model, source, shape
        self._updates = list(updates)
        self._device = device
        self._count = math.prod(shape[:-1])
        self._stored = 0 if source is None else math.prod(model.infos[source].shape[:-1])
        self._pairs: dict[PlacedPair, LoadedPair] = {}
        self._wholes: dict[OwnValues, torch.Tensor] = {}
        self._lengths: dict[PlacedPair, torch.Tensor] = {}
        self._changed = self._before = 0.0

    @property
    def is_changed(self) -> bool:
        """Whether any adapter does anything to it."""
        return bool(self._updates)

    @property
    def squares(self) -> tuple[float, float]:
        """||W' - W||_F^2 and ||W||_F^2 of the rows that were asked for."""
        return self._changed, self._before

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), float32 (stop - start, columns) on the CPU."""
        height = self._shape[-2] if len(self._shape) > 1 else 1
        parts = [self._rows(_Span(number, number * height, low), high - low)
                 for number, low, high in matrices_within(start, stop, height)]  # fmt: skip
        if stop == self._count:
            self._pairs.clear()
            self._wholes.clear()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, span: _Span, count: int) -> torch.Tensor:
        start = span.first + span.start
        plain = all(update.is_linear for update in self._updates)
        if plain and self._device.type == "cpu" and start + count <= self._stored:
            return self._plain_rows(span, count)
        stored = self._base(start, start + count).to(self._device)
        self._before += _square(stored)
        if plain:
            for update in self._updates:
                self._add_pairs(update, span, stored, update.scale)
            self._changed += self._linear_square(span) if span.start == 0 else 0.0
            return stored.cpu()
        merged = self._merged(span, stored)
        self._changed += _square(merged - stored)
        return merged.cpu()

    def _plain_rows(self, span: _Span, count: int) -> torch.Tensor:
        """Stored rows with plain pairs on top, on the CPU."""
        assert self._source is not None, "without a source nothing is stored"
        start = span.first + span.start
        stored = self._model.rows(self._source, start, start + count)
        rows = torch.empty(stored.shape)
        self._before += widened(stored, rows)
        for update in self._updates:
            self._add_pairs(update, span, rows, update.scale)
        self._changed += self._linear_square(span) if span.start == 0 else 0.0
        return rows

    def _linear_square(self, span: _Span) -> float:
        """||W' - W||_F^2 of a whole matrix, from the factors of its plain pairs: all of them are one product."""
        every = [(update.scale, self._loaded(placed)) for update in self._updates for placed in update.pairs
                 if placed.number == span.number]  # fmt: skip
        factors = [
            (pair.b.T, pair.a.T * scale * pair.scaling) if pair.transposed else (pair.a, pair.b * scale * pair.scaling)
            for scale, pair in every
        ]
        if not factors:
            return 0.0
        a, b = torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1)
        return norm(b, gram(a)) ** 2

    def _base(self, start: int, stop: int) -> torch.Tensor:
        """What is there before the updates, as a copy: stored rows, and of those that the model lacks an adapter's."""
        columns = self._shape[-1]
        have = max(0, min(stop, self._stored) - start)
        if have == stop - start:
            assert self._source is not None, "without a source nothing is stored"
            return self._model.rows(self._source, start, stop).to(torch.float32, copy=True)
        new = torch.zeros(stop - start, columns)
        if have:
            assert self._source is not None, "without a source nothing is stored"
            new[:have] = self._model.rows(self._source, start, start + have)
        extending = next((update for update in self._updates if update.is_whole and update.rows() > self._stored), None)
        if extending is not None and self._source is not None:
            new[have:] = self._with_values(extending, start + have, new[have:])
        return new

    def _merged(self, span: _Span, stored: torch.Tensor) -> torch.Tensor:
        if len(self._updates) == 1 and self._updates[0].scale == 1:
            return self._updated(self._updates[0], span, stored)
        merged = stored.clone()
        for update in self._updates:
            if update.is_linear:
                self._add_pairs(update, span, merged, update.scale)
            else:
                merged.add_(self._updated(update, span, stored).sub_(stored), alpha=update.scale)
        return merged

    def _updated(self, update: Update, span: _Span, stored: torch.Tensor) -> torch.Tensor:
        """A copy of some rows with all of an adapter's update."""
        rows = self._with_values(update, span.first + span.start, stored.clone())
        self._add_pairs(update, span, rows, 1.0)
        return rows

    def _add_pairs(self, update: Update, span: _Span, rows: torch.Tensor, scale: float) -> None:
        for placed in update.pairs:
            if placed.number == span.number:
                self._add_pair(update, placed, rows, span, scale)

    def _with_values(self, update: Update, start: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the tensor, from `start` on, with an adapter's own values; changed in place."""
        columns = rows.shape[1]
        if update.replaces is not None:
            values = self._whole(update.replaces).reshape(-1, columns)[start : start + len(rows)]
            rows[: len(values)] = values
        for placed in update.tokens:
            inside = [(row - start, place) for place, row in enumerate(placed.whole.rows)
                      if start <= row < start + len(rows)]  # fmt: skip
            if inside:
                to, of = (torch.tensor(side) for side in zip(*inside, strict=True))
                rows[to] = self._whole(placed)[of].to(rows)
        for placed in update.adds:
            values = self._whole(placed).reshape(-1, columns)[start : start + len(rows)]
            rows.add_(values.to(rows), alpha=placed.whole.factor)
        return rows

    def _add_pair(self, update: Update, placed: PlacedPair, rows: torch.Tensor, span: _Span, scale: float) -> None:
        loaded, start = self._loaded(placed), span.start
        height = loaded.a.shape[1] if loaded.transposed else loaded.b.shape[0]
        inside = rows[: max(0, height - start)]  # a pair may be older than the last tokens of a table
        if loaded.magnitude is None:
            add_update(inside, loaded.a, loaded.b, scale * loaded.scaling, start, transposed=loaded.transposed)
            return
        delta = torch.zeros_like(inside)
        add_update(delta, loaded.a, loaded.b, loaded.scaling, start, transposed=loaded.transposed)
        if loaded.by_row:
            stop = start + len(inside)
            factors = dora_factors(loaded.magnitude[start:stop], row_lengths(inside + delta))
            if loaded.covered is not None:
                factors = torch.where(loaded.covered[start:stop], factors, 1.0)
            factors = factors[:, None]
        else:
            factors = dora_factors(loaded.magnitude, self._column_lengths(update, placed, span.first))[None]
        inside.copy_(dora_rows(inside, delta, factors))

    def _column_lengths(self, update: Update, placed: PlacedPair, first: int) -> torch.Tensor:
        """||W + s B A|| of every column of a matrix that is stored turned over, by a pass over all of it."""
        if placed not in self._lengths:
            loaded = self._loaded(placed)
            height, columns = loaded.a.shape[1], loaded.b.shape[0]
            squares = torch.zeros(columns, dtype=torch.float64, device=self._device)
            step = max(1, _PIECE // columns)
            for start in range(0, height, step):
                stored = self._base(first + start, first + min(start + step, height)).to(self._device)
                rows = self._with_values(update, first + start, stored)
                add_update(rows, loaded.a, loaded.b, loaded.scaling, start, transposed=True)
                squares += column_squares(rows)
            self._lengths[placed] = squares.sqrt()
        return self._lengths[placed]

    def _loaded(self, placed: PlacedPair) -> LoadedPair:
        if placed not in self._pairs:
            for other in [one for one in self._pairs if one.number != placed.number]:
                del self._pairs[other]
            self._pairs[placed] = placed.load(self._device)
        return self._pairs[placed]

    def _whole(self, placed: OwnValues) -> torch.Tensor:
        if placed not in self._wholes:
            self._wholes[placed] = placed.load()
        return self._wholes[placed]


def _square(values: torch.Tensor) -> float:
    """||values||_F^2, row by row first: one float32 sum over millions of squares is off in its fourth digit."""
    return float(torch.linalg.vector_norm(values, dim=1).cpu().double().square().sum())

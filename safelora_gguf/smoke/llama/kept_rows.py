"""Which rows of a decode are kept, and where they go in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from safelora_gguf.smoke.llama.sequences import Span


@dataclass(frozen=True)
class Kept:
    """The positions of a sequence whose inputs are kept, ascending, and the row of the first one in the file."""

    positions: Any
    row: int


@dataclass(frozen=True)
class Run:
    """Rows of a file that follow one another: those of a reader from `row` on, taken from `at` of the kept ones."""

    reader: int
    row: int
    at: Any


@dataclass
class Decode:
    """A batch: its tokens, which of them (indices) are kept, and where they go; and what was seen of it so far.

    Attributes:
        ordered: the graph looks the tokens up in this order.
        picked: tensors of indices by which the graph picks the kept rows.
        multiplied: weights.
        written: groups.
        groups: each by the operands that its weights share.
    """

    tokens: Any
    kept: Any
    runs: Sequence[Run]
    ordered: bool = False
    picked: set[int] = field(default_factory=set)
    multiplied: set[str] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    groups: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens: Sequence[int], spans: Sequence[Span], readers: Sequence[Kept]) -> Decode:
        """Of a batch that the spans make up in their order."""
        found: list[tuple[int, int, Any]] = []
        start = 0
        for span in spans:
            for reader in span.readers:
                positions = readers[reader].positions
                first, last = np.searchsorted(positions, (span.first, span.last))
                if first < last:
                    found.append((reader, readers[reader].row + int(first), positions[first:last] - span.first + start))
            start += span.last - span.first
        assert start == len(tokens), (start, len(tokens))
        kept = np.unique(np.concatenate([indices for _, _, indices in found])) if found else np.empty(0, int)
        runs = [Run(reader, row, np.searchsorted(kept, indices)) for reader, row, indices in found]
        return cls(np.asarray(tokens), kept, runs)

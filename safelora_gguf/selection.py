"""Which modules are projected: cosines in, names out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from converters.errors import UsageError

Mode = Literal["threshold", "number", "ratio", "all"]


@dataclass(frozen=True)
class Selection:
    """A rule over cosines.

    Attributes:
        mode: `threshold` takes every cosine <= value; `number` the value smallest; `ratio` that share of the
            scored modules, rounded half up; `all` every one.
        value: None for `all`.
    """

    mode: Mode
    value: float | None = None

    def __post_init__(self) -> None:
        """Checks the value's range.

        Raises:
            UsageError: a value outside its mode's range.
        """
        if self.mode == "all":
            return
        if self.value is None or not math.isfinite(self.value):
            raise UsageError(f"{self.mode} needs a finite number")
        if self.mode == "number" and (self.value < 0 or self.value != int(self.value)):
            raise UsageError(f"number is {self.value:g}, expected a whole number of modules, 0 or more")
        if self.mode == "ratio" and not 0 <= self.value <= 1:
            raise UsageError(f"ratio is {self.value:g}, expected 0 to 1")
        if self.mode == "threshold" and not -1 <= self.value <= 1:
            raise UsageError(f"threshold is {self.value:g}, expected a cosine, -1 to 1")

    @property
    def chooses_nothing(self) -> bool:
        """Whether no cosine can matter."""
        return self.mode in ("number", "ratio") and self.value == 0


def select(cosines: Mapping[str, float | None], selection: Selection) -> frozenset[str]:
    """The modules to project. Those without a cosine (a zero update, a zero V) are never chosen.

    Among equal cosines the one that stands first in `cosines` comes first, so the choice is reproducible.
    """
    scored = {name: value for name, value in cosines.items() if value is not None}
    if selection.mode == "all" or selection.value is None:
        return frozenset(scored)
    if selection.mode == "threshold":
        return frozenset(name for name, value in scored.items() if value <= selection.value)
    share = selection.value if selection.mode == "number" else math.floor(selection.value * len(scored) + 0.5)
    return frozenset(sorted(scored, key=scored.__getitem__)[: int(share)])

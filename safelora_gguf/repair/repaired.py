"""What a repair is to do, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from converters.errors import Error
from safelora_gguf.repair.choosing import Chosen
from safelora_gguf.smoke.report import Bounds
from safelora_gguf.smoke.runs import Run

if TYPE_CHECKING:
    from converters.adapters.storing import Rounding
    from safelora_gguf.repair.solving import ModuleFigures

NOTHING_REFUSED = (
    "the aligned model refuses none of the {asked} harmful prompts: there is nothing that an adapter could have taken "
    "away or a repair bring back; is --model the aligned model, with its own chat template?"
)
ENOUGH_AS_IT_IS = (
    "the adapter refuses enough of the prompts that calibrate as it is: there is nothing to repair, and it was written "
    "unchanged"
)


@dataclass(frozen=True)
class Wishes:
    """What a repair is to do, apart from what it measures with.

    Attributes:
        judges: by name; the first one decides.
        mu: None: it is looked for.
        max_tokens: length of an answer.
    """

    bounds: Bounds
    judges: tuple[str, ...]
    mu: float | None
    max_tokens: int


@dataclass(frozen=True)
class Repaired:
    """What a repair came to.

    Attributes:
        mu: None where nothing was repaired.
        chosen: the search; None where there was none.
        judges: names with versions; the first one decides.
        runs: on the prompts that judge; the last that is no control decides.
        calibration: of the first-token score, as reports have it.
        figures: of every module that was repaired.
        roundings: how each pair was stored; None where nothing was written.
        failure: the first thing that llama.cpp failed on.
    """

    judges: tuple[str, ...]
    runs: tuple[Run, ...]
    mu: float | None = None
    chosen: Chosen | None = None
    controls: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    figures: Mapping[str, ModuleFigures] = field(default_factory=dict)
    roundings: Mapping[str, Rounding] | None = None
    failure: Error | None = None
    notes: tuple[str, ...] = ()

"""What a repair is to do, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from converters.errors import Error
from safelora_gguf.repair.choosing import Chosen
from safelora_gguf.smoke.report import Bounds
from safelora_gguf.smoke.runs import Run

if TYPE_CHECKING:
    from converters.adapters.storing import Rounding
    from safelora_gguf.repair.solving.solver import ModuleFigures

JudgedBy = Literal["other prompts", "cross-fitting", "calibration prompts"]
"""What the deciding run's figures are: the written adapter's on prompts that had no part in making it; an estimate, by
adapters that were repaired without the prompts they were asked; or the written adapter's on the prompts it was made by,
which flatters it."""

NOTHING_REFUSED = (
    "the aligned model refuses none of the {asked} harmful prompts: there is nothing that an adapter could have taken "
    "away or a repair bring back; is --model the aligned model, with its own chat template?"
)
ENOUGH_AS_IT_IS = (
    "the adapter refuses enough of the prompts that calibrate as it is: there is nothing to repair, and it was written "
    "unchanged"
)

BY_TEXT_ALONE = "first tokens don't tell refusals from answers here: mu was looked for by text alone"


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
        judged_by: what the deciding run tells; None where it tells nothing.
        failure: of llama.cpp: what ended the repair, else what left something unmeasured, else what was made good.
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
    judged_by: JudgedBy | None = None
    notes: tuple[str, ...] = ()

"""Candidates that are repaired: B as it was, and an A that does the less on inputs of harmful prompts the larger mu is.

How they come about is `repairing`'s matter; see `safelora_gguf.repair` for the method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from converters.adapters.output import Fact
from converters.errors import UsageError
from safelora_gguf.repair.choosing import LOWEST, OCTAVE, mu_at
from safelora_gguf.tune.found import Candidate
from safelora_gguf.tune.ways import Command, Way, Written

REPAIR = "repair by mu"

_FINEST = 1 / OCTAVE  # octaves: steps below this are not worth a measurement
_LEAST = mu_at(LOWEST)
_PAST = (0.99, 2.01)  # octaves past a boundary
_DIGITS = 4  # of mu, so that what a report tells makes the same adapter


@dataclass(frozen=True)
class Repair:
    """The adapter repaired with a weight on harmful inputs.

    Raises:
        UsageError: a mu that weighs nothing.
    """

    mu: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mu) and self.mu > 0):
            raise UsageError(f"--mu is {self.mu:g}, expected more than 0")

    @property
    def name(self) -> str:
        """What tables call it: `repair mu 2`."""
        return f"repair mu {self.mu:.10g}"

    def to_json(self) -> dict[str, Any]:
        return {"operator": "repair", "mu": self.mu}


class Repairing(Protocol):
    """Makes repaired adapters of any mu; see `repairing.Repairer`."""

    @property
    def modules(self) -> int:
        """How many are repaired."""

    @property
    def command(self) -> Command:
        """What makes the same adapters, but for mu."""

    def norm_ratio(self, repair: Repair) -> float | None:
        """The repaired adapter's total norm over the untouched one's; None while it was never made."""

    def draft(self, repair: Repair, target: Path) -> None:
        """Makes one that is only measured."""

    def write(
        self,
        repair: Repair,
        target: Path,
        *,
        to: Literal["gguf", "peft"] | None = None,
        force: bool = False,
        facts: Mapping[str, Fact] | None = None,
    ) -> Written: ...


@dataclass(frozen=True)
class RepairLine:
    """Repairs from a small mu to a large one.

    Attributes:
        repairs: by growing mu.
    """

    repairs: tuple[Repair, ...]
    repairing: Repairing

    @property
    def name(self) -> str:
        return REPAIR

    @property
    def candidates(self) -> Sequence[Candidate]:
        return [self._candidate(repair) for repair in self.repairs]

    def between(self, below: float, above: float) -> Candidate | None:
        """The geometric middle, down to quarter octaves; below the first one half of it, if that isn't below all mu
        that `repair` looks among."""
        if above >= 1:
            return None  # of so large a mu the position doesn't tell
        high = _mu_at(above)
        low = _mu_at(below) if below > 0 else high / 4
        if (below <= 0 and high / 2 < _LEAST) or math.log2(high / low) < 1.99 * _FINEST:
            return None
        return self._candidate(Repair(_rounded(math.sqrt(low * high))))

    def past(self, position: float) -> tuple[float, float]:
        """One or two octaves further."""
        if position >= 1:
            return 1.0, 1.0
        less, more = (_position(_mu_at(position) * 2**octaves) for octaves in _PAST)
        return less, more

    def way(self, candidate: Candidate) -> Way:
        named = next((one for one in self.repairs if one.name == candidate.name), None)
        repair = named or Repair(_mu_at(candidate.position))

        def write(
            target: Path,
            *,
            to: Literal["gguf", "peft"] | None = None,
            force: bool = False,
            facts: Mapping[str, Fact] | None = None,
        ) -> Written:
            return self.repairing.write(repair, target, to=to, force=force, facts=facts)

        command = self.repairing.command
        return Way(
            origin="repair",
            setting=repair.to_json(),
            command=replace(command, options=(*command.options, "--mu", f"{repair.mu:.10g}")),
            scale=None,
            modules=self.repairing.modules,
            norm_ratio=self.repairing.norm_ratio(repair),
            write=write,
            draft=lambda target: self.repairing.draft(repair, target),
            control=None,
        )

    def _candidate(self, repair: Repair) -> Candidate:
        return Candidate(repair.name, REPAIR, _position(repair.mu), ("repair", repair.mu), self.repairing.modules)


def _position(mu: float) -> float:
    return mu / (1 + mu)  # at 0 the adapter is untouched; towards 1 nothing else counts


def _mu_at(position: float) -> float:
    return _rounded(position / (1 - position))


def _rounded(mu: float) -> float:
    return float(f"{mu:.{_DIGITS}g}")

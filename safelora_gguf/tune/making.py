"""How the candidates of one search are made, whatever line they stand on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from safelora_gguf.setting import Setting
from safelora_gguf.tune.found import Candidate
from safelora_gguf.tune.grid import UNTOUCHED, CandidateLine, candidate_of, scaled
from safelora_gguf.tune.measuring import ADAPTER
from safelora_gguf.tune.ways import Scored, Way, way_of

_EVERYTHING = "everything projected"


@dataclass(frozen=True)
class Making:
    """The lines of a search, and the candidates that stand on none.

    Attributes:
        outtype: of every adapter that is written.
        projection: projects every module, to compare with; None where nothing is projected.
    """

    lines: tuple[CandidateLine, ...]
    scored: Scored
    outtype: str
    projection: Setting | None

    @property
    def untouched(self) -> Candidate:
        """The adapter as it is."""
        return replace(candidate_of(UNTOUCHED, self.scored, ADAPTER, 0.0), name=ADAPTER)

    @property
    def everything(self) -> Candidate | None:
        """The adapter with every module projected."""
        return None if self.projection is None else candidate_of(self.projection, self.scored, _EVERYTHING, 1.0)

    def without(self, name: str) -> Making:
        """The same without a line."""
        return replace(self, lines=tuple(line for line in self.lines if line.name != name))

    def scaled(self, scale: float) -> Candidate:
        """The untouched adapter at a scale."""
        return scaled(scale, self.scored)

    def projects(self, candidate: Candidate) -> bool:
        """Whether it is the adapter with modules projected."""
        way = self.way(candidate)
        return way.origin == "projection" and way.modules > 0

    def repairs(self, candidate: Candidate) -> bool:
        """Whether it is the adapter repaired."""
        return self.way(candidate).origin == "repair"

    def way(self, candidate: Candidate) -> Way:
        """How a candidate is made."""
        if candidate.line == ADAPTER:
            return replace(way_of(UNTOUCHED, self.scored, self.outtype), scale=1.0)
        if candidate.line == _EVERYTHING:
            assert self.projection is not None, "it was made of it"
            return way_of(self.projection, self.scored, self.outtype)
        return next(line for line in self.lines if line.name == candidate.line).way(candidate)

"""The candidates of a search: lines of settings, each from little change to much.

    paper by number          C B in the modules of smallest cosine, at quantiles of the cosines and the usual threshold
    paper by strength        (1 - s) B + s C B in every module
    subspace rank k by ...   both again, with P_k instead of C
    repair by mu             another A, for which inputs of harmful prompts count mu times (see `repair_line`)
    scaling                  the whole adapter times a factor, which llama.cpp does by itself: what the others are held
                             against, whatever was asked for

Whatever else makes adapters can stand on a line of its own: see `CandidateLine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from converters.errors import UsageError
from safelora_gguf.repair.choosing import OCTAVES
from safelora_gguf.selection import Selection
from safelora_gguf.setting import EVERY, Operator, Setting
from safelora_gguf.tune.found import Candidate, Line
from safelora_gguf.tune.repair_line import REPAIR, Repair, Repairing, RepairLine
from safelora_gguf.tune.ways import Described, Scored, Way, way_of

UNTOUCHED = Setting("scale")
"""The adapter as it is."""

SCALING = "scaling"

_USUAL_THRESHOLD = 0.35
_PAPER_SHARES = tuple(eighth / 8 for eighth in range(1, 9))
_PAPER_STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
_SUBSPACE_SHARES = (0.25, 0.5, 0.75, 1.0)
_SUBSPACE_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
_SCALES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
_FINEST = 0.025  # steps of strength or scale below this are not worth a measurement
_DIGITS = 4

Axis = Literal["number", "strength", "scale"]


class CandidateLine(Line, Protocol):
    """A line whose candidates can be made. Those of other origins than a `Setting` need no more than this."""

    def way(self, candidate: Candidate) -> Way: ...


@dataclass(frozen=True)
class GridOptions:
    """What the grid is made of; nothing at all: the default.

    As soon as one is given, the grid holds only what is, and plain scaling: selections without strengths are projected
    at full strength, strengths without selections are for every module, both together are combined; an operator alone
    has its default lines.

    Raises:
        UsageError: a scale that doesn't shrink, a mu that weighs nothing.
    """

    operators: tuple[Operator, ...] = ()
    ranks: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    numbers: tuple[int, ...] = ()
    strengths: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    mus: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for scale in self.scales:
            if not 0 < scale < 1:
                raise UsageError(f"--scale is {scale:g}, expected more than 0 and less than 1")
        for selection in self.selections:
            for strength in self.strengths or (1.0,):
                Setting("paper", selection=selection, strength=strength)
        for mu in self.mus:
            Repair(mu)
        if self.ranks and self.operators and "subspace" not in self.operators:
            raise UsageError("--rank is for --operator subspace")

    @property
    def is_default(self) -> bool:
        return not any(vars(self).values())

    @property
    def selections(self) -> tuple[Selection, ...]:
        thresholds = (Selection("threshold", value) for value in self.thresholds)
        return (*thresholds, *(Selection("number", float(value)) for value in self.numbers))

    @property
    def repairs(self) -> tuple[Repair, ...]:
        """By growing mu."""
        mus = self.mus or (OCTAVES if self.is_default else ())
        return tuple(Repair(mu) for mu in sorted(set(mus)))

    @property
    def asked(self) -> tuple[tuple[Operator, int | None], ...]:
        """The operators that the adapter must be scored by, with their ranks."""
        if self.operators:
            operators = self.operators
        elif self.is_default:
            operators = ("paper", "subspace")
        elif self.ranks:
            operators = ("subspace",)
        else:
            operators = ("paper",) if self.selections or self.strengths else ()
        ranks = [Setting("subspace", rank).rank for rank in self.ranks or (None,)]
        pairs: list[tuple[Operator, int | None]] = []
        for operator in operators:
            pairs += [(operator, None)] if operator == "paper" else [(operator, rank) for rank in ranks]
        return tuple(dict.fromkeys(pairs))

    def to_json(self) -> dict[str, Any]:
        """What was asked for; "default" where nothing was."""
        given: dict[str, Any] = {name: list(values) for name, values in vars(self).items() if values}
        return given or {"default": True}


@dataclass(frozen=True)
class SettingLine:
    """Settings that differ along one axis.

    Attributes:
        settings: by growing position.
        modules: how many have a cosine, for `number`.
        outtype: of the adapters that are written.
    """

    name: str
    axis: Axis
    settings: tuple[Setting, ...]
    scored: Scored
    modules: int
    outtype: str

    @property
    def candidates(self) -> Sequence[Candidate]:
        return [self._candidate(setting) for setting in self.settings]

    def between(self, below: float, above: float) -> Candidate | None:
        setting = self._between(below, above)
        return None if setting is None else self._candidate(setting)

    def past(self, position: float) -> None:
        """Nowhere: more change keeps less."""

    def way(self, candidate: Candidate) -> Way:
        return way_of(self._at(candidate), self.scored, self.outtype)

    def _at(self, candidate: Candidate) -> Setting:
        """The setting of a candidate: one of the grid's, or one that `between` made of its position."""
        named = next((setting for setting in self.settings if setting.name == candidate.name), None)
        return named or self._placed(candidate.position)

    def _candidate(self, setting: Setting) -> Candidate:
        return candidate_of(setting, self.scored, self.name, self.position(setting))

    def position(self, setting: Setting) -> float:
        """Its place on the line: the share of modules, the strength, or what is taken from the scale."""
        if self.axis == "number":
            return len(self.scored.chosen(setting)) / max(1, self.modules)
        return setting.strength if self.axis == "strength" else _from_scale(setting.scale)

    def _between(self, below: float, above: float) -> Setting | None:
        if self.axis == "number":
            low, high = (round(position * self.modules) for position in (below, above))
            return None if high - low < 2 else self._placed((low + high) // 2 / self.modules)
        if round(above - below, _DIGITS) < 2 * _FINEST:
            return None
        return self._placed(round((below + above) / 2, _DIGITS))

    def _placed(self, position: float) -> Setting:
        """The setting that stands at a position."""
        like = self.settings[-1]
        if self.axis == "number":
            return replace(like, selection=Selection("number", float(round(position * self.modules))))
        if self.axis == "strength":
            return replace(like, strength=position)
        return replace(like, scale=round(1 - position, _DIGITS))


def candidate_of(setting: Setting, scored: Scored, line: str, position: float) -> Candidate:
    """A setting as a candidate; scaling changes every module, except by 1."""
    scales = setting.operator == "scale" and setting.scale != 1
    changed = scored.total if scales else len(scored.chosen(setting))
    return Candidate(setting.name, line, position, scored.key(setting), changed)


def scaled(scale: float, scored: Scored) -> Candidate:
    """The adapter at a scale, as a candidate of the line of plain scaling, of which a few digits are enough."""
    setting = Setting("scale", scale=round(scale, _DIGITS))
    return candidate_of(setting, scored, SCALING, _from_scale(setting.scale))


def _from_scale(scale: float) -> float:
    return round(1 - scale, _DIGITS)


def make_lines(
    options: GridOptions, scored: Scored, outtype: str, repairing: Repairing | None = None
) -> tuple[CandidateLine, ...]:
    """The grid's lines, those without any candidate left out; the last one is plain scaling.

    Args:
        scored: by all that `options.asked` names.
        outtype: of the adapters that are written.
        repairing: makes what is repaired; None: nothing is.

    Raises:
        UsageError: a threshold, number or strength out of its range.
    """
    lines: list[SettingLine] = []
    for operator, rank in options.asked:
        cosines = scored.cosines(operator, rank)
        modules = sum(value is not None for value in cosines.values())
        for name, axis, settings in _projections(options, Setting(operator, rank), modules):
            line = SettingLine(name, axis, (), scored, modules, outtype)
            ordered = sorted(settings, key=line.position)
            lines.append(replace(line, settings=tuple(dict.fromkeys(ordered))))
    repairs = () if repairing is None or not options.repairs else (RepairLine(options.repairs, repairing),)
    scaling = SettingLine(SCALING, "scale", _scalings(options), scored, 0, outtype)
    return *(line for line in lines if line.settings), *repairs, scaling


def planned_lines(
    options: GridOptions, modules: int, *, repair: bool = True
) -> tuple[tuple[str, tuple[Described, ...]], ...]:
    """Names and settings of the grid's lines, before anything is scored: thresholds choose what nobody knows yet.

    Args:
        modules: how many the adapter has.
        repair: whether it can be repaired.
    """
    asked = [Setting(operator, rank) for operator, rank in options.asked]
    lines = [(name, tuple(settings)) for plain in asked for name, _, settings in _projections(options, plain, modules)]
    repairs = ((REPAIR, options.repairs),) if repair and options.repairs else ()
    return *lines, *repairs, (SCALING, _scalings(options))


def _scalings(options: GridOptions) -> tuple[Setting, ...]:
    return tuple(Setting("scale", scale=scale) for scale in sorted(set(options.scales or _SCALES), reverse=True))


def _projections(options: GridOptions, plain: Setting, modules: int) -> list[tuple[str, Axis, list[Setting]]]:
    """(name, axis, settings) of one operator's lines."""
    called = plain.operator if plain.rank is None else f"{plain.operator} rank {plain.rank}"
    chosen, strengths = options.selections, options.strengths
    if chosen and strengths:
        each = [(replace(plain, selection=one), sorted(strengths)) for one in chosen]
        return [(f"{one.name} by strength", "strength", [replace(one, strength=s) for s in values])
                for one, values in each]  # fmt: skip
    if chosen or not strengths:
        chosen = chosen or _quantiles(plain, modules)
    lines: list[tuple[str, Axis, list[Setting]]] = []
    if chosen:
        lines.append((f"{called} by number", "number", [replace(plain, selection=one) for one in chosen]))
    if strengths or not options.selections:
        default = _PAPER_STRENGTHS if plain.operator == "paper" else _SUBSPACE_STRENGTHS
        values = sorted(strengths or default)
        lines.append((f"{called} by strength", "strength", [replace(plain, strength=s) for s in values]))
    return lines


def _quantiles(plain: Setting, modules: int) -> tuple[Selection, ...]:
    """Numbers of modules at even steps, and the threshold that the literature uses."""
    shares = _PAPER_SHARES if plain.operator == "paper" else _SUBSPACE_SHARES
    numbers = sorted({max(1, math.floor(share * modules + 0.5)) for share in shares})
    usual = (Selection("threshold", _USUAL_THRESHOLD),) if plain.operator == "paper" else ()
    partial = tuple(Selection("number", float(number)) for number in numbers if number < modules)
    return (*usual, *partial, EVERY)

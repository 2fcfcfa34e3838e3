"""What a repair did to each adapted weight, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from converters.adapters.output import AdapterOutput
from converters.adapters.storing import Rounding
from converters.products import gram, norm
from safelora_gguf.repair.inputs import RepairInputs
from safelora_gguf.report import label_of, rounding_notes

if TYPE_CHECKING:
    import torch

_FEW = 3  # names of modules in a note


class Figures(Protocol):
    """What solving tells of a module (`solving.ModuleFigures`)."""

    @property
    def repaired(self) -> bool: ...
    @property
    def kept_benign(self) -> float | None: ...
    @property
    def kept_harmful(self) -> float | None: ...
    @property
    def delta_norm(self) -> float: ...
    @property
    def delta_norm_after(self) -> float: ...
    @property
    def benign_tokens(self) -> int: ...
    @property
    def harmful_tokens(self) -> int: ...
    @property
    def note(self) -> str | None: ...


@dataclass(frozen=True)
class RepairedModule:
    """One adapted weight before and after.

    Attributes:
        name: the GGUF tensor.
        shape: (out, in) of the weight.
        expert: which matrix of the stack `name`; None for an ordinary weight.
        kept_benign, kept_harmful: ||B A' x|| / ||B A x|| over the inputs of each set; None where nothing was read.
        delta_norm, delta_norm_after: ||scaling B A||_F.
        benign_tokens, harmful_tokens: inputs that were read.
        stored_error: ||stored delta - delta|| / ||delta||; None when nothing was written.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    expert: int | None
    repaired: bool
    kept_benign: float | None = None
    kept_harmful: float | None = None
    delta_norm: float | None = None
    delta_norm_after: float | None = None
    benign_tokens: int | None = None
    harmful_tokens: int | None = None
    stored_error: float | None = None

    @property
    def label(self) -> str:
        """The name, and which of a stack's experts it is."""
        return label_of(self.name, self.expert)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape)}


def norm_ratio(modules: Sequence[RepairedModule]) -> float | None:
    """`ratio_of_norms` of all modules of an adapter; None where nothing is known or is 0."""
    return ratio_of_norms([(module.delta_norm or 0.0, module.delta_norm_after or 0.0) for module in modules])


def ratio_of_norms(norms: Sequence[tuple[float, float]]) -> float | None:
    """sqrt(sum ||s B A'||^2 / sum ||s B A||^2) of (||s B A||, ||s B A'||) by module; None where all are 0 before."""
    before, after = (math.fsum(pair[at] ** 2 for pair in norms) for at in (0, 1))
    return math.sqrt(after / before) if before > 0 else None


def module_reports(
    inputs: RepairInputs,
    output: AdapterOutput,
    figures: Mapping[str, Figures],
    roundings: Mapping[str, Rounding] | None = None,
) -> tuple[RepairedModule, ...]:
    """Every pair of the adapter.

    Args:
        figures: by module, for those that were repaired; empty where nothing was solved.
        roundings: how each pair was stored; None where nothing was written.
    """
    return tuple(
        _module(inputs, output, module, figures, (roundings or {}).get(module)) for module in inputs.adapter.pairs
    )


def _module(
    inputs: RepairInputs,
    output: AdapterOutput,
    module: str,
    figures: Mapping[str, Figures],
    rounding: Rounding | None,
) -> RepairedModule:
    pair, found = inputs.adapter.pairs[module], figures.get(module)
    before = after = None
    if found is not None:
        before, after = found.delta_norm, found.delta_norm_after
    elif figures:
        before = after = _norm_of(inputs, module)
    return RepairedModule(
        name=output.name_of(module) or inputs.weight_of(module),
        shape=pair.shape,
        rank=pair.rank,
        expert=pair.expert,
        repaired=found is not None and found.repaired,
        kept_benign=found.kept_benign if found else None,
        kept_harmful=found.kept_harmful if found else None,
        delta_norm=before,
        delta_norm_after=after,
        benign_tokens=found.benign_tokens if found else None,
        harmful_tokens=found.harmful_tokens if found else None,
        stored_error=rounding.error if rounding else None,
    )


def _norm_of(inputs: RepairInputs, module: str) -> float:
    """||s B A||_F of a module that is left alone."""
    return delta_norm(inputs, module, *(half.float() for half in inputs.adapter.load(module)))


def delta_norm(inputs: RepairInputs, module: str, a: torch.Tensor, b: torch.Tensor) -> float:
    """||s B A||_F of a module with this A (r, in) and B (out, r), and the adapter's scaling."""
    return abs(inputs.adapter.pairs[module].scaling) * norm(b, gram(a))


def module_notes(
    inputs: RepairInputs,
    output: AdapterOutput,
    figures: Mapping[str, Figures],
    roundings: Mapping[str, Rounding] | None = None,
    *,
    outtype: str,
) -> tuple[str, ...]:
    """What a reader should know of single modules: those left alone, by reason, and rounding; each reason once."""
    reasons = {**inputs.left_alone, **{module: one.note for module, one in figures.items() if one.note}}
    by_reason: dict[str, list[str]] = {}
    for module, reason in reasons.items():
        by_reason.setdefault(reason or "", []).append(_label(inputs, output, module))
    notes = [_left(names, inputs, reason) for reason, names in by_reason.items()]
    by_note: dict[str, list[str]] = {}
    for module, rounding in (roundings or {}).items():
        for note in rounding_notes(rounding, outtype):
            by_note.setdefault(note, []).append(_label(inputs, output, module))
    return (*notes, *(_stored(names, inputs, note) for note, names in by_note.items()))


def _left(names: Sequence[str], inputs: RepairInputs, reason: str) -> str:
    count = f"{len(names)} of {len(inputs.adapter.pairs)} modules"
    return f"{count} {'is' if len(names) == 1 else 'are'} left as they were: {reason} ({_few(names)})"


def _stored(names: Sequence[str], inputs: RepairInputs, note: str) -> str:
    if len(names) == 1:
        return f"{names[0]}: {note}"
    return f"{len(names)} of {len(inputs.adapter.pairs)} modules: {note} ({_few(names)})"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def _label(inputs: RepairInputs, output: AdapterOutput, module: str) -> str:
    return label_of(output.name_of(module) or inputs.weight_of(module), inputs.adapter.pairs[module].expert)

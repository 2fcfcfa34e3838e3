"""What an extrapolation does and finds, whatever its output: an adapter, a model, or the next step of a chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.adapters.output import Fact, Origin
from converters.converted_model import ConvertedModel
from converters.errors import UsageError
from converters.identity import plain_name
from converters.layouts import common_models
from converters.models import Model
from converters.names import first_few, named
from converters.opening import open_model
from safelora_gguf._version import __version__
from safelora_gguf.alignment import Differences
from safelora_gguf.device import exact_float32, resolve_device
from safelora_gguf.extrapolate_model import KeptModel, check_model
from safelora_gguf.lox import check_rank, extrapolated_weights, identical, same_weight, single_matrices
from safelora_gguf.lox_steps import Extrapolator, Progress, Step, Steps
from safelora_gguf.pairing import Triple, check_family
from safelora_gguf.references import CLEAR
from safelora_gguf.report import InputReport
from safelora_gguf.unwritten import Unwritten

_LARGEST_COEF = 10.0
_TOLERANCES = (1e-6, 0.5)


@dataclass(frozen=True)
class Extrapolation:
    """What is done to a model, apart from files.

    Attributes:
        rank: k, the directions of each matrix's V; 0 for all of V.
        coef: how much of them is added.
        tolerance: of the singular vectors' residual, in units of the largest singular value.
    """

    rank: int = 6
    coef: float = 1.25
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        """Raises UsageError: a value out of range."""
        if self.rank < 0:
            raise UsageError(f"rank is {self.rank}, expected at least 0 (0: all of the difference)")
        if not 0 < self.coef <= _LARGEST_COEF:
            raise UsageError(
                f"coef is {self.coef:g}, expected more than 0 (less would take alignment away) and at most "
                f"{_LARGEST_COEF:g}"
            )
        if not _TOLERANCES[0] <= self.tolerance <= _TOLERANCES[1]:
            raise UsageError(f"tolerance is {self.tolerance:g}, expected {_TOLERANCES[0]:g} to {_TOLERANCES[1]:g}")


@dataclass(frozen=True)
class Matched:
    """Both models, and their matrices in pairs.

    Attributes:
        aligned: as it is stored.
        models: base and aligned in the run's layout.
        differing: those of `every` that don't hold the same values in both.
    """

    aligned: Model
    models: tuple[Model, Model]
    every: Sequence[Triple]
    differing: Sequence[Triple]


def matched(base: str | Path, aligned: str | Path, rank: int, *, in_gguf: bool) -> Matched:
    opened = open_model(base), open_model(aligned)
    models = common_models(*opened, in_gguf=in_gguf)
    check_family(*models)
    every = extrapolated_weights(*models, rank)
    check_rank(rank, every)
    differing = [triple for triple in every if not same_weight(*models, triple)]
    if not differing:
        raise identical(*models)
    return Matched(opened[1], models, every, differing)


class Findings:
    """One extrapolation apart from its output.

    Attributes:
        inputs: base and aligned.
        found: by module, what each step was; all of them once every tensor was asked for.
    """

    def __init__(
        self,
        wanted: Extrapolation,
        found: Matched,
        name_of: Callable[[Triple], str],
        *,
        as_adapter: bool = False,
        invocation: str | None = None,
    ) -> None:
        self.inputs = InputReport.of("base", found.models[0]), InputReport.of("aligned", found.models[1])
        self.found: Mapping[str, Step] = {}
        self._wanted, self._models, self._every, self._name_of = wanted, found.models, found.every, name_of
        self._differing = frozenset(triple.pair.module for triple in found.differing)
        self._as_adapter, self._invocation = as_adapter, invocation

    def steps(
        self, triples: Sequence[Triple], device: torch.device, allow_noise: bool, progress: Progress | None = None
    ) -> Steps:
        """The steps of some matrices, none computed yet; `found` fills with them."""
        differences = Differences(*self._models, triples, device)
        extrapolator = Extrapolator(*self._models, differences, self._wanted.rank, self._wanted.coef,
                                    self._wanted.tolerance, allow_noise)  # fmt: skip
        steps = Steps(extrapolator, triples, progress)
        self.found = steps.found
        return steps

    def differ(self, triple: Triple) -> bool:
        """Whether base and aligned hold different values in a matrix."""
        return triple.pair.module in self._differing

    def notes(self) -> list[str]:
        same = [triple for triple in self._every if triple.pair.module not in self._differing]
        notes = []
        if same:
            names = first_few([self._name_of(triple) for triple in same])
            notes.append(f"base and aligned hold the same values in {names}: left as they are")
        notes += [
            f"{self._name_of(triple)}: the base has {rows[0]} tokens and the aligned model {rows[1]}; rows that "
            f"only one of them has are left as they are"
            for triple in self._every
            if len(set(rows := self._rows(triple))) > 1
        ]
        single = single_matrices(*self._models)
        if single:
            notes.append(f"in one of the models alone, and left as they are: {', '.join(single)}")
        notes += self._of_the_layout()
        notes += [f"{module}: {step.note}" for module, step in self.found.items() if step.note]
        low = [module for module, step in self.found.items() if step.snr is not None and step.snr < CLEAR]
        if low:
            notes.append(f"the references' rounding noise shows: the signal to noise ratio is under {CLEAR} in "
                         f"{len(low)} of {len(self.found)} matrices")  # fmt: skip
        return notes

    def _of_the_layout(self) -> list[str]:
        """What became of a checkpoint that was seen as GGUF."""
        aligned = self._models[1]
        if not isinstance(aligned, ConvertedModel):
            return []
        left, split = aligned.unplaced(), aligned.split()
        notes = [f"GGUF has no place for {named(left)}: left out"] if left else []
        if split and self._as_adapter:
            notes.append(
                f"{split[0]} and {len(split) - 1} more are parts of larger matrices in {aligned.path}: each has its "
                f"own directions here, those of the whole in a safetensors model"
            )
        return notes

    def _rows(self, triple: Triple) -> tuple[int, int]:
        """The rows that base and aligned have."""
        names = triple.base_tensor, triple.aligned_tensor
        ours, theirs = (model.infos[name].shape[-2] for model, name in zip(self._models, names, strict=True))
        return ours, theirs

    def origin(self) -> Origin:
        wanted = self._wanted
        facts: dict[str, Fact] = {
            "safelora.version": __version__,
            "safelora.lox.rank": wanted.rank,
            "safelora.lox.coef": float(wanted.coef),
            "safelora.lox.tolerance": float(wanted.tolerance),
        }
        for item in self.inputs:
            facts[f"safelora.{item.role}.name"] = plain_name(Path(item.path))
            facts[f"safelora.{item.role}.fingerprint"] = item.fingerprint
        part = f"the {wanted.rank} leading directions" if wanted.rank else "all"
        description = (
            f"LoX (arXiv 2506.15606): {wanted.coef:g} times {part} of what alignment changed, added to the aligned "
            f"model's matrices, so that later fine-tuning undoes less of it. Measure what it refuses before relying on "
            f"it."
        )
        return Origin("LoX", description, ("lox", "safelora-gguf"), facts, self._invocation)


def extrapolated_model(
    base: str | Path,
    aligned: str | Path,
    *,
    rank: int = 6,
    coef: float = 1.25,
    tolerance: float = 1e-3,
    device: str = "auto",
    allow_noisy_reference: bool = False,
) -> Unwritten:
    """The extrapolated model without a file, for a merge or a conversion that follows.

    Args and Raises: see `extrapolate_models`; what lies in the values is found when they are asked for.
    """
    wanted, where = Extrapolation(rank, coef, tolerance), resolve_device(device)
    found = matched(base, aligned, rank, in_gguf=False)
    check_model(found.aligned, found.models, found.differing)
    kept = KeptModel(found.aligned, found.models, found.differing)
    run = Findings(wanted, found, kept.name_of)
    with exact_float32(), torch.inference_mode():
        changed = kept.changed(run.steps(found.differing, where, allow_noisy_reference))
    return Unwritten(changed, run.inputs, run.origin().facts, kept.losses, lambda: tuple(run.notes()))

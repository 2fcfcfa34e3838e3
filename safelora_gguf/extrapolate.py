"""Extrapolation from end to end: two models in, a LoRA adapter or a hardened model out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from converters.adapters.card import card_of
from converters.adapters.output import Fact, Origin
from converters.atomic import atomic_file, check_target
from converters.converted_model import ConvertedModel
from converters.errors import OutputPathError, UsageError
from converters.identity import plain_name
from converters.layouts import common_models
from converters.model_card import CardInput, ModelCard
from converters.models import Model
from converters.names import first_few, named
from converters.opening import open_model
from converters.paths import resolved
from safelora_gguf._version import __version__
from safelora_gguf.alignment import Differences
from safelora_gguf.device import exact_float32, resolve_device
from safelora_gguf.extrapolate_model import CheckpointForm, GgufForm, plan_model
from safelora_gguf.extrapolate_report import ExtrapolateReport, TensorReport
from safelora_gguf.lox import check_rank, extrapolated_weights, identical, same_weight, single_matrices
from safelora_gguf.lox_adapter import AdapterForm
from safelora_gguf.lox_steps import Extrapolator, Step, Steps
from safelora_gguf.pairing import Triple, check_family
from safelora_gguf.references import CLEAR
from safelora_gguf.report import InputReport, OutputReport

Progress = Callable[[int, int, str], None]
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


def extrapolate_models(
    base: str | Path,
    aligned: str | Path,
    out: str | Path,
    *,
    rank: int = 6,
    coef: float = 1.25,
    form: Literal["adapter", "model"] = "adapter",
    outtype: str | None = None,
    to: Literal["gguf", "peft"] | None = None,
    tolerance: float = 1e-3,
    device: str = "auto",
    allow_noisy_reference: bool = False,
    card: str | Path | None = None,
    invocation: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ExtrapolateReport:
    """Extrapolates a model's alignment (LoX): W_aligned + coef * the rank-k part of (W_aligned - W_base).

    Args:
        base: the model before its alignment, in any format that `project_adapter` reads.
        aligned: the model after it.
        out: for an adapter see `plan_output`; for a model a directory where `aligned` is in safetensors, a file ending
            in .gguf where it is GGUF.
        rank, coef, tolerance: see `Extrapolation`.
        form: an adapter of rank k for the aligned model, whose scale 1 means coef; or the extrapolated model itself.
        outtype: of an adapter f32 (default), f16, bf16, q8_0. Of a model: every tensor keeps its type by default;
            f32, f16, bf16, or for GGUF any of llama.cpp's quantizations, made by its own quantizer.
        to: see `plan_output`.
        device: auto, cpu, cuda, cuda:N or mps.
        allow_noisy_reference: go on where quantized references differ by nothing but rounding noise.
        card: where a model card goes beside a file; a directory has its own.
        invocation: the command line, for the card.
        force: replace an existing output.
        dry_run: check all headers, compute and write nothing.
        progress: called with (bytes done, bytes in all, next tensor).

    Returns:
        The report; its `to_json()` is what the command line prints with --json.

    Raises:
        UsageError: options that make no sense.
        InputError: a file or an output path that cannot be used; nothing was written.
        WriteError: the disk is full or fails; nothing partial was left.
        EngineError: llama.cpp's quantizer failed.
    """
    wanted = Extrapolation(rank, coef, tolerance)
    if form == "adapter" and rank == 0:
        raise UsageError("rank 0 (all of the difference) is no adapter; use --as model")
    if form == "model" and to is not None:
        raise UsageError("--to is for adapters; a model is written in the format that --aligned has")
    where = resolve_device(device)
    opened = open_model(base), open_model(aligned)
    models = common_models(*opened, in_gguf=form == "adapter")
    check_family(*models)
    every = extrapolated_weights(*models, rank)
    check_rank(rank, every)
    triples = [triple for triple in every if not same_weight(*models, triple)]
    if not triples:
        raise identical(*models)
    output: AdapterForm | CheckpointForm | GgufForm
    if form == "adapter":
        output = AdapterForm(out, models, triples, rank, outtype=outtype or "f32", to=to, force=force)
    else:
        output = plan_model(out, opened[1], models, triples, outtype=outtype, force=force)
    beside = None if card is None else _card_path(Path(card), output, opened, force)
    run = _Run(wanted, output, models, every, triples, invocation=invocation)
    if not dry_run:
        with exact_float32(), torch.inference_mode():
            run.write(where, allow_noisy_reference, progress)
        if beside is not None:
            with atomic_file(beside, force=force) as file:
                file.write(run.card().encode("utf-8"))
    return run.report(dry_run=dry_run)


def _card_path(
    card: Path, output: AdapterForm | CheckpointForm | GgufForm, inputs: Sequence[Model], force: bool
) -> Path:
    """A card's place, which is no other output's, and no input.

    Raises:
        OutputPathError: it is taken or unusable.
    """
    check_target(card, force=force)
    for other in (output.target, *(path for model in inputs for path in (model.path, *model.sources))):
        if resolved(card).is_relative_to(resolved(other)):
            raise OutputPathError(f"is {other} or lies in it; choose another place for the card", file=card)
    return card


class _Run:
    """One extrapolation between its checks and its report."""

    def __init__(
        self,
        wanted: Extrapolation,
        output: AdapterForm | CheckpointForm | GgufForm,
        models: tuple[Model, Model],
        every: Sequence[Triple],
        differing: Sequence[Triple],
        *,
        invocation: str | None,
    ) -> None:
        self._wanted, self._output, self._models, self._every = wanted, output, models, every
        self._differing = frozenset(triple.pair.module for triple in differing)
        self._invocation = invocation
        self._inputs = InputReport.of("base", models[0]), InputReport.of("aligned", models[1])
        self._steps: Mapping[str, Step] = {}
        self._errors: Mapping[str, float] = {}
        self._form: Literal["adapter", "model"] = "adapter" if isinstance(output, AdapterForm) else "model"

    def write(self, device: torch.device, allow_noise: bool, progress: Progress | None) -> None:
        triples = self._output.triples
        differences = Differences(*self._models, triples, device)
        extrapolator = Extrapolator(*self._models, differences, self._wanted.rank, self._wanted.coef,
                                    self._wanted.tolerance, allow_noise)  # fmt: skip
        steps = Steps(extrapolator, triples, progress)
        self._errors = self._output.write(steps, self._origin(), card=self.card())
        self._steps = steps.found

    def card(self) -> str:
        """A model card: what was done, from what, and how to do it again."""
        origin, aligned = self._origin(), self._models[1]
        own = card_of(aligned)
        return ModelCard(
            title=plain_name(self._output.target),
            description=origin.description,
            license=own.license,
            license_name=own.license_name,
            license_link=own.license_link,
            base_models=(*aligned.repositories, *own.base_models),
            tags=(*origin.tags, *own.tags),
            languages=own.languages,
            facts=origin.facts,
            inputs=[
                CardInput(one.role, plain_name(Path(one.path)), one.format, one.fingerprint) for one in self._inputs
            ],
            invocation=self._invocation,
            notes=(*self._output.losses, *self._output.notes, *self._notes()),
            usage=self._usage(lambda path: path.name),
        ).to_markdown()

    def report(self, *, dry_run: bool) -> ExtrapolateReport:
        written = None if dry_run else OutputReport.of(self._output.target, self._output.tensor_file)
        return ExtrapolateReport(
            form=self._form,
            rank=self._wanted.rank,
            coef=self._wanted.coef,
            tolerance=self._wanted.tolerance,
            outtype=self._output.outtype,
            tensors=tuple(self._tensor(triple) for triple in self._every),
            inputs=self._inputs,
            output=written,
            notes=(*self._output.losses, *self._output.notes, *self._notes()),
            losses=self._output.losses,
            planned_output=(str(self._output.target), self._output.planned_bytes()),
            next_steps=self._usage(str) if not dry_run else (),
        )

    def _tensor(self, triple: Triple) -> TensorReport:
        module, pair = triple.pair.module, triple.pair
        step = self._steps.get(module)
        known = step is not None and step.snr is not None
        error = self._errors.get(module, self._errors.get(triple.aligned_tensor))
        return TensorReport(
            name=self._output.name_of(triple),
            shape=pair.shape,
            singular_values=step.singular_values if step else (),
            residual=step.residual if step else None,
            iterations=step.iterations if step else None,
            r_align=step.r_align if step else None,
            alignment_norm=step.alignment_norm if step else None if module in self._differing else 0.0,
            snr=step.snr if step else None,
            noise_edge=step.edge if step and known else None,
            stored_error=error,
            expert=pair.expert,
        )

    def _notes(self) -> list[str]:
        same = [triple for triple in self._every if triple.pair.module not in self._differing]
        notes = []
        if same:
            names = first_few([self._output.name_of(triple) for triple in same])
            notes.append(f"base and aligned hold the same values in {names}: left as they are")
        notes += [
            f"{self._output.name_of(triple)}: the base has {rows[0]} tokens and the aligned model {rows[1]}; rows that "
            f"only one of them has are left as they are"
            for triple in self._every
            if len(set(rows := self._rows(triple))) > 1
        ]
        single = single_matrices(*self._models)
        if single:
            notes.append(f"in one of the models alone, and left as they are: {', '.join(single)}")
        notes += self._of_the_layout()
        notes += [f"{module}: {step.note}" for module, step in self._steps.items() if step.note]
        low = [module for module, step in self._steps.items() if step.snr is not None and step.snr < CLEAR]
        if low:
            notes.append(f"the references' rounding noise shows: the signal to noise ratio is under {CLEAR} in "
                         f"{len(low)} of {len(self._steps)} matrices")  # fmt: skip
        return notes

    def _of_the_layout(self) -> list[str]:
        """What became of a checkpoint that was seen as GGUF."""
        aligned = self._models[1]
        if not isinstance(aligned, ConvertedModel):
            return []
        left, split = aligned.unplaced(), aligned.split()
        notes = [f"GGUF has no place for {named(left)}: left out"] if left else []
        if split and self._form == "adapter":
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

    def _origin(self) -> Origin:
        wanted = self._wanted
        facts: dict[str, Fact] = {
            "safelora.version": __version__,
            "safelora.lox.rank": wanted.rank,
            "safelora.lox.coef": float(wanted.coef),
            "safelora.lox.tolerance": float(wanted.tolerance),
        }
        for item in self._inputs:
            facts[f"safelora.{item.role}.name"] = plain_name(Path(item.path))
            facts[f"safelora.{item.role}.fingerprint"] = item.fingerprint
        part = f"the {wanted.rank} leading directions" if wanted.rank else "all"
        description = (
            f"LoX (arXiv 2506.15606): {wanted.coef:g} times {part} of what alignment changed, added to the aligned "
            f"model's matrices, so that later fine-tuning undoes less of it. Measure what it refuses before relying on "
            f"it."
        )
        return Origin("LoX", description, ("lox", "safelora-gguf"), facts, self._invocation)

    def _usage(self, shown: Callable[[Path], str]) -> tuple[str, ...]:
        """The commands that measure what the output refuses."""
        target, aligned = self._output.target, self._models[1]
        place = shlex.quote(shown(target))
        is_file = target.suffix.lower() == ".gguf"
        if self._form == "model" and is_file:
            return (f"safelora-gguf smoke --model {place}",)
        if self._form == "model":
            return f"convert_hf_to_gguf.py {place} --outfile MODEL.gguf", "safelora-gguf smoke --model MODEL.gguf"
        model = shlex.quote(shown(aligned.path)) if aligned.format == "gguf" else "ALIGNED.gguf"
        if is_file:
            return (f"safelora-gguf smoke --model {model} --adapter {place}",)
        made = f"safelora-gguf convert adapter {place} --base {model} --out LOX.gguf"
        return made, f"safelora-gguf smoke --model {model} --adapter LOX.gguf"

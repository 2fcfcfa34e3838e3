"""Extrapolation from end to end: two models in, a LoRA adapter or a hardened model out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from converters.adapters.card import card_of
from converters.atomic import atomic_file, check_target
from converters.errors import OutputPathError, UsageError
from converters.identity import plain_name
from converters.model_card import CardInput, ModelCard
from converters.models import Model
from converters.paths import resolved
from converters.source_cards import header_license, source_card
from safelora_gguf.device import exact_float32, resolve_device
from safelora_gguf.extrapolate_model import ModelForm, plan_model
from safelora_gguf.extrapolate_report import ExtrapolateReport, TensorReport
from safelora_gguf.extrapolation import Extrapolation, Findings, Matched, matched
from safelora_gguf.lox_adapter import AdapterForm
from safelora_gguf.next_steps import into_gguf
from safelora_gguf.output_card import licenses
from safelora_gguf.pairing import Triple
from safelora_gguf.report import OutputReport

Progress = Callable[[int, int, str], None]


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
        out: for an adapter see `plan_output`; for a model a file ending in .gguf, or where `aligned` is in safetensors
            a directory.
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
        LlamaError: llama.cpp's quantizer failed.
    """
    wanted = Extrapolation(rank, coef, tolerance)
    if form == "adapter" and rank == 0:
        raise UsageError("rank 0 (all of the difference) is no adapter; use --as model")
    if form == "model" and to is not None:
        raise UsageError("--to is for adapters; a model is GGUF where --out ends in .gguf, safetensors otherwise")
    where = resolve_device(device)
    found = matched(base, aligned, rank, in_gguf=form == "adapter" or Path(out).suffix.lower() == ".gguf")
    output: AdapterForm | ModelForm
    if form == "adapter":
        output = AdapterForm(out, found.models, found.differing, rank, outtype=outtype or "f32", to=to, force=force)
    else:
        output = plan_model(out, found.aligned, found.models, found.differing, outtype=outtype, force=force)
    beside = None if card is None else _card_path(Path(card), output, found.models, force)
    run = _Run(wanted, output, found, invocation=invocation)
    if not dry_run:
        with exact_float32(), torch.inference_mode():
            run.write(where, allow_noisy_reference, progress)
        if beside is not None:
            with atomic_file(beside, force=force) as file:
                file.write(run.card().encode("utf-8"))
    return run.report(dry_run=dry_run)


def _card_path(card: Path, output: AdapterForm | ModelForm, inputs: Sequence[Model], force: bool) -> Path:
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
    """One extrapolation into files, between its checks and its report."""

    def __init__(
        self, wanted: Extrapolation, output: AdapterForm | ModelForm, found: Matched, *, invocation: str | None
    ) -> None:
        self._wanted, self._output, self._aligned, self._every = wanted, output, found.models[1], found.every
        self._form: Literal["adapter", "model"] = "adapter" if isinstance(output, AdapterForm) else "model"
        self._findings = Findings(wanted, found, output.name_of, as_adapter=self._form == "adapter",
                                  invocation=invocation)  # fmt: skip
        self._invocation = invocation
        self._errors: Mapping[str, float] = {}

    def write(self, device: torch.device, allow_noise: bool, progress: Progress | None) -> None:
        steps = self._findings.steps(self._output.triples, device, allow_noise, progress)
        self._errors = self._output.write(steps, self._findings.origin(), card=self.card())

    def card(self) -> str:
        """A model card: what was done, from what, and how to do it again."""
        origin, aligned = self._findings.origin(), self._aligned
        own, inputs = card_of(aligned), self._findings.inputs
        sources = [source_card(one.role, Path(one.path)) for one in inputs]
        told, every = header_license(sources), licenses(sources)
        return ModelCard(
            title=plain_name(self._output.target),
            description=origin.description,
            license=told.id,
            license_name=told.name,
            license_link=told.link,
            sections=[every] if every else [],
            base_models=(*aligned.repositories, *own.base_models),
            tags=(*origin.tags, *own.tags),
            languages=own.languages,
            facts=origin.facts,
            inputs=[CardInput(one.role, plain_name(Path(one.path)), one.format, one.fingerprint) for one in inputs],
            invocation=self._invocation,
            notes=(*self._output.losses, *self._output.notes, *self._findings.notes()),
            usage=self._usage(lambda path: path.name),
        ).to_markdown()

    def report(self, *, dry_run: bool) -> ExtrapolateReport:
        output = self._output
        files = [output.tensor_file] if isinstance(output, AdapterForm) else output.files
        written = None if dry_run else OutputReport.of(output.target, *files)
        return ExtrapolateReport(
            form=self._form,
            rank=self._wanted.rank,
            coef=self._wanted.coef,
            tolerance=self._wanted.tolerance,
            outtype=self._output.outtype,
            tensors=tuple(self._tensor(triple) for triple in self._every),
            inputs=self._findings.inputs,
            output=written,
            notes=(*self._output.losses, *self._output.notes, *self._findings.notes()),
            losses=self._output.losses,
            planned_output=(str(self._output.target), self._output.planned_bytes()),
            next_steps=self._usage(str) if not dry_run else (),
        )

    def _tensor(self, triple: Triple) -> TensorReport:
        module, pair = triple.pair.module, triple.pair
        step = self._findings.found.get(module)
        known = step is not None and step.snr is not None
        error = self._errors.get(module, self._errors.get(triple.aligned_tensor))
        return TensorReport(
            name=self._output.name_of(triple),
            shape=pair.shape,
            singular_values=step.singular_values if step else (),
            residual=step.residual if step else None,
            iterations=step.iterations if step else None,
            r_align=step.r_align if step else None,
            alignment_norm=step.alignment_norm if step else None if self._findings.differ(triple) else 0.0,
            snr=step.snr if step else None,
            noise_edge=step.edge if step and known else None,
            stored_error=error,
            expert=pair.expert,
        )

    def _usage(self, shown: Callable[[Path], str]) -> tuple[str, ...]:
        """The commands that measure what the output refuses."""
        target, aligned = self._output.target, self._aligned
        place = shlex.quote(shown(target))
        is_file = target.suffix.lower() == ".gguf"
        if self._form == "model" and is_file:
            return (f"safelora-gguf smoke --model {place}",)
        if self._form == "model":
            return into_gguf(aligned, place), "safelora-gguf smoke --model MODEL.gguf"
        model = shlex.quote(shown(aligned.path)) if aligned.format == "gguf" else "ALIGNED.gguf"
        if is_file:
            return (f"safelora-gguf smoke --model {model} --adapter {place}",)
        made = f"safelora-gguf convert adapter {place} --base {model} --out LOX.gguf"
        return made, f"safelora-gguf smoke --model {model} --adapter LOX.gguf"

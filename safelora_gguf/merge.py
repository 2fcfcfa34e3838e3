"""Merging from end to end: a model and adapters in, a model out that needs no adapter."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from converters.adapters.lora import LoraAdapter
from converters.changed_model import ChangedModel
from converters.checkpoint import Checkpoint
from converters.errors import UsageError
from converters.gguf_model import GgufModel
from converters.gguf_rounding import StoredError
from converters.identity import plain_name
from converters.layouts import find_table
from converters.model_card import Fact
from converters.model_output import ModelOutput, ModelRequest, plan_model_output
from converters.models import Model
from converters.names import canonical
from converters.opening import open_adapter, open_model
from safelora_gguf._version import __version__
from safelora_gguf.cards import check_desktop_files, write_desktop_files
from safelora_gguf.device import exact_float32, resolve_device
from safelora_gguf.losses import refuse_losses
from safelora_gguf.merging.biases import with_zero_biases
from safelora_gguf.merging.edits import MergePlan, plan_merge
from safelora_gguf.merging.report import MergedTensor, MergeReport
from safelora_gguf.next_steps import into_gguf
from safelora_gguf.report import InputReport, OutputReport
from safelora_gguf.unwritten import Unwritten

Progress = Callable[[int, int, str], None]
_MERGED = re.compile(r"safelora\.merge\.(\d{1,9})\.name")


def merge_adapters(
    model: str | Path | Unwritten,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    outtype: str = "keep",
    imatrix: str | Path | None = None,
    vocab_from: str | Path | None = None,
    split_max_size: int | None = None,
    allow_requantize: bool = False,
    card: bool = False,
    device: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    invocation: str | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges LoRA adapters into their model: W + sum of scale * (W_i - W), in float32 before anything is rounded.

    Args:
        model: a directory of safetensors, a .safetensors file, a .gguf file of any architecture and type, or what
            `merged_model` or `extrapolated_model` gave.
        adapters: PEFT or MLX directories or GGUF files, each with its scale: 1 as it was trained, 0 for nothing of it.
        out: a file ending in .gguf; from safetensors also a directory.
        outtype: `keep`: every tensor keeps its type, and the bytes of the others are copied; or one type for all, see
            `converters.model_request.ModelRequest`, as for `imatrix`, `vocab_from` and `split_max_size`.
        allow_requantize: another `outtype` for a model that is quantized already.
        card: write a model card, and for GGUF a Modelfile, beside the output.
        device: auto, cpu, cuda, cuda:N or mps.
        force: replace an existing output.
        dry_run: check everything that headers tell, write nothing.
        strict: refuse an adapter of which anything would be lost.
        invocation: the command line, for the card.
        progress: called with (bytes done, bytes in all, next tensor).

    Raises:
        UsageError: options that make no sense.
        InputError: a file or an output path that cannot be used; nothing was written.
        WriteError: the disk is full or fails; nothing partial was left.
        LlamaError: llama.cpp's quantizer failed.
    """
    request = ModelRequest(
        Path(out), outtype, _path(imatrix), _path(vocab_from), split_max_size, allow_requantize, force=force
    )
    merge = _merge(model, adapters, device, request.vocab_from)
    run = _Run(merge, request)
    if strict:
        refuse_losses(merge.adapters[0][0], run.losses())
    if card:
        check_desktop_files(Path(out), force=force, inputs=merge.sources())
    if dry_run:
        return run.report(None)
    return run.write(progress, card=card, invocation=invocation)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def merged_model(
    model: str | Path | Unwritten,
    adapters: Sequence[tuple[str | Path, float]],
    *,
    device: str = "auto",
    strict: bool = False,
) -> Unwritten:
    """The merged model without a file, for a merge or a conversion that follows.

    Args and Raises: see `merge_adapters`; what lies in the values is found when they are asked for.
    """
    merge = _merge(model, adapters, device)
    if strict:
        refuse_losses(merge.adapters[0][0], merge.losses())
    changed = ChangedModel(merge.model, merge.plan.edits)
    return Unwritten(changed, merge.inputs, merge.facts(), merge.losses(), merge.notes)


def _merge(
    model: str | Path | Unwritten,
    adapters: Sequence[tuple[str | Path, float]],
    device: str,
    vocab_from: Path | None = None,
) -> _Merge:
    if not adapters:
        raise UsageError("there is no adapter to merge")
    where = resolve_device(device)
    before = model if isinstance(model, Unwritten) else None
    opened = open_model(model) if isinstance(model, str | Path) else model.model
    read = [(open_adapter(path, dora=True), float(scale)) for path, scale in adapters]
    return _Merge(opened, before, read, where, vocab_from)


class _Merge:
    """One merge apart from its output.

    Attributes:
        inputs: the model, or what it was made from where no file holds it, and the adapters.
    """

    def __init__(
        self,
        model: Model,
        before: Unwritten | None,
        adapters: Sequence[tuple[LoraAdapter, float]],
        device: torch.device,
        vocab_from: Path | None,
    ) -> None:
        self.model, self.adapters, self._before = model, adapters, before
        with exact_float32():
            self.plan: MergePlan = plan_merge(model, adapters, device, vocab_from)
        models = (InputReport.of("model", model),) if before is None else before.inputs
        self._read = tuple(InputReport.of("adapter", one) for one, _ in adapters)
        self.inputs = (*models, *self._read)

    def sources(self) -> list[Path]:
        return [Path(entry.path) for entry in self.inputs]

    def losses(self) -> tuple[str, ...]:
        return (*(self._before.losses if self._before else ()), *self.plan.losses)

    def notes(self) -> tuple[str, ...]:
        return (*(self._before.notes() if self._before else ()), *self.plan.notes)

    def facts(self) -> Mapping[str, Fact]:
        """What goes into the output's metadata."""
        found: dict[str, Fact] = {"safelora.version": __version__}
        if self._before is None:
            found["safelora.model.name"] = plain_name(self.model.path)
            found["safelora.model.fingerprint"] = self.inputs[0].fingerprint
        else:
            found |= self._before.facts
        before = [int(match[1]) for key in (*found, *_stored_facts(self.model)) if (match := _MERGED.fullmatch(key))]
        first = 1 + max(before, default=-1)
        for number, (entry, (adapter, scale)) in enumerate(zip(self._read, self.adapters, strict=True), first):
            key = f"safelora.merge.{number}"
            found[f"{key}.name"] = plain_name(adapter.path)
            found[f"{key}.fingerprint"] = entry.fingerprint
            found[f"{key}.scale"] = scale
        return found


def _stored_facts(model: Model) -> Collection[str]:
    """The keys of a model's metadata: an earlier merge's stay."""
    stored = model.stored if isinstance(model, ChangedModel) else model
    if isinstance(stored, GgufModel):
        return stored.headers[0].entries
    return stored.files[0].header.metadata if isinstance(stored, Checkpoint) else ()


class _Run:
    """One merge into files, between its checks and its report."""

    def __init__(self, merge: _Merge, request: ModelRequest) -> None:
        self._merge, self._model, self._request, self._plan = merge, merge.model, request, merge.plan
        read = [path for adapter, _ in merge.adapters for path in (adapter.path, adapter.tensor_file)]
        edits = merge.plan.edits if request.is_gguf else with_zero_biases(merge.model, merge.plan.edits)
        self.output: ModelOutput = plan_model_output(merge.model, edits, request, [*read, *merge.sources()])

    def losses(self) -> tuple[str, ...]:
        return (*self._merge.losses(), *self.output.losses)

    def write(self, progress: Progress | None, *, card: bool, invocation: str | None) -> MergeReport:
        own_card = "" if card and not self._request.is_gguf else None
        with exact_float32():
            errors = self.output.write(self._merge.facts(), card=own_card, progress=progress)
        report = self.report(errors)
        if card:
            write_desktop_files(self._written(), report.to_json(), self._merge.sources(), invocation=invocation,
                                force=self._request.force or not self._request.is_gguf)  # fmt: skip
        return report

    def report(self, errors: Mapping[str, StoredError] | None) -> MergeReport:
        """What was done, or would be where `errors` is None."""
        output, losses = self.output, self.losses()
        shards = () if errors is None else tuple(str(file) for file in output.files)
        return MergeReport(
            scales=tuple(scale for _, scale in self._merge.adapters),
            outtype=output.outtype,
            tensors=tuple(self._tensors(errors or {})),
            inputs=self._merge.inputs,
            output=None if errors is None else OutputReport.of(self._written(), *output.files),
            shards=shards,
            notes=(*losses, *self._merge.notes(), *output.notes),
            losses=losses,
            planned_output=(str(output.target), output.planned_bytes()),
            next_steps=() if errors is None else self._usage(),
        )

    def _written(self) -> Path:
        """The first shard of a split model, and what was asked for otherwise."""
        return self.output.tensor_file if self._request.is_gguf else self.output.target

    def _tensors(self, errors: Mapping[str, StoredError]) -> list[MergedTensor]:
        found: dict[str, list[str]] = {}
        for own in self._plan.rows:
            for name in self._names_of(own):
                found.setdefault(name, []).append(own)
        return [
            MergedTensor(
                name=tensor.name,
                shape=tensor.shape,
                adapters=tuple(sorted({number for own in found[tensor.name] for number in self._plan.adapters[own]})),
                delta_norm=self._delta_norm(found[tensor.name]),
                stored_error=errors[tensor.name].relative if tensor.name in errors else None,
                type=tensor.dtype,
            )
            for tensor in self.output.tensors
            if tensor.name in found
        ]

    def _names_of(self, own: str) -> list[str]:
        """What a stored tensor is called in the output."""
        table = find_table(self._model)
        if not self._request.is_gguf or self._model.layout == "gguf" or table is None:
            return [own]
        return [name for name, _ in table.tensors_in_gguf(canonical(own))]

    def _delta_norm(self, names: Sequence[str]) -> float | None:
        """Of tensors that become one: of all of them together."""
        squares = [self._plan.rows[name].squares for name in names]
        changed, before = (sum(side) for side in zip(*squares, strict=True))
        return math.sqrt(changed / before) if before > 0 and math.isfinite(changed / before) else None

    def _usage(self) -> tuple[str, ...]:
        place = shlex.quote(str(self._written()))
        if self._request.is_gguf:
            return (f"safelora-gguf smoke --model {place}",)
        table = find_table(self._model)
        if self._plan.parted and table is not None and not table.to_gguf("lm_head"):
            return ()  # llama.cpp has no place for its output matrix
        return (into_gguf(self._model, place),)

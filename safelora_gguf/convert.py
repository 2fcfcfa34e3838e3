"""Adapters from one format to another: the same update in the names, row order and scaling of another program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from converters.adapters.belonging import check_fused, check_sizes, check_ties
from converters.adapters.converted import ConvertedAdapter
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.output import AdapterOutput, Origin
from converters.adapters.plan import is_gguf_name, kind_of, plan_output
from converters.adapters.storing import Rounding
from converters.bridge import Bridge
from converters.checkpoint import Checkpoint
from converters.converted_model import ConvertedModel
from converters.description import model_of
from converters.errors import FormatError, InputError, MismatchError
from converters.gguf_model import GgufModel
from converters.layouts import find_table, written_layout
from converters.models import Model, ModelDescription
from converters.names import named
from converters.opening import open_adapter
from safelora_gguf._version import __version__
from safelora_gguf.device import exact_float32
from safelora_gguf.losses import as_plain_pairs, losses_of, refuse_losses
from safelora_gguf.pairing import check_adapted
from safelora_gguf.report import InputReport, OutputReport, label_of, output_entry, rounding_notes


@dataclass(frozen=True)
class ConvertedModule:
    """One pair as it was written.

    Attributes:
        name: the GGUF tensor where the architecture is known, else the adapter's own name.
        key: what the source calls it.
        shape: (out, in) of the weight, (vocabulary, width) of an embedding.
        scaling: the true factor of B @ A, the same before and after.
        stored_error: ||stored delta - delta|| / ||delta||; None when nothing was written.
        expert: which matrix of the stack `name`; None for an ordinary weight.
    """

    name: str
    key: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    stored_error: float | None
    expert: int | None

    @property
    def label(self) -> str:
        """The name, and which of a stack's experts it is."""
        return label_of(self.name, self.expert)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class ConvertReport:
    """The result of `convert adapter`.

    Attributes:
        outtype: the type that was asked for.
        output: None after a dry run.
        notes: everything folded, approximated, rounded or left out, one sentence each; losses first.
        losses: what of the update is not, or not exactly, in the output, or is not applied by llama.cpp.
        planned_output: where the output would go or went, and its size in bytes.
    """

    outtype: str
    modules: tuple[ConvertedModule, ...]
    inputs: tuple[InputReport, ...]
    output: OutputReport | None
    notes: tuple[str, ...]
    losses: tuple[str, ...]
    planned_output: tuple[str, int]

    def to_json(self) -> dict[str, Any]:
        """The JSON object that the command line contract describes."""
        result: dict[str, Any] = {
            "command": "convert adapter",
            "version": __version__,
            "inputs": [item.to_json() for item in self.inputs],
            "outtype": self.outtype,
            "modules": [module.to_json() for module in self.modules],
            "losses": list(self.losses),
            "notes": list(self.notes),
        }
        return result | output_entry(self.output, self.planned_output)


def convert_adapter(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    outtype: str = "f32",
    to: Literal["gguf", "peft"] | None = None,
    rank: int | None = None,
    strict: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> ConvertReport:
    """Converts a LoRA adapter between PEFT, MLX (as a source) and GGUF.

    Args:
        source: a PEFT directory, an MLX directory or a GGUF adapter.
        out: a file ending in .gguf; or a directory without an adapter in it, existing or ending in a separator, for a
            GGUF file named by convention; any other name is a PEFT directory's.
        to: `gguf` or `peft`, whatever directory `out` is; by default a GGUF adapter becomes a PEFT directory.
        base: the model that it is for: its directory, its config.json alone, or a GGUF file of it. Not needed
            where that stands beside the adapter, or from GGUF where no rows are reordered.
        outtype: f32, f16, bf16 or (GGUF only) q8_0.
        rank: of the pairs that stand for a DoRA adapter, whose update has no low rank; by default the smallest
            that keeps each module's error under 1 %. The base's weights are needed then.
        strict: refuse what would be lost or only approximated, instead of reporting it.
        force: replace an existing output.
        dry_run: check all headers, write nothing.

    Raises:
        UsageError: options that make no sense.
        InputError: a file or an output path that cannot be used; nothing was written.
        WriteError: the disk is full or fails; nothing partial was left.
    """
    opened = open_adapter(source, dora=True)
    plain, model = as_plain_pairs(opened, model_of(opened, base), rank, named_by="--base", strict=strict)
    inputs = [InputReport.of("adapter", opened)]
    if plain is not opened and isinstance(model, Checkpoint):
        inputs.append(InputReport.of("base", model))
    if to is None and opened.format == "gguf" and not is_gguf_name(out):
        to = "peft"
    _check_architecture(plain, model)
    adapter = written_layout(plain, model, to_gguf=kind_of(out, to) != "peft")
    _check_belongs(adapter, model, to_gguf=kind_of(out, to) != "peft")
    output = plan_output(out, adapter, model, outtype=outtype, to=to, label="", force=force)
    refuse_losses(adapter, losses_of(adapter, output) if strict else ())
    roundings = None if dry_run else _write(output, adapter, inputs, exact=plain is opened)
    losses = losses_of(adapter, output)  # a DoRA's are known once it is written
    told = (*losses, *output.notes, *adapter.notes, *_folded(adapter, output))
    return ConvertReport(
        outtype=outtype,
        modules=tuple(_module(pair, output, (roundings or {}).get(name)) for name, pair in adapter.pairs.items()),
        inputs=tuple(inputs),
        output=None if roundings is None else OutputReport.of(output.target, output.tensor_file),
        notes=(*told, *_rounded(roundings or {}, output, outtype)),
        losses=losses,
        planned_output=(str(output.target), output.planned_bytes()),
    )


def _check_architecture(adapter: LoraAdapter, model: ModelDescription) -> None:
    table = find_table(model)
    known = table.name if table else model.architecture
    if adapter.architecture not in (None, known):
        raise MismatchError(
            f"is an adapter for the architecture {adapter.architecture}, and {model.path} is {known}: the adapter is "
            f"for another model",
            file=adapter.path,
        )


def _check_belongs(adapter: LoraAdapter, model: ModelDescription, *, to_gguf: bool) -> None:
    """That the model has the adapted weights in these shapes, as far as it says, or as its tensors are at hand and are
    floats."""
    check_sizes(adapter, model)
    check_ties(adapter, model, to_gguf=to_gguf)
    if not isinstance(model, Checkpoint | GgufModel) or not model.infos:  # a header or vocabulary alone will do
        return
    seen: Model = model
    if adapter.layout != model.layout:
        table = find_table(model)
        try:
            bridge = Bridge.of(table, model) if table else None
        except InputError:
            bridge = None
        if bridge is None:  # where table or heads are needed, the output will tell
            return
        seen = model if model.layout == "gguf" else ConvertedModel(model, bridge)
        adapter = adapter if adapter.layout == "gguf" else ConvertedAdapter(adapter, bridge)
    check_fused(adapter, seen)
    check_adapted(seen, adapter)


def _write(
    output: AdapterOutput, adapter: LoraAdapter, inputs: Sequence[InputReport], *, exact: bool
) -> Mapping[str, Rounding]:
    def load(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (half.float() for half in adapter.load(module))
        for half, name in ((a, 0), (b, 1)):
            if not half.sum().isfinite() and not half.isfinite().all():  # the sum alone takes a tenth of the time
                broken = adapter.pairs[module].tensors[name]
                raise FormatError("holds NaN or Inf: the adapter is broken", file=adapter.tensor_file, tensor=broken)
        return a, b

    facts = {"safelora.version": __version__}
    facts |= {f"safelora.{item.role}.fingerprint": item.fingerprint for item in inputs}
    description = f"A LoRA adapter converted from {adapter.format.upper()}; its update is unchanged."
    if not exact:
        description = "The plain LoRA pairs nearest to a DoRA adapter, whose update they are not exactly."
    threads = torch.get_num_threads()
    if exact:
        torch.set_num_threads(1)
    try:
        with exact_float32(), torch.inference_mode():
            return output.write(load, Origin("", description, ("lora",), facts))
    finally:
        torch.set_num_threads(threads)


def _module(pair: LoraPair, output: AdapterOutput, rounding: Rounding | None) -> ConvertedModule:
    name = output.name_of(pair.module) or pair.key
    error = rounding.error if rounding else None
    return ConvertedModule(name, pair.key, pair.shape, pair.rank, pair.scaling, error, pair.expert)


def _folded(adapter: LoraAdapter, output: AdapterOutput) -> list[str]:
    """GGUF has one alpha for all pairs: what differs from alpha / r has gone into lora_B."""
    if output.target != output.tensor_file or not adapter.lora_alpha:
        return []
    other = [pair for pair in adapter.pairs.values() if abs(pair.scaling * pair.rank / adapter.lora_alpha - 1) > 1e-7]
    if not other:
        return []
    by_value: dict[str, list[str]] = {}
    for pair in other:
        told = f"{pair.scaling:g} instead of {adapter.lora_alpha / pair.rank:g}"
        by_value.setdefault(told, []).append(pair.key)
    found = named([f"{told} on {named(list(dict.fromkeys(keys)))}" for told, keys in by_value.items()])
    return [f"the scaling of {len(other)} pairs is not alpha / r and was multiplied into lora_B: {found}"]


def _rounded(roundings: Mapping[str, Rounding], output: AdapterOutput, outtype: str) -> list[str]:
    return [
        f"{output.name_of(module) or module}: {note}"
        for module, rounding in roundings.items()
        for note in rounding_notes(rounding, outtype)
    ]

"""A model and an adapter that is to be repaired, opened and held against each other from their headers alone.

Everything is seen in GGUF's layout: there weights have the names by which llama.cpp's graph tells whose input is read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from converters.adapters.belonging import check_fused
from converters.adapters.gguf import GgufAdapter
from converters.adapters.gguf_check import check_adapter
from converters.adapters.gguf_ignored import ignored
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.output import AdapterOutput, Origin
from converters.adapters.plan import plan_output
from converters.adapters.trained_on import check_trained_on
from converters.errors import FormatError, InputError, MismatchError, UnsupportedError
from converters.gguf_header import read_gguf_header
from converters.gguf_model import GgufModel, open_gguf_model
from converters.layouts import gguf_layout
from converters.opening import open_adapter
from converters.paths import existing, is_gguf
from safelora_gguf.losses import as_plain_pairs, losses_of, refuse_losses
from safelora_gguf.pairing import check_adapted
from safelora_gguf.report import InputReport

LABEL = "Repaired"  # what a conventional name says of a repaired adapter


@dataclass(frozen=True)
class RepairInputs:
    """What a repair reads.

    Attributes:
        model: the aligned model, on which the adapter is run.
        adapter: in GGUF's layout, with plain pairs.
        weights: tensors whose inputs are read, `blk.0.attn_q.weight`, in the adapter's order; a stack of experts once.
        widths: columns of each, the size of its input.
        left_alone: why a module of the adapter stays as it is, by module.
        reports: model and adapter as reports name them.
    """

    model: GgufModel
    adapter: LoraAdapter
    weights: tuple[str, ...]
    widths: Mapping[str, int]
    left_alone: Mapping[str, str]
    reports: tuple[InputReport, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Those that are repaired, in the adapter's order."""
        return tuple(module for module in self.adapter.pairs if module not in self.left_alone)

    @property
    def losses(self) -> tuple[str, ...]:
        """What of the adapter's update is not, or not exactly, in its pairs; `losses_of` also tells what an output
        can't hold."""
        return tuple(self.adapter.losses)

    def weight_of(self, module: str) -> str:
        """The tensor that a module adapts."""
        return weight_of(self.adapter.pairs[module])

    def plan(
        self,
        out: str | Path,
        *,
        outtype: str,
        to: Literal["gguf", "peft"] | None,
        force: bool,
        strict: bool = False,
        reads: Sequence[Path] = (),
    ) -> AdapterOutput:
        """An output for the adapter; see `plan_output`, which this raises the errors of.

        Args:
            strict: refuse what would be lost.
            reads: further files that the run reads, which the output must not replace.
        """
        output = plan_output(
            out, self.adapter, self.model, outtype=outtype, to=to, label=LABEL, force=force, reads=reads
        )
        refuse_losses(self.adapter, losses_of(self.adapter, output) if strict else ())
        return output


def weight_of(pair: LoraPair) -> str:
    """The tensor that a pair in GGUF's layout adapts."""
    return f"{pair.weight}.weight"


def open_repair_inputs(
    model: str | Path, adapter: str | Path, *, dora_rank: int | None = None, strict: bool = False
) -> RepairInputs:
    """Opens both, brings the adapter into GGUF's layout and finds the weights whose inputs are needed.

    Args:
        model: the aligned model as GGUF, or the first shard of a split one.
        adapter: a PEFT directory, an MLX directory or a GGUF adapter.
        dora_rank, strict: see `as_plain_pairs`.

    Raises:
        UsageError: a rank for an adapter without DoRA.
        FormatError: the model is no GGUF file, or a file is damaged.
        MismatchError: they don't belong together.
        UnsupportedError: DoRA, whose update needs the model's weights; an architecture without a table; what llama.cpp
            could not run; nothing that could be repaired.
    """
    runnable = _open_model(model)
    opened = open_adapter(adapter, dora=True)
    _refuse_dora(opened)
    plain, _ = as_plain_pairs(opened, runnable, dora_rank, named_by="--model", strict=strict)
    source = gguf_layout(plain, runnable)
    _check_belongs(source, runnable)
    left_alone = _left_alone(source, runnable)
    repaired = [pair for module, pair in source.pairs.items() if module not in left_alone]
    if not repaired:
        told = f"has nothing that can be repaired: {'; '.join(dict.fromkeys(left_alone.values()))}"
        raise UnsupportedError(told, file=source.path)
    weights = tuple(dict.fromkeys(weight_of(pair) for pair in repaired))
    return RepairInputs(
        model=runnable,
        adapter=source,
        weights=weights,
        widths={weight_of(pair): pair.shape[1] for pair in repaired},
        left_alone=left_alone,
        reports=(InputReport.of("model", runnable), InputReport.of("adapter", opened)),
    )


def _open_model(path: str | Path) -> GgufModel:
    found = existing(path, "the model")
    if not is_gguf(found):
        raise FormatError(
            "is no GGUF file, and repair reads the model's inputs in llama.cpp; make one with `safelora-gguf convert "
            "model`",
            file=found,
        )
    return open_gguf_model(found)


def _refuse_dora(adapter: LoraAdapter) -> None:
    """Its update depends on weights that no GGUF file has exactly."""
    if adapter.magnitudes:
        raise UnsupportedError(
            "uses DoRA, whose update depends on the weights that it was trained on; bring it into plain pairs first, "
            "with `safelora-gguf convert adapter` and that model in safetensors as --base, and repair those",
            file=adapter.path,
        )


def _check_belongs(adapter: LoraAdapter, model: GgufModel) -> None:
    """That the adapter was made for the model, as far as headers tell, and that llama.cpp can run it there."""
    if adapter.architecture not in (None, model.architecture):
        raise MismatchError(
            f"is an adapter for the architecture {adapter.architecture}, and {model.path} is {model.architecture}: the "
            f"adapter is for another model",
            file=adapter.path,
        )
    check_fused(adapter, model)
    check_trained_on(adapter, model)
    check_adapted(model, adapter)
    if isinstance(adapter, GgufAdapter):
        check_adapter(adapter.header, model.headers)
        return
    with tempfile.TemporaryDirectory(prefix="safelora-repair-") as place:
        _check_as_file(adapter, model, Path(place) / "adapter.gguf")


def _check_as_file(adapter: LoraAdapter, model: GgufModel, file: Path) -> None:
    """What `check_adapter` tells from the header that the adapter has as GGUF; its values are left out."""
    import torch

    def zeros(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        pair = adapter.pairs[module]
        rows, columns = pair.shape[::-1] if pair.embedding else pair.shape
        return torch.zeros(pair.rank, columns), torch.zeros(rows, pair.rank)

    output = plan_output(file, adapter, model, outtype="f16", to=None, label="", force=False)
    output.write(zeros, Origin("", "", (), {}))
    try:
        check_adapter(read_gguf_header(file, "GGUF adapter"), model.headers)
    except InputError as error:
        raise type(error)(error.message, file=adapter.path, tensor=error.tensor) from None


def _left_alone(adapter: LoraAdapter, model: GgufModel) -> dict[str, str]:
    """Modules whose weights have no input that could be read, or whose update llama.cpp never applies."""
    found = {}
    for module, pair in adapter.pairs.items():
        weight = weight_of(pair)
        if pair.embedding:
            found[module] = "an embedding's input is a token, not a vector"
        elif ignored(model.architecture, weight):
            found[module] = "llama.cpp never applies a pair to this weight"
        elif weight not in model.infos:
            found[module] = "the model has it under a name that no matrix product has"
    return found

"""Where an adapter goes: the choice of format and name, and everything that can be refused beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from converters.adapters.gguf_output import GgufOutput
from converters.adapters.lora import LoraAdapter
from converters.adapters.output import AdapterOutput, names_of
from converters.adapters.peft_output import PeftOutput
from converters.errors import OutputPathError, UsageError
from converters.ggml import OUTTYPES
from converters.identity import adapter_file_name, identify, plain_name
from converters.models import ModelDescription
from converters.paths import resolved


def plan_output(
    out: Path,
    adapter: LoraAdapter,
    model: ModelDescription,
    *,
    outtype: str,
    to: Literal["gguf", "peft"] | None,
    label: str,
    force: bool,
    reads: Sequence[Path] = (),
) -> AdapterOutput:
    """Decides format and names for an output, and checks its place.

    Args:
        out: ends in .gguf for GGUF; otherwise a directory for PEFT, or with `to="gguf"` the directory in which
            a GGUF file gets its conventional name.
        model: what the adapter is for.
        label: what a conventional name says about the adapter beside its own name, if anything.
        reads: further files that the run reads, which the output must not replace.

    Raises:
        UsageError: an unknown type, or one that the format lacks.
        OutputPathError: the place is taken or unusable.
        UnsupportedError: the adapter can't be expressed in that format.
    """
    if outtype not in OUTTYPES:
        raise UsageError(f"unknown outtype {outtype!r}; adapters can be {', '.join(OUTTYPES)}")
    gguf_name = out.suffix.lower() == ".gguf"
    if to == "peft" and gguf_name:
        raise UsageError("--to peft writes a directory, and --out ends in .gguf")
    if to == "gguf" or gguf_name:
        target = out if gguf_name else out / _conventional_name(adapter, model, label, outtype)
        _refuse_to_overwrite(target, (adapter.tensor_file, *model.sources, *reads))
        return GgufOutput(target, OUTTYPES[outtype], adapter, model, force=force)
    if outtype == "q8_0":
        raise UsageError("PEFT directories hold f32, f16 or bf16; q8_0 is for GGUF")
    _refuse_to_swallow(out, (adapter.path, *model.sources, *reads))
    return PeftOutput(out, OUTTYPES[outtype], adapter, model, force=force)


def _conventional_name(adapter: LoraAdapter, model: ModelDescription, label: str, outtype: str) -> str:
    base = identify(names_of(adapter, model), model.path)
    own = plain_name(adapter.path)
    return adapter_file_name(base, f"{own}-{label}" if label else own, outtype)


def _refuse_to_overwrite(target: Path, inputs: Sequence[Path]) -> None:
    """An input stays what it is, whatever --force says."""
    for path in inputs:
        if resolved(target) == resolved(path):
            raise OutputPathError("is one of the inputs; choose another name", file=target)


def _refuse_to_swallow(out: Path, inputs: Sequence[Path]) -> None:
    """A directory that is swapped whole must not be, or hold, what is being read, nor the place one works in."""
    place = resolved(out)
    for path in (*inputs, Path.cwd(), Path.home()):
        if resolved(path).is_relative_to(place):
            raise OutputPathError(f"would replace {path} with everything in it; choose another name", file=out)

"""Where an adapter goes: the choice of format and name, and everything that can be refused beforehand."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from converters.adapters.gguf import GgufAdapter
from converters.adapters.gguf_output import GgufOutput
from converters.adapters.lora import LoraAdapter
from converters.adapters.naming import base_names, conventional_file_name, finetune_of
from converters.adapters.output import AdapterOutput
from converters.adapters.peft import CONFIG, WEIGHTS
from converters.adapters.peft_output import PeftOutput
from converters.atomic import entries_to_replace, refuse_to_discard, refuse_to_overwrite, refuse_to_swallow
from converters.errors import MismatchError, UsageError
from converters.ggml import OUTTYPES
from converters.models import ModelDescription
from converters.paths import is_there

Kind = Literal["file", "inside", "peft"]

_ADAPTER_FILES = {CONFIG, WEIGHTS, "README.md", ".gitattributes"}


def plan_output(
    out: str | Path,
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
        out: see `kind_of`.
        model: what the adapter is for.
        label: what a conventional name says about the adapter beside its own name, if anything.
        reads: further files that the run reads, which the output must not replace.

    Raises:
        UsageError: an unknown type, or one that the format lacks.
        OutputPathError: the place is taken or unusable.
        UnsupportedError: the adapter can't be expressed in that format.
    """
    assert not adapter.magnitudes, "DoRA becomes nearest pairs before it is written: pairs alone are not its update"
    if outtype not in OUTTYPES:
        raise UsageError(f"unknown outtype {outtype!r}; adapters can be {', '.join(OUTTYPES)}")
    if not str(out):
        raise UsageError("--out is empty")
    if to == "peft" and is_gguf_name(out):
        raise UsageError("--to peft writes a directory, and --out ends in .gguf")
    _check_stacks(adapter, model)
    kind, target = kind_of(out, to), Path(out)
    if kind != "peft":
        if kind == "inside":
            target /= _conventional_name(adapter, model, label, outtype)
        refuse_to_overwrite(target, (adapter.tensor_file, *model.sources, *reads))
        return GgufOutput(target, OUTTYPES[outtype], adapter, model, force=force)
    if outtype == "q8_0":
        raise UsageError("PEFT directories hold f32, f16 or bf16; q8_0 is for GGUF")
    refuse_to_swallow(target, (adapter.path, *model.sources, *reads))
    _refuse_to_discard(target)
    return PeftOutput(target, OUTTYPES[outtype], adapter, model, force=force)


def _check_stacks(adapter: LoraAdapter, model: ModelDescription) -> None:
    """That a GGUF adapter's stacks have the model's number of experts: llama.cpp reads past the end of others."""
    if not isinstance(adapter, GgufAdapter) or not model.experts:
        return
    counts = Counter(pair.weight for pair in adapter.pairs.values() if pair.expert is not None)
    for pair in adapter.pairs.values():
        if pair.expert is not None and counts[pair.weight] != model.experts:
            raise MismatchError(
                f"is a pair for {counts[pair.weight]} experts, and {model.path} has {model.experts}: the adapter is "
                f"for another model",
                file=adapter.path,
                tensor=pair.tensors[0],
            )


def kind_of(out: str | Path, to: str | None) -> Kind:
    """What an output path asks for.

    Returns:
        `file`: it ends in .gguf, and is that GGUF file.
        `inside`: a GGUF file named by convention in this directory: with `to="gguf"`, or where `to` is None and it is
        a directory without an adapter in it, or is to become one since it ends in a separator.
        `peft`: a PEFT directory.
    """
    if is_gguf_name(out):
        return "file"
    if to is not None:
        return "inside" if to == "gguf" else "peft"
    path = Path(out)
    if is_there(path):
        return "inside" if path.is_dir() and not is_there(path / CONFIG) else "peft"
    return "inside" if _ends_in_separator(out) else "peft"


def is_gguf_name(out: str | Path) -> bool:
    """Whether an output path names a GGUF file."""
    return Path(out).suffix.lower() == ".gguf" and not _ends_in_separator(out)


def _ends_in_separator(out: str | Path) -> bool:
    """A `Path` never does."""
    return str(out).endswith((os.sep, os.altsep or os.sep))


def _conventional_name(adapter: LoraAdapter, model: ModelDescription, label: str, outtype: str) -> str:
    base = base_names(adapter, model)
    own = finetune_of(adapter, base)
    return conventional_file_name(base, "-".join(part for part in (own, label) if part), outtype)


def _refuse_to_discard(out: Path) -> None:
    """--force swaps a directory whole, so it must be an adapter and nothing more: no one's checkpoints or models."""
    others, what = entries_to_replace(out), "is a directory that is no adapter"
    if any(entry.name == CONFIG for entry in others):
        others, what = [entry for entry in others if entry.name not in _ADAPTER_FILES], "holds more than an adapter"
    refuse_to_discard(out, others, what)

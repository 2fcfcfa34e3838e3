"""LoX as a model: every matrix with coef times its leading directions added, written as the model came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from converters.adapters.gguf_output import as_value
from converters.adapters.output import Origin
from converters.atomic import check_target, refuse_to_overwrite
from converters.checkpoint import Checkpoint
from converters.checkpoint_output import write_checkpoint
from converters.checkpoint_plan import check_model_directory, plan_checkpoint
from converters.errors import FormatError, LlamaError, UnsupportedError, UsageError
from converters.free_space import free_space_for
from converters.ggml import QType
from converters.gguf_file import Value
from converters.gguf_model import GgufModel
from converters.gguf_rewrite import Change, rewrite_gguf, rewritten_size
from converters.layouts import find_table
from converters.model_card import fact_text
from converters.models import Model
from converters.quantization import file_type, quantized_size
from converters.quantizer import check_quantizer, quantize_gguf
from safelora_gguf.lox_rows import NewRows, Rows, RowsBroughtBack, by_tensor, parts_of
from safelora_gguf.lox_steps import Steps
from safelora_gguf.pairing import Triple

_FLOATS = {"F32": QType.F32, "F16": QType.F16, "BF16": QType.BF16}
_MOST_NAMES = 5
_PART = ".float.safelora-gguf.tmp"


class CheckpointForm:
    """A safetensors directory: shards, index and everything beside them as in the aligned model's."""

    losses: tuple[str, ...] = ()

    def __init__(
        self,
        out: Path,
        checkpoint: Checkpoint,
        models: tuple[Model, Model],
        triples: Sequence[Triple],
        *,
        outtype: str | None,
        force: bool,
    ) -> None:
        self.triples, self._models, self._force = list(triples), models, force
        self.target, self._outtype = out, outtype
        self.outtype = outtype or "keep"
        self._parts = None if models[1].layout == checkpoint.layout else parts_of(checkpoint, triples)
        changed = set(by_tensor(triples) if self._parts is None else self._parts)
        self._plan = plan_checkpoint(checkpoint, changed, outtype=outtype)
        check_model_directory(self._plan, out, (models[0].path, *models[0].sources), force=force)
        self.tensor_file = out / self._plan.shards[0].name
        left = self._plan.left_out
        names = ", ".join(left[:_MOST_NAMES]) + ", ..." * (len(left) > _MOST_NAMES)
        self.notes = (f"left behind, since it is no part of this form of the model: {names}",) if left else ()

    def name_of(self, triple: Triple) -> str:
        table = find_table(self._models[1]) if self._parts is None else None
        found = table.to_gguf(triple.pair.weight) if table else ()
        return f"{found[0].name}.weight" if len(found) == 1 else triple.aligned_tensor

    def planned_bytes(self) -> int:
        return self._plan.nbytes

    def write(self, steps: Steps, origin: Origin, *, card: str) -> Mapping[str, float]:
        """Writes the model; the relative rounding error of each tensor by the name that it has in the run."""
        facts = {key: fact_text(value) for key, value in origin.facts.items()}
        free_space_for(self.target, self._plan.nbytes)
        errors = write_checkpoint(self._plan.source, self.target, self._rows(steps), outtype=self._outtype, card=card,
                                  metadata=facts, force=self._force)  # fmt: skip
        if self._parts is None:
            return errors
        return {triple.pair.module: errors[own] for own, parts in self._parts.items() for part in parts
                for triple in part.by_number.values()}  # fmt: skip

    def _rows(self, steps: Steps) -> Mapping[str, Rows]:
        if self._parts is None:
            return {name: NewRows(self._models, same, steps) for name, same in by_tensor(self.triples).items()}
        source = self._plan.source
        return {own: RowsBroughtBack(source, own, parts, self._models, steps) for own, parts in self._parts.items()}


class GgufForm:
    """A GGUF file: every key and every other tensor as in the aligned model's."""

    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(
        self, out: Path, models: tuple[Model, Model], triples: Sequence[Triple], *, outtype: str | None, force: bool
    ) -> None:
        base, aligned = models
        assert isinstance(aligned, GgufModel), "a GGUF model comes as it is"
        self._aligned, self._models, self._force = aligned, models, force
        self.triples, self.target = list(triples), out
        self.tensor_file = out
        self.outtype = outtype or "keep"
        self._quantized_as = file_type(outtype) if outtype else None
        if self._quantized_as is not None:
            check_quantizer(self._quantized_as)
        check_target(out, force=force)
        refuse_to_overwrite(out, (*aligned.sources, *base.sources))
        self._size = rewritten_size(aligned, self._changes(None))

    def name_of(self, triple: Triple) -> str:
        return triple.aligned_tensor

    def planned_bytes(self) -> int:
        return self._size if self._quantized_as is None else quantized_size(self._aligned.headers, self._quantized_as)

    def write(self, steps: Steps, origin: Origin, *, card: str) -> Mapping[str, float]:
        """Writes the model; the relative rounding error of each tensor by name. `card` is for directories."""
        added = [(key, as_value(value)) for key, value in origin.facts.items()]
        if self._quantized_as is not None:
            return self._quantize(steps, added)
        free_space_for(self.target, self._size)
        errors = rewrite_gguf(self._aligned, self.target, self._changes(steps), added=added, force=self._force)
        return {name: error.relative for name, error in errors.items()}

    def _changes(self, steps: Steps | None) -> list[Change]:
        """Without steps only names and types can be used."""
        changes = []
        changing = self.triples if steps is None else steps.that_add(self.triples)
        for name, triples in by_tensor(changing).items():
            rows = _no_rows if steps is None else NewRows(self._models, triples, steps)
            changes.append(Change(name, rows, None if self._quantized_as is None else self._float_type(name)))
        return changes

    def _quantize(self, steps: Steps, added: Sequence[tuple[str, Value]]) -> Mapping[str, float]:
        """Through a float file beside the target, which llama.cpp's quantizer reads."""
        assert self._quantized_as is not None, "another type was asked for"
        size = self._size + quantized_size(self._aligned.headers, self._quantized_as)
        free_space_for(self.target, size, f"a float file of {self._size / 1e9:.1f} GB and the model made of it")
        part = self.target.with_name(f".{self.target.name}{_PART}")
        try:
            rewrite_gguf(self._aligned, part, self._changes(steps), added=added, force=True)
            made = quantize_gguf(part, self.target, self._quantized_as.name, threads=2, allow_requantize=True,
                                 force=self._force)  # fmt: skip
        except LlamaError as error:
            raise LlamaError(error.message, file=self.target) from None  # the float file is gone
        finally:
            part.unlink(missing_ok=True)
        types = ", ".join(f"{count} {name}" for name, count in made.types.items())
        self.notes = (*self.notes, f"quantized by llama.cpp as {self._quantized_as.name}: {types} tensors")
        return {}

    def _float_type(self, name: str) -> QType:
        """A changed tensor's type in the float file: its own where it is one."""
        return _FLOATS.get(self._aligned.infos[name].dtype, QType.F16)


def plan_model(
    out: str | Path,
    opened: Model,
    models: tuple[Model, Model],
    triples: Sequence[Triple],
    *,
    outtype: str | None,
    force: bool,
) -> CheckpointForm | GgufForm:
    """Checks that the model can be written there.

    Args:
        opened: the aligned model as it is stored; `models` has it in the run's layout.

    Raises:
        UsageError: an unknown type. OutputPathError: the place is taken or unusable.
        UnsupportedError: the vocabularies differ, or a tensor can't be stored in its type; or the output would be in
            another format than the aligned model. FormatError: a norm or bias that is not finite.
    """
    aligned, path = models[1], Path(out)
    _check_vectors(opened)
    for triple in triples:
        ours, theirs = models[0].infos[triple.base_tensor].shape[-2], aligned.infos[triple.aligned_tensor].shape[-2]
        if ours != theirs:
            raise UnsupportedError(
                f"has {theirs} rows, and the base {models[0].path} has {ours}: tokens that only one of them knows have "
                f"no difference. --as adapter leaves them alone",
                file=aligned.path,
                tensor=aligned.stored_name(triple.aligned_tensor),
            )
    to_gguf = path.suffix.lower() == ".gguf"
    if to_gguf != (aligned.format == "gguf"):
        raise UsageError(
            "--aligned is in safetensors, and a model is written as it came: --out must be a directory"
            if to_gguf
            else "--aligned is GGUF, and a model is written as it came: --out must end in .gguf"
        )
    if isinstance(opened, Checkpoint):
        return CheckpointForm(path, opened, models, triples, outtype=outtype, force=force)
    return GgufForm(path, models, triples, outtype=outtype, force=force)


def _check_vectors(model: Model) -> None:
    """That what is copied, norms and biases, holds numbers: the rest is looked at when it is changed."""
    for name, info in model.infos.items():
        if len(info.shape) == 1 and info.dtype in _FLOATS and not bool(torch.isfinite(model.load(name)).all()):
            raise FormatError("holds NaN or Inf: the model is broken", file=model.file_of(name), tensor=name)


def _no_rows(start: int, stop: int) -> torch.Tensor:
    raise AssertionError("a plan has no tensors")

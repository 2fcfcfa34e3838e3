"""LoX as a model: every matrix with coef times its leading directions added, written as the model came or as GGUF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from converters.adapters.output import Origin
from converters.changed_model import ChangedModel
from converters.changes import Change, Edits, Rows
from converters.checkpoint import Checkpoint
from converters.errors import FormatError, UnsupportedError, UsageError
from converters.layouts import find_table
from converters.model_output import ModelOutput, ModelRequest, plan_model_output
from converters.models import Model
from safelora_gguf.lox_rows import NewRows, Part, RowsBroughtBack, by_tensor, parts_of
from safelora_gguf.lox_steps import Steps
from safelora_gguf.pairing import Triple

_FLOATS = {"F32", "F16", "BF16"}


class ModelForm:
    """The extrapolated model.

    Args:
        opened: the aligned model as it is stored; `models` has base and aligned in the run's layout.
        request: where it goes. What is quantized is rounded again wherever something is added to it, so that another
            type needs no permission of its own.
    """

    losses: tuple[str, ...] = ()

    def __init__(
        self, opened: Model, models: tuple[Model, Model], triples: Sequence[Triple], request: ModelRequest
    ) -> None:
        self.triples, self._opened, self._models, self._request = list(triples), opened, models, request
        self._brought_back = models[1].layout != opened.layout
        self._output = self._plan(model_edits(opened, models, triples, None))

    @property
    def target(self) -> Path:
        return self._output.target

    @property
    def tensor_file(self) -> Path:
        return self._output.tensor_file

    @property
    def files(self) -> Sequence[Path]:
        """All files of tensors."""
        return self._output.files

    @property
    def outtype(self) -> str:
        return self._output.outtype

    @property
    def notes(self) -> tuple[str, ...]:
        return self._output.notes

    def name_of(self, triple: Triple) -> str:
        return _name_of(triple, self._opened, self._models)

    def planned_bytes(self) -> int:
        return self._output.planned_bytes()

    def write(self, steps: Steps, origin: Origin, *, card: str) -> Mapping[str, float]:
        """Writes the model; the relative rounding error of each tensor, or module, by the name that it has in the
        run."""
        edits = model_edits(self._opened, self._models, steps.that_add(self.triples), steps)
        self._output = self._plan(edits)
        errors = {name: error.relative for name, error in self._output.write(origin.facts, card=card).items()}
        if not self._brought_back or self._request.is_gguf:
            return errors
        every = _parts(self._opened, self.triples)
        return {triple.pair.module: errors[own] for own, parts in every.items() for part in parts
                for triple in part.by_number.values()}  # fmt: skip

    def _plan(self, edits: Edits) -> ModelOutput:
        base = self._models[0]
        return plan_model_output(self._opened, edits, self._request, (base.path, *base.sources))


class KeptModel:
    """The extrapolated model in memory, for the next step of a chain: its tensors are computed when they are asked for.

    Args: as for `ModelForm`.
    """

    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(self, opened: Model, models: tuple[Model, Model], triples: Sequence[Triple]) -> None:
        self.triples, self._opened, self._models = list(triples), opened, models

    def name_of(self, triple: Triple) -> str:
        return _name_of(triple, self._opened, self._models)

    def changed(self, steps: Steps) -> ChangedModel:
        """The model. Raises: see `Steps.that_add`."""
        edits = model_edits(self._opened, self._models, steps.that_add(self.triples), steps)
        return ChangedModel(self._opened, edits)


def model_edits(opened: Model, models: tuple[Model, Model], triples: Sequence[Triple], steps: Steps | None) -> Edits:
    """The tensors that change; without steps only their names can be used.

    Args:
        opened: the aligned model as it is stored; `models` has base and aligned in the run's layout.
    """
    rows: dict[str, Rows]
    if models[1].layout == opened.layout:
        same = by_tensor(triples)
        rows = {name: _no_rows if steps is None else NewRows(models, found, steps) for name, found in same.items()}
    else:
        parts = _parts(opened, triples)
        rows = {own: _no_rows if steps is None else RowsBroughtBack(_checkpoint(opened), own, found, models, steps)
                for own, found in parts.items()}  # fmt: skip
    return Edits({name: Change(name, _without_gradients(found)) for name, found in rows.items()})


def _parts(opened: Model, triples: Sequence[Triple]) -> Mapping[str, list[Part]]:
    return parts_of(_checkpoint(opened), triples)


def _checkpoint(opened: Model) -> Checkpoint:
    assert isinstance(opened, Checkpoint), "what is GGUF already is not seen as GGUF"
    return opened


def _name_of(triple: Triple, opened: Model, models: tuple[Model, Model]) -> str:
    """A matrix's name in reports: GGUF's where the architecture is known and it is one tensor there."""
    own = models[1].layout == opened.layout == "hugging_face"
    table = find_table(models[1]) if own else None
    found = table.to_gguf(triple.pair.weight) if table else ()
    return f"{found[0].name}.weight" if len(found) == 1 else triple.aligned_tensor


def plan_model(
    out: str | Path,
    opened: Model,
    models: tuple[Model, Model],
    triples: Sequence[Triple],
    *,
    outtype: str | None,
    force: bool,
) -> ModelForm:
    """Checks that the model can be written there.

    Args:
        opened: the aligned model as it is stored; `models` has it in the run's layout.

    Raises:
        UsageError: an unknown type. OutputPathError: the place is taken or unusable.
        UnsupportedError: a tensor can't be stored in its type. See also `check_model`.
    """
    check_model(opened, models, triples)
    request = ModelRequest(Path(out), outtype, allow_requantize=True, force=force)
    if opened.format == "gguf" and not request.is_gguf:
        raise UsageError("--aligned is GGUF, from which no safetensors are made: --out must end in .gguf")
    return ModelForm(opened, models, triples, request)


def check_model(opened: Model, models: tuple[Model, Model], triples: Sequence[Triple]) -> None:
    """That a model can be extrapolated as a whole.

    Raises:
        UnsupportedError: the vocabularies differ. FormatError: a norm or bias that is not finite.
    """
    aligned = models[1]
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


def _check_vectors(model: Model) -> None:
    """That what is copied, norms and biases, holds numbers: the rest is looked at when it is changed."""
    for name, info in model.infos.items():
        if len(info.shape) == 1 and info.dtype in _FLOATS and not bool(torch.isfinite(model.load(name)).all()):
            raise FormatError("holds NaN or Inf: the model is broken", file=model.file_of(name), tensor=name)


def _without_gradients(rows: Rows) -> Rows:
    """The same in whatever thread: torch's modes are a thread's own, and the output asks from one of its own."""

    def found(start: int, stop: int) -> torch.Tensor:
        with torch.inference_mode():
            return rows(start, stop)

    return found


def _no_rows(start: int, stop: int) -> torch.Tensor:
    raise AssertionError("a plan has no tensors")

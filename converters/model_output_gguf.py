"""A model written as GGUF, from whatever it is stored as (a `ModelOutput`): directly, or through llama.cpp's quantizer.

Plain types are made here. For every other one a float file is written beside the target, which the quantizer reads in
a process of its own, and which is taken away afterwards, however that ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from converters.adapters.gguf_output import as_value
from converters.atomic import check_target, locked, refuse_to_overwrite, write_errors
from converters.changed_model import ChangedModel
from converters.changes import Edits
from converters.errors import LlamaError
from converters.float_file import clear_floats, float_files, refuse_no_numbers
from converters.free_space import free_space_for
from converters.ggml import QType
from converters.gguf_contents import GgufContents, flat_note, stored_contents, type_name
from converters.gguf_file import entry_bytes
from converters.gguf_layout import FilePlan, ModelTensor, Rounded, check_split, oversized, planned_files
from converters.gguf_model import open_gguf_model
from converters.gguf_rounding import StoredError, column_importance, is_flat
from converters.gguf_shards import is_shard_of, read_gguf_headers
from converters.gguf_stream import gguf_model_size, write_gguf_model
from converters.imatrix import check_imatrix, read_imatrix
from converters.importance_check import check_importance, importance_entries
from converters.model_card import Fact
from converters.model_request import KEEP, ModelRequest, PlannedTensor, Progress
from converters.names import first_few
from converters.quantization import FileType, quantized_size
from converters.quantizer import Quantized, check_quantizer, quantize_gguf

_UNWEIGHTED = {QType.F32, QType.F16, QType.BF16, QType.Q8_0}


class GgufOutput:
    """A GGUF file, or the shards of one.

    Args:
        contents: in plain types where the quantizer comes next.
        quantized: what the quantizer makes of it; None: it is written as it is.
        inputs: files that must not be overwritten.

    Raises:
        UnsupportedError, MissingLlamaError: see `check_quantizer` and `converters.gguf_stream`.
        FormatError, MismatchError: the importance matrix is none, or of another model.
        UsageError: see `planned_files` and `check_split`. OutputPathError: the place is taken, unusable or an input.
    """

    def __init__(
        self, contents: GgufContents, request: ModelRequest, quantized: FileType | None, inputs: Sequence[Path]
    ) -> None:
        self.target, self._request, self._quantized = request.out, request, quantized
        notes: tuple[str, ...] = ()
        if quantized is not None:
            check_quantizer(quantized, request.imatrix)
            if request.imatrix is not None:
                notes = check_importance(check_imatrix(request.imatrix), contents.tensors, quantized)
        weighted = None if request.imatrix is None else _weighted(contents, request.imatrix)
        self._contents = contents if weighted is None or quantized is not None else weighted
        self.losses, self.notes = contents.losses, (*contents.notes, *notes, *self._on_importance())
        reads = [*inputs, *contents.reads, *(path for path in (request.vocab_from, request.imatrix) if path)]
        _check_place(request, reads)
        limit = None if quantized is not None else request.split_max_size
        entries = list(contents.entries.items())
        self._size = gguf_model_size(entries, self._contents.tensors, contents.alignment, limit)
        if request.split_max_size is not None:
            check_split(entries, request.split_max_size)
        if limit is not None:
            self.notes = (*self.notes, *oversized(self._plans(), limit))
        self._written: tuple[Path, ...] = ()
        self.tensors = tuple(self._planned(tensor) for tensor in contents.tensors)

    @property
    def outtype(self) -> str:
        return KEEP if self._request.keeps else str(self._request.outtype)

    @property
    def quantizes(self) -> bool:
        return self._quantized is not None

    @property
    def files(self) -> Sequence[Path]:
        if self._written:
            return self._written
        plans = self._plans() if self._quantized is None else ()
        return tuple(self.target.with_name(plan.name) for plan in plans) or (self.target,)

    @property
    def tensor_file(self) -> Path:
        return self.files[0]

    def planned_bytes(self) -> int:
        if self._quantized is None:
            return self._size
        return quantized_size([self._contents.header()], self._quantized)

    def write(
        self, facts: Mapping[str, Fact], *, card: str | None = None, progress: Progress | None = None
    ) -> Mapping[str, StoredError]:
        """See `ModelOutput.write`; there is no place for a card."""
        added = {key: entry_bytes(key, as_value(value)) for key, value in facts.items()}
        clear_floats(self.target)
        contents = replace(self._contents, entries={**self._contents.entries, **added})
        if self._quantized is None:
            free_space_for(self.target, self._size)
            errors = _write(contents, self.target, self._request, progress)
        else:
            errors = {}
            self._quantize(contents, self._quantized, progress)
        self._look()
        return errors

    def _quantize(self, contents: GgufContents, wanted: FileType, progress: Progress | None) -> None:
        """Through a float file beside the target, and for shards through a whole one, too."""
        made, size = self.planned_bytes(), self._size
        split = self._request.split_max_size is not None
        what = f"a float file of {size / 1e9:.1f} GB and the model made of it"
        free_space_for(self.target, size + made * (2 if split else 1), what)
        part, aside = float_files(self.target)
        whole = aside if split else self.target
        if self._request.imatrix is not None:
            told = importance_entries(check_imatrix(self._request.imatrix))
            contents = replace(contents, entries={**contents.entries, **told})
        request = replace(self._request, split_max_size=None, force=True)
        try:
            _write(contents, part, request, progress and _first_half(progress))
            with write_errors(self.target), locked(part, self.target):
                refuse_no_numbers(part, contents.tensors, wanted)
                result = quantize_gguf(part, whole, wanted.name, threads=request.threads, imatrix=request.imatrix,
                                       allow_requantize=True, force=split or self._request.force,
                                       progress=progress and _second_half(progress, size))  # fmt: skip
            if split:
                part.unlink()
                self._split(whole)
        except LlamaError as error:
            raise LlamaError(error.message, file=self.target) from None  # the float file is gone
        finally:
            part.unlink(missing_ok=True)
            aside.unlink(missing_ok=True)
        self.notes = (*self.notes, *_on_types(result, wanted))

    def _split(self, whole: Path) -> None:
        model = ChangedModel(open_gguf_model(whole), Edits())
        contents = stored_contents(model, None)
        _write(contents, self.target, self._request, None)
        limit = self._request.split_max_size
        assert limit is not None, "only what is split is written twice"
        plans = planned_files(self.target, list(contents.entries.items()), contents.tensors,
                              alignment=contents.alignment, split_max_size=limit)  # fmt: skip
        self.notes = (*self.notes, *oversized(plans, limit))

    def _look(self) -> None:
        """What became of it, as its header tells."""
        plans = self._plans() if self._quantized is None else ()
        place = self.target.with_name(plans[0].name) if plans else self.target
        if not place.exists() and self._request.split_max_size is not None:
            place = min(path for path in self.target.parent.iterdir() if is_shard_of(self.target, path.name))
        headers = read_gguf_headers(place)
        self._written = tuple(header.path for header in headers)
        types = {name: tensor.dtype for header in headers for name, tensor in header.tensors.items()}
        self.tensors = tuple(replace(tensor, dtype=types[tensor.name]) for tensor in self.tensors)

    def _plans(self) -> Sequence[FilePlan]:
        contents, limit = self._contents, self._request.split_max_size
        entries = list(contents.entries.items())
        return planned_files(self.target, entries, contents.tensors, alignment=contents.alignment, split_max_size=limit)

    def _planned(self, tensor: ModelTensor) -> PlannedTensor:
        known = self._quantized is None or len(tensor.shape) < 2
        source = self._contents.sources.get(tensor.name)
        return PlannedTensor(tensor.name, tensor.shape, type_name(tensor.qtype) if known else None, source)

    def _on_importance(self) -> Sequence[str]:
        notes = []
        flat = [tensor.name for tensor in self._contents.tensors if is_flat(tensor)]
        if flat:
            notes.append(flat_note(flat))
        used = self._quantized is not None or any(
            isinstance(tensor.data, Rounded) and tensor.data.importance for tensor in self._contents.tensors
        )
        if self._request.imatrix is not None and not used:
            notes.append("the importance matrix is not used: none of the types takes one")
        return notes


def _weighted(contents: GgufContents, imatrix: Path) -> GgufContents:
    """The contents with the importance of columns wherever that is of use."""
    weights = read_imatrix(imatrix)

    def weighted(tensor: ModelTensor) -> ModelTensor:
        if not isinstance(tensor.data, Rounded) or tensor.qtype in _UNWEIGHTED:
            return tensor
        importance = column_importance(weights, tensor.name, tensor.shape, imatrix)
        return replace(tensor, data=replace(tensor.data, importance=importance))

    return replace(contents, tensors=tuple(map(weighted, contents.tensors)))


def _write(
    contents: GgufContents, target: Path, request: ModelRequest, progress: Progress | None
) -> Mapping[str, StoredError]:
    return write_gguf_model(
        target,
        list(contents.entries.items()),
        contents.tensors,
        alignment=contents.alignment,
        force=request.force,
        split_max_size=request.split_max_size,
        progress=progress,
    )


def _first_half(progress: Progress) -> Progress:
    """Of the work, that of the float file."""
    return lambda done, total, name: progress(done, 2 * total, name)


def _second_half(progress: Progress, size: int) -> Progress:
    """That of the quantizer, which counts tensors."""
    return lambda place, count, name: progress(size + size * place // max(count, 1), 2 * size, name)


def _on_types(made: Quantized, wanted: FileType) -> list[str]:
    types = ", ".join(f"{count} {name}" for name, count in made.types.items())
    notes = [f"quantized by llama.cpp as {wanted.name}: {types} tensors"]
    if made.fallbacks:
        names = first_few([f"{one.name} ({one.dtype})" for one in made.fallbacks])
        notes.append(f"stored in another type, since rows are no whole blocks of the one they were meant for: {names}")
    return notes


def _check_place(request: ModelRequest, reads: Sequence[Path]) -> None:
    """Whether the file, or shards of its name, may be written.

    Raises:
        OutputPathError: one is there, without --force; or one is read.
    """
    check_target(request.out, force=request.force)
    refuse_to_overwrite(request.out, reads)
    if request.split_max_size is None or not request.out.parent.is_dir():
        return
    for path in sorted(request.out.parent.iterdir()):
        if is_shard_of(request.out, path.name):
            check_target(path, force=request.force)
            refuse_to_overwrite(path, reads)

"""A GGUF model written again with some of its tensors changed, everything else byte for byte as it was.

Keys, tokenizer, alignment and order are the source's, of a split model those of its first shard; a changed tensor is
stored again in its own type unless the caller names another.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from converters.changes import Change
from converters.errors import FileMissingError, FormatError, UnsupportedError, system_reason
from converters.ggml import QType, fits
from converters.gguf_file import Value, entry_bytes, stored_entry_bytes
from converters.gguf_layout import Entry, ModelTensor, Rounded, Stored
from converters.gguf_metadata import GgufHeader
from converters.gguf_rounding import StoredError, check_types, column_importance
from converters.gguf_shards import SPLIT_KEYS
from converters.gguf_stream import Progress, gguf_model_size, write_gguf_model
from converters.imatrix import read_imatrix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from converters.gguf_model import GgufModel

__all__ = ["GgufParts", "StoredError", "gguf_parts", "rewrite_gguf", "rewritten_parts", "rewritten_size"]

_REMEDY = "A changed tensor keeps its type: start from a float file of the model (F16, BF16, F32), with --outtype"


@dataclass(frozen=True)
class GgufParts:
    """What `write_gguf_model` makes a model of."""

    entries: Sequence[Entry]
    tensors: Sequence[ModelTensor]
    alignment: int


def rewrite_gguf(
    model: GgufModel,
    target: Path,
    changes: Sequence[Change],
    *,
    added: Sequence[tuple[str, Value | bytes]] = (),
    dropped: Collection[str] = (),
    imatrix: Path | None = None,
    split_max_size: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Mapping[str, StoredError]:
    """Writes a model, whole or not at all.

    Args:
        target: must be none of the files that `changes` read from.
        changes: see `rewritten_parts`, as for `added`, `dropped` and `imatrix`.
        split_max_size: see `write_gguf_model`.
        progress: called with (bytes written, bytes in all, next tensor).

    Returns:
        For every change what its type cost it.

    Raises:
        As `rewritten_parts` and `write_gguf_model`; all but values that can't be stored is found before anything is
        written.
    """
    parts = rewritten_parts(model, changes, added=added, dropped=dropped, imatrix=imatrix)
    return write_gguf_model(target, parts.entries, parts.tensors, alignment=parts.alignment, force=force,
                            split_max_size=split_max_size, progress=progress)  # fmt: skip


def rewritten_size(
    model: GgufModel,
    changes: Sequence[Change] = (),
    *,
    added: Sequence[tuple[str, Value | bytes]] = (),
    dropped: Collection[str] = (),
    imatrix: Path | None = None,
    split_max_size: int | None = None,
) -> int:
    """The bytes that `rewrite_gguf` would write, after the checks that it makes beforehand; raises as it does."""
    parts = rewritten_parts(model, changes, added=added, dropped=dropped, imatrix=imatrix)
    return gguf_model_size(parts.entries, parts.tensors, parts.alignment, split_max_size)


def rewritten_parts(
    model: GgufModel,
    changes: Sequence[Change],
    *,
    added: Sequence[tuple[str, Value | bytes]] = (),
    dropped: Collection[str] = (),
    imatrix: Path | None = None,
) -> GgufParts:
    """A model with its changes, to be written.

    Args:
        changes: at most one for a name. A tensor that the model does not have says which one it follows: it is stored
            in that one's type, as F32 if it is a vector, as F16 if its rows are no whole blocks of the type.
        added: keys that follow the source's own, with their values or whole entries; one that it has already gets the
            new value in its old place.
        dropped: keys of the source that are left out.
        imatrix: an importance matrix for the changed tensors, see `converters.imatrix`. Without one the types that
            are made for it are stored as if all columns were equal: see `StoredError.flat`.

    Raises:
        UnsupportedError: a changed tensor's type can't be stored; or the model is big-endian.
        MismatchError: the importance matrix is another model's.
        FormatError, FileMissingError: the source was changed or removed meanwhile, or the importance matrix is none.
    """
    by_name = {change.name: change for change in changes}
    assert len(by_name) == len(changes), "a tensor is changed twice"
    weights = read_imatrix(imatrix) if imatrix is not None else {}
    parts = gguf_parts(model.headers)
    tensors = list(_with_new(parts.tensors, by_name))
    assert not by_name.keys() - {tensor.name for tensor in tensors}, f"changes of no tensor: {list(by_name)}"
    stored = {tensor.name: tensor for tensor in parts.tensors}
    tensors = [
        _copied(tensor, by_name[tensor.name], stored) or _changed(model, tensor, by_name[tensor.name], weights, imatrix)
        if tensor.name in by_name
        else tensor
        for tensor in tensors
    ]
    _check_types(tensors)
    return GgufParts(_entries(parts.entries, added, dropped), tensors, parts.alignment)


def gguf_parts(headers: Sequence[GgufHeader]) -> GgufParts:
    """A whole model as it is, to be copied; that of several shards without the keys that say so.

    Raises:
        UnsupportedError: it is big-endian. FormatError, FileMissingError: a file was changed or removed meanwhile.
    """
    first, tensors, entries = headers[0], list[ModelTensor](), list[Entry]()
    _check_byte_order(headers)
    with _opened(headers) as sources:
        for key, entry in first.entries.items():
            if len(headers) == 1 or key not in SPLIT_KEYS:
                payload = _read(sources[first.path], entry.offset, entry.nbytes, first)
                entries.append((key, stored_entry_bytes(key, entry.kind, entry.item, entry.count, payload)))
    for header in headers:
        for name, tensor in header.tensors.items():
            stored = Stored(((header.path, tensor.offset, tensor.nbytes),))
            tensors.append(ModelTensor(name, tensor.shape, tensor.qtype, stored, header.path))
    return GgufParts(entries, tensors, first.alignment)


def _with_new(tensors: Sequence[ModelTensor], changes: Mapping[str, Change]) -> Iterator[ModelTensor]:
    """The model's tensors, each followed by those that are new behind it, for now as if they were its likes."""
    present, following = {tensor.name for tensor in tensors}, dict[str, list[Change]]()
    for change in changes.values():
        if change.name not in present:
            assert change.after is not None and change.shape is not None, f"{change.name} is new: where, of what shape?"
            following.setdefault(change.after, []).append(change)
    waiting = list(reversed(tensors))
    while waiting:
        tensor = waiting.pop()
        yield tensor
        for change in reversed(following.pop(tensor.name, [])):
            assert change.shape is not None, "seen above"
            qtype = QType.F32 if len(change.shape) == 1 else tensor.qtype
            qtype = qtype if fits(change.shape, qtype) else QType.F16
            waiting.append(replace(tensor, name=change.name, shape=change.shape, qtype=qtype))


def _copied(tensor: ModelTensor, change: Change, stored: Mapping[str, ModelTensor]) -> ModelTensor | None:
    """A change that has the values of a stored tensor, where it is to be stored alike."""
    if change.copy_of is None:
        return None
    source = stored[change.copy_of]
    shape = tensor.shape if change.shape is None else change.shape
    qtype = tensor.qtype if change.qtype is None else change.qtype
    return replace(source, name=tensor.name) if (source.shape, source.qtype) == (shape, qtype) else None


def _changed(
    model: GgufModel, tensor: ModelTensor, change: Change, weights: Mapping[str, NDArray[np.float32]], file: Path | None
) -> ModelTensor:
    shape = tensor.shape if change.shape is None else change.shape
    importance = None if file is None else column_importance(weights, tensor.name, shape, file)
    prefetch = partial(model.prefetch, tensor.name) if tensor.name in model.infos else None
    qtype = tensor.qtype if change.qtype is None else change.qtype
    return replace(tensor, shape=shape, qtype=qtype, data=Rounded(change.rows, importance, prefetch))


def _check_types(tensors: Sequence[ModelTensor]) -> None:
    try:
        check_types(tensors)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error.message}. {_REMEDY}", file=error.file, tensor=error.tensor) from None


def _entries(
    stored: Sequence[Entry], added: Sequence[tuple[str, Value | bytes]], dropped: Collection[str]
) -> list[Entry]:
    """The source's keys with their values as they are stored there, then those that are added."""
    new = {key: value if isinstance(value, bytes) else entry_bytes(key, value) for key, value in added}
    assert "general.alignment" not in {*new, *dropped}, "the alignment is the source's"
    entries = [(key, new.pop(key, data)) for key, data in stored if key not in dropped]
    return [*entries, *new.items()]


def _check_byte_order(headers: Sequence[GgufHeader]) -> None:
    for header in headers:
        if header.byte_order != "little":
            told = "is big-endian, and models are written little-endian; turn it with gguf-convert-endian first"
            raise UnsupportedError(told, file=header.path)


@contextlib.contextmanager
def _opened(headers: Sequence[GgufHeader]) -> Iterator[Mapping[Path, BinaryIO]]:
    """The files behind some headers, as long as they are what the headers say.

    Raises:
        FileMissingError, FormatError: one is gone, or has another size.
    """
    with contextlib.ExitStack() as stack:
        files = {}
        for header in headers:
            try:
                file = stack.enter_context(header.path.open("rb"))
            except OSError as error:
                raise FileMissingError(f"GGUF model: {system_reason(error)}", file=header.path) from None
            if os.fstat(file.fileno()).st_size != header.file_size:
                _refuse_changed(header)
            files[header.path] = file
        yield files


def _read(file: BinaryIO, offset: int, count: int, header: GgufHeader) -> bytes:
    file.seek(offset)
    data = file.read(count)
    if len(data) != count:
        _refuse_changed(header)
    return data


def _refuse_changed(header: GgufHeader) -> NoReturn:
    raise FormatError("was changed while it was read", file=header.path)

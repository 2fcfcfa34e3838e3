"""A GGUF model written again with some of its tensors changed, everything else byte for byte as it was.

Keys, tokenizer, alignment and order are the source's, of a split model those of its first shard; a changed tensor is
stored again in its own type unless the caller names another. Rows are asked for, rounded and written a few megabytes
at a time, and what stays is copied inside the kernel where that is possible.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from converters.atomic import atomic_file
from converters.copying import copy_range
from converters.errors import FileMissingError, FormatError, UnsupportedError, system_reason
from converters.ggml import QType, block_of, check_storable, decode, encode, nbytes
from converters.gguf_file import Value, entry_bytes, start_bytes, stored_entry_bytes, tensor_info_bytes
from converters.gguf_metadata import GgufHeader, GgufTensor

if TYPE_CHECKING:
    import torch

    from converters.gguf_model import GgufModel

Rows = Callable[[int, int], "torch.Tensor"]
Progress = Callable[[int, int, str], None]

_ELEMENTS = 1 << 21  # of a tensor that are held at once: 8 MB in float32
_SAFE_SQUARES = (1e-20, 1e30)  # sums in float32 that have lost nothing to its range
_SPLIT = ("split.no", "split.count", "split.tensors.count")
_REMEDY = "A changed tensor keeps its type: start from a float file of the model (F16, BF16, F32), with --outtype"


@dataclass(frozen=True)
class Change:
    """A tensor with new values.

    Attributes:
        rows: gives rows [start, stop) of the tensor seen as a matrix, all dimensions but the last merged: float32
            (stop - start, columns) on the CPU. Asked once for every row, in order.
        qtype: the type to store it in, if not its own; its rows must be whole blocks of it.
    """

    name: str
    rows: Rows
    qtype: int | None = None


@dataclass(frozen=True)
class StoredError:
    """What rounding to the stored type cost a tensor: ||stored - wanted||_F, and that divided by ||wanted||_F."""

    relative: float
    absolute: float


@dataclass(frozen=True)
class _Placed:
    """A tensor of the output; `offset` counts from the beginning of the data."""

    tensor: GgufTensor
    source: GgufHeader
    change: Change | None
    qtype: int
    nbytes: int
    offset: int


@dataclass(frozen=True)
class _Plan:
    header: bytes
    tensors: Sequence[_Placed]
    alignment: int
    nbytes: int


def rewrite_gguf(
    model: GgufModel,
    target: Path,
    changes: Sequence[Change],
    *,
    added: Sequence[tuple[str, Value]] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Mapping[str, StoredError]:
    """Writes a model to one file, whole or not at all.

    Args:
        target: must be none of the files that `changes` read from.
        changes: at most one for a name, of tensors that the model has.
        added: keys that follow the source's own; one that it has already gets the new value in its old place.
        progress: called with (bytes written, bytes in all, next tensor).

    Returns:
        For every change what its type cost it.

    Raises:
        UnsupportedError: a changed tensor's type can't be stored, or can't hold the values; or the model is
            big-endian. All but the values is found before anything is written.
        FormatError, FileMissingError: the source was changed or removed meanwhile.
        OutputPathError, WriteError: see `converters.atomic`.
    """
    plan = _planned(model, changes, added)
    errors: dict[str, StoredError] = {}
    with atomic_file(target, force=force) as file, _opened(model.headers) as sources:
        file.write(plan.header)
        for placed in plan.tensors:
            where = len(plan.header) + placed.offset
            if progress is not None:
                progress(where, plan.nbytes, placed.tensor.name)
            if placed.change is None:
                source, size = sources[placed.source.path], placed.nbytes
                if copy_range(source, placed.tensor.offset, file, where, size) != size:
                    _refuse_changed(placed.source)
            else:
                errors[placed.tensor.name] = _store(placed, placed.change.rows, file)
            file.write(bytes(-placed.nbytes % plan.alignment))
    return errors


def rewritten_size(model: GgufModel, changes: Sequence[Change] = (), *, added: Sequence[tuple[str, Value]] = ()) -> int:
    """The bytes that `rewrite_gguf` would write, after the checks that it makes beforehand; raises as it does."""
    return _planned(model, changes, added).nbytes


def _planned(model: GgufModel, changes: Sequence[Change], added: Sequence[tuple[str, Value]]) -> _Plan:
    first = model.headers[0]
    _check_byte_order(model.headers)
    by_name = {change.name: change for change in changes}
    assert len(by_name) == len(changes), "a tensor is changed twice"
    _check_types(model.headers, by_name)
    entries = _entries(model.headers, added)
    offset, places, infos = 0, list[_Placed](), []
    for header in model.headers:
        for name, tensor in header.tensors.items():
            change = by_name.pop(name, None)
            qtype = _type(tensor, change)
            size = tensor.nbytes if qtype == tensor.qtype else nbytes(tensor.shape, qtype)
            places.append(_Placed(tensor, header, change, qtype, size, offset))
            infos.append(tensor_info_bytes(name, tensor.shape, qtype, offset))
            offset += _padded(size, first.alignment)
    assert not by_name, f"the model has no {', '.join(by_name)}"
    head = b"".join((start_bytes(len(places), len(entries)), *entries, *infos))
    head = head.ljust(_padded(len(head), first.alignment), b"\0")
    return _Plan(head, places, first.alignment, len(head) + offset)


def _type(tensor: GgufTensor, change: Change | None) -> int:
    return tensor.qtype if change is None or change.qtype is None else change.qtype


def _check_byte_order(headers: Sequence[GgufHeader]) -> None:
    for header in headers:
        if header.byte_order != "little":
            told = "is big-endian, and models are written little-endian; turn it with gguf-convert-endian first"
            raise UnsupportedError(told, file=header.path)


def _check_types(headers: Sequence[GgufHeader], changes: Mapping[str, Change]) -> None:
    found = {
        (header.path, _type(tensor, changes[name])): name
        for header in headers
        for name, tensor in header.tensors.items()
        if name in changes
    }
    for (path, qtype), name in found.items():
        try:
            check_storable(qtype)
        except UnsupportedError as error:
            raise UnsupportedError(f"{error.message}. {_REMEDY}", file=path, tensor=name) from None


def _entries(headers: Sequence[GgufHeader], added: Sequence[tuple[str, Value]]) -> list[bytes]:
    """The first shard's keys with their values as they are stored there, then those that are added."""
    header, new = headers[0], {key: entry_bytes(key, value) for key, value in added}
    assert "general.alignment" not in new, "the alignment is the source's"
    dropped = _SPLIT if len(headers) > 1 else ()
    entries = []
    with _opened([header]) as sources:
        for key, entry in header.entries.items():
            if key in new:
                entries.append(new.pop(key))
            elif key not in dropped:
                payload = _read(sources[header.path], entry.offset, entry.nbytes, header)
                entries.append(stored_entry_bytes(key, entry.kind, entry.item, entry.count, payload))
    return [*entries, *new.values()]


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


def _store(placed: _Placed, rows: Rows, file: BinaryIO) -> StoredError:
    import torch

    tensor, qtype = placed.tensor, placed.qtype
    columns = tensor.shape[-1] if tensor.shape else 1
    count, step = prod(tensor.shape[:-1]), max(1, _ELEMENTS // max(1, columns))
    off = size = 0.0
    for start in range(0, count, step):
        shape = (min(step, count - start), columns)
        wanted = rows(start, start + shape[0])
        assert wanted.shape == shape and wanted.dtype == torch.float32, f"{tensor.name}: {wanted.shape} for {shape}"
        size += _square(wanted)
        if not math.isfinite(size):
            _refuse_values(placed)
        data = _encoded(wanted, placed)
        file.write(data)
        if qtype != QType.F32:
            off += _square(decode(data, shape, qtype).sub_(wanted))
    if not math.isfinite(off):
        _refuse_values(placed)
    return StoredError(math.sqrt(off / size) if size else 0.0 if off == 0 else math.inf, math.sqrt(off))


def _encoded(wanted: torch.Tensor, placed: _Placed) -> bytes:
    try:
        return encode(wanted, placed.qtype)
    except UnsupportedError as error:
        raise UnsupportedError(error.message, file=placed.source.path, tensor=placed.tensor.name) from None


def _square(values: torch.Tensor) -> float:
    """||values||_F^2 for a matrix; not finite where a value is not."""
    import torch

    norms = torch.linalg.vector_norm(values, dim=-1).double()  # in float64 from the start it takes sixty times as long
    total = float(norms.square().sum())
    if _SAFE_SQUARES[0] < total < _SAFE_SQUARES[1]:
        return total
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _refuse_values(placed: _Placed) -> NoReturn:
    kind = block_of(placed.qtype)
    told = f"its new values are too large for {kind.name if kind else placed.qtype}, or no numbers; take a file in BF16"
    raise UnsupportedError(f"{told} or F32", file=placed.source.path, tensor=placed.tensor.name)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment

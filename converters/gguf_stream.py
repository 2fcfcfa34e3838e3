"""Writing a whole GGUF model, one file or shards, in one stream of constant memory.

What is stored already is copied inside the kernel where that is possible; what is rounded is read and converted by a
thread that runs a few pieces ahead of the writing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from converters.ahead import ahead, in_mode
from converters.atomic import atomic_file, check_target, refuse_to_overwrite
from converters.atomic_files import atomic_files, check_files
from converters.copying import copy_range
from converters.errors import FileMissingError, FormatError, system_reason
from converters.fingerprint import hashed_behind
from converters.gguf_layout import Entry, FilePlan, ModelTensor, Rounded, Stored, padded, planned_files
from converters.gguf_rounding import StoredError, check_types, rounded_pieces
from converters.gguf_shards import is_shard_of

__all__ = [
    "ModelTensor",
    "Progress",
    "Rounded",
    "Stored",
    "StoredError",
    "check_gguf_target",
    "gguf_model_size",
    "write_gguf_model",
]

Progress = Callable[[int, int, str], None]
"""Called with (bytes written, bytes in all, next tensor)."""

_DEPTH = 4  # pieces that are made ahead
_COPIED = 32 << 20  # bytes that are copied at a time: as far ahead the system is asked to read
_HASHED = 4 << 20  # bytes written between two that are told to who hashes them


@dataclass(frozen=True)
class _Piece:
    """Bytes of a tensor, or a part of a file (path, offset, number of bytes) that holds them."""

    name: str
    data: bytes | memoryview | tuple[Path, int, int]


def write_gguf_model(
    target: Path,
    entries: Sequence[Entry],
    tensors: Sequence[ModelTensor],
    *,
    alignment: int = 32,
    force: bool,
    split_max_size: int | None = None,
    progress: Progress | None = None,
) -> Mapping[str, StoredError]:
    """Writes a model, all of it or nothing.

    Args:
        entries: each key with its whole entry, in order; `split.*` are those of the output, whatever stands here.
        tensors: in order. Rows are asked for in order, too, in another thread than the caller's.
        alignment: what tensors are padded to; another than 32 must stand among the entries, as `general.alignment`.
        split_max_size: bytes that a file may have. A larger model is written in shards, `NAME-00001-of-00003.gguf` for
            NAME.gguf, and with `force` takes the place of NAME.gguf and all shards of that name.

    Returns:
        For every tensor that was rounded what that cost it.

    Raises:
        UnsupportedError: a type can't be stored, or can't hold the values. UsageError: too many shards. All but the
            values is found before anything is written.
        FormatError, FileMissingError: a source was changed or removed meanwhile.
        OutputPathError, WriteError: see `converters.atomic`; or the output would replace a file that it is made of.
    """
    plans = planned_files(target, entries, tensors, alignment=alignment, split_max_size=split_max_size)
    check_types(tensors)
    _check_places(target, plans, tensors, force=force, split=split_max_size is not None)
    errors, done = dict[str, StoredError](), _Done(plans, progress)
    if split_max_size is None:
        with atomic_file(target, force=force) as file:
            _write(file, plans[0], errors, done)
        return errors
    with atomic_files(target, [plan.name for plan in plans], partial(_belongs, target), force=force) as directory:
        for plan in plans:
            with (directory / plan.name).open("xb") as file:
                _write(file, plan, errors, done)
    return errors


def gguf_model_size(
    entries: Sequence[Entry], tensors: Sequence[ModelTensor], alignment: int = 32, split_max_size: int | None = None
) -> int:
    """The bytes that `write_gguf_model` would write, after the checks of types that it makes beforehand."""
    plans = planned_files(Path("model"), entries, tensors, alignment=alignment, split_max_size=split_max_size)
    check_types(tensors)
    return sum(plan.nbytes for plan in plans)


def check_gguf_target(
    target: Path,
    entries: Sequence[Entry],
    tensors: Sequence[ModelTensor],
    *,
    alignment: int = 32,
    force: bool,
    split_max_size: int | None = None,
) -> list[Path]:
    """The files that `write_gguf_model` would write, first the one to be loaded, once it is known that they may be.

    Raises:
        OutputPathError: a place is unusable, or taken and `force` is not set, or is a file that the model is made of.
        UsageError: too many shards.
    """
    plans = planned_files(target, entries, tensors, alignment=alignment, split_max_size=split_max_size)
    _check_places(target, plans, tensors, force=force, split=split_max_size is not None)
    return [target.with_name(plan.name) for plan in plans]


def _check_places(
    target: Path, plans: Sequence[FilePlan], tensors: Iterable[ModelTensor], *, force: bool, split: bool
) -> None:
    """`split`: whether older shards are replaced, too."""
    if split:
        replaced = check_files(target, [plan.name for plan in plans], partial(_belongs, target), force=force)
    else:
        check_target(target, force=force)
        replaced = [target]
    sources = sorted(_sources(tensors))
    for path in replaced:
        refuse_to_overwrite(path, sources)


def _belongs(target: Path, name: str) -> bool:
    return name == target.name or is_shard_of(target, name)


def _sources(tensors: Iterable[ModelTensor]) -> set[Path]:
    found = set()
    for tensor in tensors:
        found.add(tensor.origin)
        if isinstance(tensor.data, Stored):
            found.update(path for path, _, _ in tensor.data.pieces)
    return found


class _Done:
    """Bytes that are written, and who is told."""

    def __init__(self, plans: Sequence[FilePlan], progress: Progress | None) -> None:
        self._written, self._tensor = 0, ""
        self._total, self._progress = sum(plan.nbytes for plan in plans), progress

    def begin(self, tensor: str) -> None:
        if self._progress is not None and tensor != self._tensor:
            self._progress(self._written, self._total, tensor)
        self._tensor = tensor

    def add(self, count: int) -> None:
        self._written += count


class _Sources:
    """Files that are read, opened at first use and closed with the stack."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, BinaryIO] = {}

    def open(self, path: Path) -> BinaryIO:
        if path not in self._files:
            try:
                self._files[path] = self._stack.enter_context(path.open("rb"))
            except OSError as error:
                raise FileMissingError(f"GGUF model: {system_reason(error)}", file=path) from None
        return self._files[path]


def _write(file: BinaryIO, plan: FilePlan, errors: dict[str, StoredError], done: _Done) -> None:
    file.write(plan.header)
    where = told = len(plan.header)
    done.add(where)
    with contextlib.ExitStack() as stack:
        sources = _Sources(stack)
        written = stack.enter_context(hashed_behind(file, plan.nbytes))
        pieces = ahead(_pieces(plan, _Sources(stack), errors), _DEPTH, in_mode())
        stack.callback(pieces.close)  # before the sources are
        for piece in pieces:
            done.begin(piece.name)
            size = _add(piece.data, file, where, sources)
            where += size
            done.add(size)
            if where - told >= _HASHED:
                written(where)
                told = where
        assert where == plan.nbytes, f"{plan.name}: {where} bytes written, {plan.nbytes} announced"


def _add(data: bytes | memoryview | tuple[Path, int, int], file: BinaryIO, where: int, sources: _Sources) -> int:
    """Writes a piece to its place, the end of the file; its size."""
    if not isinstance(data, tuple):
        return file.write(data)
    path, offset, size = data
    if copy_range(sources.open(path), offset, file, where, size) != size:
        raise FormatError("was changed while it was read", file=path)
    return size


def _pieces(plan: FilePlan, sources: _Sources, errors: dict[str, StoredError]) -> Iterator[_Piece]:
    """Everything behind the header, in order; what is stored is asked for as far ahead as pieces are made."""
    for tensor in plan.tensors:
        if isinstance(tensor.data, Stored):
            for part in _parts(tensor.data):
                _prefetch(sources.open(part[0]), part[1], part[2])
                yield _Piece(tensor.name, part)
        else:
            if tensor.data.prefetch is not None:
                tensor.data.prefetch()
            errors[tensor.name] = yield from _rounded(tensor)
        if padding := padded(tensor.nbytes, plan.alignment) - tensor.nbytes:
            yield _Piece(tensor.name, bytes(padding))


def _rounded(tensor: ModelTensor) -> Generator[_Piece, None, StoredError]:
    pieces = rounded_pieces(tensor)
    while True:
        try:
            data = next(pieces)
        except StopIteration as end:
            error: StoredError = end.value
            return error
        yield _Piece(tensor.name, data)


def _parts(stored: Stored) -> Iterator[tuple[Path, int, int]]:
    for path, offset, size in stored.pieces:
        for start in range(0, size, _COPIED):
            yield path, offset + start, min(_COPIED, size - start)


def _prefetch(file: BinaryIO, offset: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # no more than a wish
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

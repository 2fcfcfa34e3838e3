"""Where everything of a GGUF model will lie, before a byte of it is written: offsets, padding, shards.

Shards are named and keyed as llama-gguf-split and the gguf package do: all metadata in the first one, `split.no`,
`split.count` and `split.tensors.count` in each, a shard closed before the tensor that would make it too large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.changes import Rows
from converters.errors import UsageError
from converters.ggml import block_of, nbytes
from converters.gguf_file import Value, entry_bytes, start_bytes, tensor_info_bytes
from converters.gguf_shards import MAX_SHARDS, SPLIT_KEYS, shard_name
from converters.gguf_types import Kind

if TYPE_CHECKING:
    import torch

Entry = tuple[str, bytes]
"""A metadata key, and the whole entry as it stands in the file: see `converters.gguf_file`."""

_PLAIN_ALIGNMENT = 32  # of a file that names no other; only the first shard could
_SHARD_KINDS = (Kind.UINT16, Kind.UINT16, Kind.INT32)


@dataclass(frozen=True)
class Stored:
    """A tensor's bytes as they lie in files: each piece a file, an offset and a number of bytes, in order."""

    pieces: tuple[tuple[Path, int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(size for _, _, size in self.pieces)


@dataclass(frozen=True)
class Rounded:
    """Values that are to be stored in a tensor's type.

    Attributes:
        rows: gives some of them; also in bfloat16 or float16, which a file of that type takes as they are.
        importance: of the columns of a stack's matrix with this number, float32 (columns,), or None: see
            `converters.ggml.encode`. Of a single matrix, number 0.
        prefetch: asks the system to read soon what `rows` will read; called before the first of them.
    """

    rows: Rows
    importance: Callable[[int], torch.Tensor | None] | None = None
    prefetch: Callable[[], None] | None = None


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of a model that is to be written.

    Attributes:
        shape: outermost dimension first, as in torch.
        qtype: ggml's number of the type that it will have.
        origin: the file that messages name.
    """

    name: str
    shape: tuple[int, ...]
    qtype: int
    data: Stored | Rounded
    origin: Path

    @property
    def nbytes(self) -> int:
        if isinstance(self.data, Stored):  # whose type need not be known
            assert block_of(self.qtype) is None or self.data.nbytes == nbytes(self.shape, self.qtype), self.name
            return self.data.nbytes
        return nbytes(self.shape, self.qtype)


@dataclass(frozen=True)
class FilePlan:
    """A file to be: its header, padded, and its tensors, each of which is padded to the alignment."""

    name: str
    header: bytes
    tensors: Sequence[ModelTensor]
    alignment: int

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(padded(tensor.nbytes, self.alignment) for tensor in self.tensors)


def planned_files(
    target: Path,
    entries: Sequence[Entry],
    tensors: Sequence[ModelTensor],
    *,
    alignment: int = _PLAIN_ALIGNMENT,
    split_max_size: int | None = None,
) -> list[FilePlan]:
    """The file of a model, or its shards in order where it is larger than `split_max_size` bytes.

    No shard is larger than that unless it has a single tensor.

    Raises:
        UsageError: it would be more files than are read.
    """
    assert len({tensor.name for tensor in tensors}) == len(tensors), "a tensor stands twice"
    assert len({key for key, _ in entries}) == len(entries), "a key stands twice"
    assert alignment == _PLAIN_ALIGNMENT or any(key == "general.alignment" for key, _ in entries), "nobody would know"
    whole = _file(target.name, entries, tensors, alignment)
    if split_max_size is None or whole.nbytes <= split_max_size:
        return [whole]
    entries = [entry for entry in entries if entry[0] not in SPLIT_KEYS]
    parts = list(_parts(entries, tensors, alignment, split_max_size))
    if len(parts) == 1:
        return [whole]
    if len(parts) > MAX_SHARDS:
        raise UsageError(f"{split_max_size} bytes a file make {len(parts)} files of it; at most {MAX_SHARDS} are read")
    files = list[FilePlan]()
    for number, part in enumerate(parts):
        own = [*(entries if number == 0 else ()), *_shard_entries(number, len(parts), len(tensors))]
        name = shard_name(target, number + 1, len(parts))
        files.append(_file(name, own, part, _PLAIN_ALIGNMENT if number else alignment))
    return files


def check_split(entries: Sequence[Entry], limit: int) -> None:
    """Raises UsageError: the metadata alone is more than `limit` bytes, and all of it stands in the first file."""
    size = sum(len(data) for _, data in entries)
    if size > limit:
        raise UsageError(f"{limit:,} bytes a file are too few: its metadata, which is in the first one, takes {size:,}")


def oversized(plans: Sequence[FilePlan], limit: int) -> list[str]:
    """What is to be said of shards that are larger than `limit` bytes, since they have a single tensor."""
    large = [plan for plan in plans if plan.nbytes > limit]
    if not large:
        return []
    largest, verb = max(large, key=lambda plan: plan.nbytes), "is" if len(large) == 1 else "are"
    return [
        f"{len(large)} of {len(plans)} files {verb} larger than {limit:,} bytes, since no tensor is cut: the largest, "
        f"with {largest.tensors[0].name}, has {largest.nbytes:,}"
    ]


def _parts(
    entries: Sequence[Entry], tensors: Sequence[ModelTensor], alignment: int, limit: int
) -> Iterator[list[ModelTensor]]:
    """The tensors of each shard: at least one."""
    keys = sum(len(data) for _, data in _shard_entries(0, 0, 0))
    head = len(start_bytes(0, 0)) + keys + sum(len(data) for _, data in entries)
    data, part = 0, list[ModelTensor]()
    for tensor in tensors:
        info = len(tensor_info_bytes(tensor.name, tensor.shape, tensor.qtype, 0))
        size = padded(tensor.nbytes, alignment)
        if part and padded(head + info, alignment) + data + size > limit:
            yield part
            part, head, data, alignment = [], len(start_bytes(0, 0)) + keys, 0, _PLAIN_ALIGNMENT
            size = padded(tensor.nbytes, alignment)
        part.append(tensor)
        head, data = head + info, data + size
    yield part


def _shard_entries(number: int, count: int, tensors: int) -> list[Entry]:
    values = zip(SPLIT_KEYS, _SHARD_KINDS, (number, count, tensors), strict=True)
    return [(key, entry_bytes(key, Value(kind, value))) for key, kind, value in values]


def _file(name: str, entries: Sequence[Entry], tensors: Sequence[ModelTensor], alignment: int) -> FilePlan:
    offset, infos = 0, []
    for tensor in tensors:
        infos.append(tensor_info_bytes(tensor.name, tensor.shape, tensor.qtype, offset))
        offset += padded(tensor.nbytes, alignment)
    head = b"".join((start_bytes(len(tensors), len(entries)), *(data for _, data in entries), *infos))
    return FilePlan(name, head.ljust(padded(len(head), alignment), b"\0"), tuple(tensors), alignment)


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment

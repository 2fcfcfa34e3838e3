"""What tells one model or adapter from another without reading all of it."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from converters.errors import FileMissingError, system_reason
from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader
from converters.safetensors_file import SafetensorsFile

_HEAD = 4096
_CHUNK = 1 << 20
_WORTHWHILE = 16 << 20  # bytes


def fingerprint(files: Iterable[SafetensorsFile], extra: bytes = b"") -> str:
    """sha256 over the header and the first 4 KiB of every tensor of every file, in order.

    Args:
        files: in the order of their names.
        extra: bytes that belong to the meaning (an adapter's configuration), hashed first.
    """
    digest = hashlib.sha256(extra)
    for file in files:
        tensors = [(file.header.offsets[name], info.nbytes) for name, info in file.infos.items()]
        _add(digest, file.path, file.header.nbytes, tensors)
    return digest.hexdigest()


def fingerprint_gguf(*files: Path | GgufHeader) -> str:
    """sha256 over the header and the first 4 KiB of every tensor of a GGUF file, or of all its shards in order.

    Raises:
        FileMissingError, FormatError: see `read_gguf_header`.
    """
    digest = hashlib.sha256()
    for file in files:
        header = file if isinstance(file, GgufHeader) else read_gguf_header(file)
        _add(digest, header.path, header.nbytes, [(tensor.offset, tensor.nbytes) for tensor in header.tensors.values()])
    return digest.hexdigest()


def _add(digest: hashlib._Hash, path: Path, header: int, tensors: Iterable[tuple[int, int]]) -> None:
    """One file: the length of its header, and offset and size of every tensor."""
    try:
        with path.open("rb") as stream:
            for start in range(0, header, _CHUNK):
                digest.update(stream.read(min(_CHUNK, header - start)))
            for offset, nbytes in tensors:
                stream.seek(offset)
                digest.update(stream.read(min(_HEAD, nbytes)))
    except OSError as error:
        raise FileMissingError(f"can't be read: {system_reason(error)}", file=path) from None


def sha256_file(path: Path) -> str:
    """sha256 of a whole file; what `hashed_meanwhile` has found for it is not computed again."""
    known = _known.pop(_identity(path), None)
    if known is not None:
        return known
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def hashed_meanwhile(path: Path) -> Iterator[None]:
    """Computes a finished file's sha256 while the block waits for its device; for whoever asks next, under any name.

    Only for files that nobody changes any more.
    """
    if path.stat().st_size < _WORTHWHILE:
        yield
        return

    def compute() -> None:
        with contextlib.suppress(OSError):  # then whoever asks computes it
            found = sha256_file(path)
            _known.clear()
            _known[_identity(path)] = found

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        thread.join()


_known: dict[tuple[int, ...], str] = {}
"""Of the file that was written last, if it was large."""


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

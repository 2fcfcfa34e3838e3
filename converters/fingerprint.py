"""What tells one model or adapter from another without reading all of it."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from converters.copying import begin_flush
from converters.errors import FileMissingError, system_reason
from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader
from converters.safetensors_file import SafetensorsFile

_HEAD = 4096
_CHUNK = 1 << 20
_WORTHWHILE = 16 << 20  # bytes
_BEHIND = 1 << 18  # bytes that are read again at a time: they stay in the processor's cache
_STRIDE = 64 << 20  # bytes after which those that are written are sent to the device
_MOST_KNOWN = 4096  # files


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
            _remember(path, found)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@contextlib.contextmanager
def hashed_behind(file: BinaryIO, size: int) -> Iterator[Callable[[int], None]]:
    """Computes a file's sha256 while it is written from front to back, in a thread that reads behind the writing; for
    whoever asks next, under any name. The thread also has the system begin to bring the file to its device.

    Gives what is to be called with a number of bytes, from the first on, that are written; they are flushed then.

    Args:
        size: about what it will have: a small file is read again at once.
    """
    if size < _WORTHWHILE:
        yield _nothing
        return
    behind = _Behind(Path(file.name))
    behind.start()
    try:
        yield lambda count: _told(file, behind, count)
        _told(file, behind, file.tell())
    finally:
        behind.stop()
    if behind.hashed == behind.path.stat().st_size:
        _remember(behind.path, behind.digest.hexdigest())


class _Behind(threading.Thread):
    """Reads what is written of a file, until it is stopped."""

    def __init__(self, path: Path) -> None:
        super().__init__(name="hash")
        self.path, self.digest, self.hashed = path, hashlib.sha256(), 0
        self._written, self._stopped, self._change = 0, False, threading.Condition()

    def written(self, count: int) -> None:
        with self._change:
            self._written = count
            self._change.notify()

    def stop(self) -> None:
        """Waits until it has read what was written."""
        with self._change:
            self._stopped = True
            self._change.notify()
        self.join()

    def run(self) -> None:
        buffer, sent = memoryview(bytearray(_BEHIND)), 0
        with contextlib.suppress(OSError), self.path.open("rb", buffering=0) as stream:  # then whoever asks computes it
            while (ready := self._ready()) > self.hashed:
                while self.hashed < ready and (count := stream.readinto(buffer[: ready - self.hashed])):
                    self.digest.update(buffer[:count])
                    self.hashed += count
                if self.hashed < ready:
                    return
                if ready - sent >= _STRIDE:
                    begin_flush(stream, sent, ready - sent)
                    sent = ready

    def _ready(self) -> int:
        """How many bytes are written, once there are more than are hashed; or no more will come."""
        with self._change:
            self._change.wait_for(lambda: self._written > self.hashed or self._stopped)
            return self._written


def _told(file: BinaryIO, behind: _Behind, count: int) -> None:
    file.flush()
    behind.written(count)


def _nothing(count: int) -> None:
    """For a file that nobody hashes yet."""


_known: dict[tuple[int, ...], str] = {}
"""Of files that were written and not asked for yet."""


def _remember(path: Path, found: str) -> None:
    while len(_known) >= _MOST_KNOWN:
        del _known[next(iter(_known))]
    _known[_identity(path)] = found


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

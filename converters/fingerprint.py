"""What tells one model or adapter from another without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from converters.safetensors_file import SafetensorsFile

_HEAD = 4096


def fingerprint(files: Iterable[SafetensorsFile], extra: bytes = b"") -> str:
    """sha256 over the header and the first 4 KiB of every tensor of every file, in order.

    Args:
        files: in the order of their names.
        extra: bytes that belong to the meaning (an adapter's configuration), hashed first.
    """
    digest = hashlib.sha256(extra)
    for file in files:
        _add(digest, file)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, file: SafetensorsFile) -> None:
    with file.path.open("rb") as stream:
        digest.update(stream.read(file.header.nbytes))
        for name, info in file.infos.items():
            stream.seek(file.header.offsets[name])
            digest.update(stream.read(min(_HEAD, info.nbytes)))


def sha256_file(path: Path) -> str:
    """sha256 of a whole file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

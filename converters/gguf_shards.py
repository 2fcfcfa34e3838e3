"""Models split over several GGUF files, `name-00001-of-00003.gguf` and so on, named by their first."""

from __future__ import annotations

import re
from pathlib import Path

from converters.errors import FormatError
from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader

MAX_SHARDS = 4096
"""More files than any model is split into."""

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
"""What says which part of a model a shard is."""

_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def shard_name(target: Path, number: int, count: int) -> str:
    """What a shard of a model that was to be `target` is called; numbers begin with 1."""
    return f"{_prefix(target)}-{number:05}-of-{count:05}.gguf"


def is_shard_of(target: Path, name: str) -> bool:
    """Whether a file name is that of a shard, one of however many, of a model that was to be `target`."""
    match = _NAME.fullmatch(name)
    return match is not None and match["prefix"] == _prefix(target)


def _prefix(target: Path) -> str:
    return target.stem if target.suffix.lower() == ".gguf" else target.name


def read_gguf_headers(path: str | Path, what: str = "GGUF file") -> tuple[GgufHeader, ...]:
    """The headers of a file, or of all shards where it is the first of several.

    Raises:
        FileMissingError: a shard can't be read.
        FormatError: see `read_gguf_header`; or it is another than the first shard, is not named as one, or
            two shards hold the same tensor.
    """
    first = read_gguf_header(path, what)
    count = first.value("split.count")
    if not isinstance(count, int) or count < 2:
        return (first,)
    if count > MAX_SHARDS:
        raise FormatError(f"claims to be split into {count} files; at most {MAX_SHARDS} are read", file=path)
    place = first.value("split.no")
    if place != 0:
        told = f"is shard {place + 1} of {count}" if type(place) is int else f"is one of {count} shards"
        raise FormatError(f"{told}; name the first shard", file=path)
    match = _NAME.fullmatch(first.path.name)
    if match is None or (int(match["number"]), int(match["count"])) != (1, count):
        raise FormatError(f"is split into {count} files, so its name must end in -00001-of-{count:05}.gguf", file=path)
    headers = [first]
    seen = set(first.tensors)
    for number in range(2, count + 1):
        shard = first.path.with_name(f"{match['prefix']}-{number:05}-of-{count:05}.gguf")
        header = read_gguf_header(shard, f"shard {number} of {count}")
        for name in header.tensors:
            if name in seen:
                raise FormatError("stands in an earlier shard too", file=shard, tensor=name)
        seen.update(header.tensors)
        headers.append(header)
    return tuple(headers)

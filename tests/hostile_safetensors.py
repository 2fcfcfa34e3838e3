"""safetensors files, indices and configurations that lie."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_files import (
    PAIRS,
    WEIGHTS,
    Case,
    of_weights,
    safetensors,
    sound_safetensors,
    table_of,
    write_directory,
)

BOTH, MODEL, ADAPTER = ("model", "adapter"), ("model",), ("adapter",)
MB = 1 << 20
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def header(table: Any, data: int = 4) -> Callable[[Path, str], Path]:
    return of_weights(lambda _: safetensors(table, data))


def one(**changed: Any) -> Callable[[Path, str], Path]:
    return header({"a": F32 | changed})


def long_header(start: str, item: str, end: str, size: int = 31 * MB) -> Callable[[Path, str], Path]:
    """A header of `size` bytes at most, filled with one item."""
    return of_weights(lambda _: safetensors((start + item * ((size - 100) // len(item.encode())) + end).encode()))


def numbered(count: int, last: str = "") -> bytes:
    """A header of that many empty tensors."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"{number}":{entry}' for number in range(count)) + last + "}").encode()


def renamed(name: str) -> Callable[[Path, str], Path]:
    """The sound tensors, one of them under another name, in both halves where there are two."""

    def make(role: str) -> bytes:
        shapes = PAIRS if role == "adapter" else WEIGHTS
        old = "layers.0.mlp.up_proj"
        return safetensors(table_of({own.replace(old, name): shape for own, shape in shapes.items()}), 65536 * 20)

    return of_weights(lambda role: fitted(make(role)))


def fitted(data: bytes) -> bytes:
    """The file with as many zeros for data as its header says."""
    (length,) = struct.unpack_from("<Q", data)
    table = json.loads(data[8 : 8 + length])
    return data[: 8 + length] + bytes(max(entry["data_offsets"][1] for entry in table.values()))


def linked(directory: Path, name: str) -> dict[str, str]:
    """An index whose one shard is a link."""
    (directory / "loop.safetensors").symlink_to(name)
    return dict.fromkeys(WEIGHTS, "loop.safetensors")


def in_place(file: str, make: Callable[[Path], object]) -> Callable[[Path, str], Path]:
    """A directory in which one file is something else."""

    def write(directory: Path, role: str) -> Path:
        write_directory(directory, role)
        name = file if role != "adapter" else {"config.json": "adapter_config.json"}.get(file, f"adapter_{file}")
        (directory / name).unlink(missing_ok=True)
        make(directory / name)
        return directory

    return write


def mlx(**parameters: Any) -> Callable[[Path, str], Path]:
    def write(directory: Path, role: str) -> Path:
        (directory / "adapter_config.json").write_text(json.dumps({"lora_parameters": parameters}))
        (directory / "adapters.safetensors").write_bytes(sound_safetensors(role))
        return directory

    return write


def sparse(size: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


HEADERS = {
    "no file": Case(of_weights(lambda _: b""), BOTH, "0 bytes"),
    "seven bytes": Case(of_weights(lambda _: b"\2\0\0\0\0\0\0"), BOTH, "7 bytes"),
    "header of 2^63": Case(of_weights(lambda _: struct.pack("<Q", 1 << 63) + b"{}"), BOTH, "9223372036854775808 bytes"),
    "header of 2^64 - 1": Case(of_weights(lambda _: b"\xff" * 8 + b"{}"), BOTH, "at most"),
    "header over 32 MB": Case(
        of_weights(lambda _: struct.pack("<Q", 32 * MB + 1) + b"{", 33 * MB), BOTH, "at most 33554432"
    ),
    "header past the end": Case(of_weights(lambda _: struct.pack("<Q", 1000) + b"{}"), BOTH, "truncated"),
    "header of nothing": Case(of_weights(lambda _: struct.pack("<Q", 0)), BOTH, "JSON"),
    "31 MB of blanks": Case(long_header("{", " ", "}"), BOTH, "no LoRA pairs|have no weight", sound=True),
    "31 MB of brackets": Case(long_header("", "[", ""), BOTH, "nested|values"),
    "31 MB of lists": Case(long_header('{"a":[', "[],", "[]]}"), BOTH, "values"),
    "31 MB of objects": Case(long_header('{"a":[', '{"":0},', "0]}"), BOTH, "values"),
    "31 MB of numbers": Case(long_header('{"a":[', "1,", "1]}"), BOTH, "values"),
    "31 MB of fractions": Case(long_header('{"a":[', "1.5e1,", "1]}"), BOTH, "values"),
    "31 MB of keys": Case(of_weights(lambda _: safetensors(numbered(500_000))), BOTH, "values"),
    "31 MB in one name": Case(long_header('{"', "1a", '":0}'), BOTH, "no object|name"),
    "31 MB in one pair's name": Case(
        of_weights(
            lambda _: fitted(
                safetensors(
                    table_of({f"base_model.model.{'1a' * (7 * MB)}.lora_{half}.weight": (4, 4) for half in "AB"})
                )
            )
        ),
        ADAPTER,
        "name",
    ),
    "31 MB in a type": Case(
        long_header('{"a":{"dtype":"', "\\u0001", '","shape":[1],"data_offsets":[0,4]}}'), BOTH, "type"
    ),
    "31 MB of wide letters": Case(long_header('{"__metadata__":{"a":"', "\U0001f642", '"}}'), BOTH, "ASCII"),
    "31 MB of a number": Case(long_header('{"a":', "9", "}"), BOTH, "JSON"),
    "shape of 31 MB": Case(
        long_header('{"a":{"dtype":"F32","shape":[', "9,", '9],"data_offsets":[0,4]}}'), BOTH, "values"
    ),
    "100,000 brackets": Case(header(b"[" * 100_000), BOTH, "nested"),
    "100,000 brackets, closed": Case(header(b'{"a":' * 100_000 + b"0" + b"}" * 100_000), BOTH, "values"),
    "500 brackets in a type": Case(
        header(b'{"a":{"dtype":' + b"[" * 500 + b"]" * 500 + b',"shape":[1],"data_offsets":[0,4]}}'), BOTH, "nested"
    ),
    "990 brackets in a type": Case(
        header(b'{"a":{"dtype":' + b"[" * 900 + b"]" * 900 + b',"shape":[1],"data_offsets":[0,4]}}'), BOTH, "nested"
    ),
    "number of 5000 digits": Case(header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), BOTH, "JSON"),
    "number of 4000 digits": Case(one(shape=[int("9" * 4000)]), BOTH, "sizes"),
    "1e999": Case(header(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'), BOTH, "sizes"),
    "NaN in a shape": Case(one(shape=[float("nan")]), BOTH, "sizes"),
    "true in a shape": Case(one(shape=[True]), BOTH, "sizes"),
    "negative size": Case(one(shape=[-1]), BOTH, "sizes"),
    "nine dimensions": Case(one(shape=[1] * 9), BOTH, "at most 8"),
    "shape wrapping to 4 bytes": Case(one(shape=[274177, 67280421310721]), BOTH, "needs"),
    "shape 2^62 squared": Case(one(shape=[1 << 62, 1 << 62]), BOTH, "needs"),
    "unknown type": Case(one(dtype="F99"), BOTH, "does not define"),
    "type as list": Case(one(dtype=["F32"]), BOTH, "does not define"),
    "entry as list": Case(header({"a": []}), BOTH, "no object"),
    "offsets backwards": Case(one(data_offsets=[4, 0]), BOTH, "data_offsets"),
    "offsets past the end": Case(one(data_offsets=[1 << 40, (1 << 40) + 4]), BOTH, "hole"),
    "hole": Case(header({"a": F32, "b": F32 | {"data_offsets": [8, 12]}}, 12), BOTH, "hole"),
    "overlap": Case(header({"a": F32, "b": F32 | {"data_offsets": [2, 6]}}, 6), BOTH, "overlaps"),
    "the same bytes twice": Case(header({"a": F32, "b": F32}), BOTH, "overlaps"),
    "bytes behind": Case(header({"a": F32}, 5), BOTH, "truncated or damaged"),
    "data cut": Case(of_weights(lambda role: sound_safetensors(role)[:-5]), BOTH, "truncated"),
    "key twice": Case(header(b'{"a":1,"a":2}'), BOTH, "stands twice"),
    "key twice, among 70,000": Case(
        of_weights(lambda _: safetensors(numbered(70_000, ',"69999":0'))), BOTH, "stands twice"
    ),
    "metadata of numbers": Case(header({"__metadata__": {"a": 1}, "b": F32}), BOTH, "object of strings"),
    "header is a list": Case(header([]), BOTH, "JSON object"),
    "no UTF-8": Case(header(b'{"\xff":0}'), BOTH, "UTF-8"),
    "half a surrogate in a name": Case(renamed("\ud800"), BOTH, "UTF-8|text|surrogate|have no"),
    "escapes in a name": Case(
        renamed("\x1b[2J\x1b]0;x\x07[red]\nb\u202e"), BOTH, "have no|neither a lora_A", sound=True
    ),
    "a zero in a name": Case(renamed("a\0b"), BOTH, "have no", sound=True),
}

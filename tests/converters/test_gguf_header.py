"""Oracles: what the gguf package and our own writer were told to write, and files packed by hand that lie."""

from __future__ import annotations

import ctypes
import io
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import ARRAY, BIG, F32, LITTLE, Q8_0, STRING, UINT8, UINT32, Packer, Tensor

from converters import gguf_file
from converters.errors import Error, FileMissingError, FormatError
from converters.fingerprint import fingerprint_gguf
from converters.ggml import QType
from converters.gguf_header import MAX_HEADER, MAX_STRINGS, read_gguf_header
from converters.gguf_metadata import GgufHeader
from converters.gguf_shards import read_gguf_headers
from converters.gguf_types import TENSOR_TYPES, Kind

VALUES = {
    "k.uint8": ("uint8", 200), "k.int8": ("int8", -5), "k.uint16": ("uint16", 60000), "k.int16": ("int16", -5),
    "k.uint32": ("uint32", 4_000_000_000), "k.int32": ("int32", -5), "k.float32": ("float32", 0.5),
    "k.uint64": ("uint64", 2**63), "k.int64": ("int64", -(2**62)), "k.float64": ("float64", 0.1),
    "k.bool": ("bool", True), "k.string": ("string", "grüße 🙂"), "k.ints": ("array", [1, -2, 3]),
    "k.floats": ("array", [0.5, -0.25]), "k.flags": ("array", [True, False]), "k.texts": ("array", ["", "a", "é"]),
}  # fmt: skip


def parsed(path: Path, data: bytes) -> GgufHeader:
    path.write_bytes(data)
    return read_gguf_header(path)


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_files_of_the_gguf_package(tmp_path: Path, order: gguf.GGUFEndian) -> None:
    path = tmp_path / "f.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    for key, (kind, value) in VALUES.items():
        getattr(writer, f"add_{kind}")(key, value)
    writer.add_tensor("a.weight", np.ones((3, 5), np.float32))
    writer.add_tensor("b.weight", np.ones((2, 3, 4), np.float16))
    writer.add_tensor("c.weight", np.zeros((4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(path)
    assert (header.version, header.byte_order) == (3, order.name.lower())
    assert {key: header.value(key) for key in VALUES} == {key: value for key, (_, value) in VALUES.items()}
    assert header.kind_of("k.float32") is Kind.FLOAT32 and header.entries["k.texts"].item is Kind.STRING
    assert header.kind_of("none") is None and header.value("none") is None
    tensors = [(t.name, t.shape, t.dtype, t.nbytes) for t in header.tensors.values()]
    assert tensors == [
        ("a.weight", (3, 5), "F32", 60),
        ("b.weight", (2, 3, 4), "F16", 48),
        ("c.weight", (4, 32), "Q8_0", 136),
    ]
    if order == gguf.GGUFEndian.LITTLE:
        offsets = {tensor.name: tensor.data_offset for tensor in gguf.GGUFReader(path).tensors}
        assert {name: tensor.offset for name, tensor in header.tensors.items()} == offsets


def test_files_of_our_own_writer(tmp_path: Path) -> None:
    stream = io.BytesIO()
    metadata = [("general.architecture", gguf_file.text("llama")), ("list", gguf_file.uint32s([7, 8]))]
    data = np.arange(6, dtype=np.float32).tobytes()
    gguf_file.write_gguf(stream, metadata, [gguf_file.TensorOut("w", (2, 3), QType.F32, lambda: data)])
    header = parsed(tmp_path / "f.gguf", stream.getvalue())
    assert (header.text("general.architecture"), header.value("list")) == ("llama", [7, 8])
    offset = header.tensors["w"].offset
    assert stream.getvalue()[offset : offset + 24] == data


@pytest.mark.parametrize("packer", [LITTLE, BIG])
@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_in_both_byte_orders(tmp_path: Path, packer: Packer, version: int) -> None:
    keys = [("general.alignment", packer.uint32(64)), ("t", packer.text("x"))]
    data = packer.file(keys, [Tensor("a", (2, 3)), Tensor("b", ())], version=version, alignment=64)
    header = parsed(tmp_path / "f.gguf", data)
    assert (header.version, header.byte_order) == (version, "little" if packer is LITTLE else "big")
    assert (header.alignment, header.data_start % 64, header.value("t")) == (64, 0, "x")
    assert [tensor.offset - header.data_start for tensor in header.tensors.values()] == [0, 64]
    assert header.tensors["b"].shape == () and header.tensors["b"].nbytes == 4


def test_the_tables_are_those_of_the_gguf_package() -> None:
    assert {kind.name: kind.value for kind in Kind} == {kind.name: kind.value for kind in gguf.GGUFValueType}
    ours = {number: (of.name, of.block, of.nbytes) for number, of in TENSOR_TYPES.items()}
    theirs = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    theirs[9] = ("Q8_1", 32, 36)  # ggml-common.h, block_q8_1: two halves and 32 bytes, not two floats
    assert {number: ours[number] for number in theirs} == theirs


@pytest.mark.llama
def test_the_table_of_types_is_libggml_s() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    lib = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    lib.ggml_type_size.restype, lib.ggml_blck_size.restype = ctypes.c_size_t, ctypes.c_int64
    for number, of in TENSOR_TYPES.items():
        assert (lib.ggml_blck_size(number), lib.ggml_type_size(number)) == (of.block, of.nbytes), of.name


def test_a_large_vocabulary_is_skipped_not_read(tmp_path: Path) -> None:
    count = 262_144
    tokens = LITTLE.array(STRING, [LITTLE.string(f"<token {number}>") for number in range(count)])
    path = tmp_path / "f.gguf"
    path.write_bytes(LITTLE.file([("tokens", tokens), ("scores", LITTLE.array(UINT32, [bytes(4 * count)], count))]))
    tracemalloc.start()
    header = read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert (header.entries["tokens"].count, header.entries["scores"].nbytes) == (count, 4 * count)
    assert header.value("tokens")[-1] == f"<token {count - 1}>"


def test_a_tensor_of_unknown_type_is_listed_with_the_room_it_has(tmp_path: Path) -> None:
    tensors = [Tensor("a", (8,), 77, nbytes=96), Tensor("b", (8,)), Tensor("c", (5,), 4, nbytes=10)]
    header = parsed(tmp_path / "f.gguf", LITTLE.file([], tensors))
    assert [(t.dtype, t.known, t.nbytes) for t in header.tensors.values()] == [
        ("type 77", False, 96),
        ("F32", True, 32),
        ("type 4", False, 32),
    ]


def test_tensors_without_elements_take_no_room(tmp_path: Path) -> None:
    header = parsed(tmp_path / "f.gguf", LITTLE.file([], [Tensor("a", (0, 4)), Tensor("b", (4,))]))
    assert [(t.nbytes, t.offset - header.data_start) for t in header.tensors.values()] == [(0, 0), (16, 0)]


P = LITTLE
LIES = {
    "nothing": (b"", "starts with b''"),
    "another format": (b"PK\3\4" * 9, "starts with b'PK"),
    "magic alone": (b"GGUF\3\0\0\0", "at least 24"),
    "version 1": (P.file(version=1), "version 1"),
    "version 2^31": (P.file(version=1 << 31), "version 2147483648"),
    "2^63 keys": (P.file(key_count=1 << 63), "claims 9223372036854775808 keys"),
    "5000 keys": (P.file(key_count=5000), "past the file's 24 bytes"),
    "2^63 tensors": (P.file(tensor_count=1 << 63), "claims 9223372036854775808 tensors"),
    "5000 tensors": (P.file(tensor_count=5000), "past the file's 24 bytes"),
    "array of 2^40": (P.file([("k", P.array(UINT8, [], 1 << 40))]), "1099511627776 items of 'k'"),
    "strings 2^40": (P.file([("k", P.array(STRING, [], 1 << 40))]), "1099511627776 strings of 'k'"),
    "strings 2^61": (P.file([("k", P.array(STRING, [], 1 << 61))]), "2305843009213693952 strings of 'k'"),
    "a string of 2^63": (P.file([("k", P.text("x", 1 << 63))]), "past the file's"),
    "2^63 in an array": (P.file([("k", P.array(STRING, [P.string("x", 1 << 63)]))]), "past the file's"),
    "2^64 - 8 in an array": (P.file([("k", P.array(STRING, [P.string("x", 2**64 - 8)]))]), "past the file's"),
    "a key of 2^63": (P.file() [:16] + P.u64(1) + P.string("x" * 20, 1 << 63), "9223372036854775808 bytes long"),
    "an empty key": (P.file([("", P.uint32(1))]), "0 bytes long"),
    "a key with a zero": (P.file([("a\0b", P.uint32(1))]), "zero byte"),
    "a key that is no text": (P.file([(b"\xff", P.uint32(1))]), "no UTF-8"),
    "a key twice": (P.file([("k", P.uint32(1)), ("k", P.uint32(2))]), "'k' twice"),
    "value type 13": (P.file([("k", P.u32(13) + bytes(8))]), "value type 13"),
    "item type 99": (P.file([("k", P.array(99, [bytes(8)]))]), "value type 99"),
    "nested arrays": (P.file([("k", P.array(ARRAY, [bytes(40)], 1))]), "array of arrays"),
    "alignment 0": (P.file([("general.alignment", P.uint32(0))]), "alignment is 0"),
    "alignment 48": (P.file([("general.alignment", P.uint32(48))]), "alignment is 48"),
    "alignment as text": (P.file([("general.alignment", P.text("32"))]), "stored as STRING"),
    "alignment 2^31": (P.file([("general.alignment", P.uint32(1 << 31))], [Tensor("a", (1,))]), "truncated"),
    "five dimensions": (P.file([], [Tensor("a", (1,) * 5)]), "5 dimensions"),
    "2^32 - 1 dimensions": (P.file([], [Tensor("a", (1,), dimensions=2**32 - 1)]), "4294967295 dimensions"),
    "dimension 2^63": (P.file([], [Tensor("a", (1 << 63,), nbytes=4)]), "overflows"),
    "product 2^64": (P.file([], [Tensor("a", (1 << 32, 1 << 32), nbytes=4)]), "overflows"),
    "overflow behind a 0": (P.file([], [Tensor("a", (1 << 40, 0, 1 << 40), nbytes=4)]), "overflows"),
    "more than the file": (P.file([], [Tensor("a", (1 << 20, 1 << 20), nbytes=4)]), "truncated or damaged"),
    "half a block": (P.file([], [Tensor("a", (2, 16), Q8_0)]), "no whole blocks of 32"),
    "offset 4": (P.file([], [Tensor("a", (4,), offset=4)]), "begins at 4, expected 0"),
    "offset 2^64 - 32": (P.file([], [Tensor("a", (4,), 77, 2**64 - 32, nbytes=16)]), "begins at"),
    "overlap": (P.file([], [Tensor("a", (9,)), Tensor("b", (8,), offset=32)]), "begins at 32, expected 64"),
    "hole": (P.file([], [Tensor("a", (8,)), Tensor("b", (8,), offset=64)]), "begins at 64, expected 32"),
    "before an unknown": (
        P.file([], [Tensor("a", (8,)), Tensor("b", (8,), 77, nbytes=32), Tensor("c", (8,), offset=0)]),
        "begins at 0, expected 32 or more",
    ),
    "past the end, after an unknown": (
        P.file([], [Tensor("b", (8,), 77, nbytes=32), Tensor("c", (8,), offset=1 << 40)]),
        "truncated or damaged",
    ),
    "a name twice": (P.file([], [Tensor("a", (8,)), Tensor("a", (8,))]), "stands twice"),
    "a name of 64 bytes": (P.file([], [Tensor("a" * 64, (8,))]), "64 bytes long, expected 1 to 63"),
    "a name of 2^63": (P.file([], [Tensor("a", (8,), name_length=1 << 63)]), "bytes long"),
    "a name with a zero": (P.file([], [Tensor("a\0b", (8,))]), "zero byte"),
    "data cut": (P.file([], [Tensor("a", (64,))])[:-40], "truncated or damaged"),
    "header cut": (P.file([("k", P.uint32(1))], [Tensor("a", (64,))])[:60], "truncated or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_told_apart_and_cost_nothing(tmp_path: Path, lie: str) -> None:
    data, told = LIES[lie]
    tracemalloc.start()
    with pytest.raises(FormatError, match=told) as caught:
        parsed(tmp_path / "f.gguf", data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.file == str(tmp_path / "f.gguf")
    assert peak < 1 << 20


def test_what_only_a_large_file_can_claim_is_bounded_too(tmp_path: Path) -> None:
    """The claims fit these (sparse) files, so only bounds of our own end them."""
    path = tmp_path / "f.gguf"
    for data, told in (
        (P.file([("k", P.array(UINT8, [], 1 << 30))]), f"longer than the {MAX_HEADER} bytes"),
        (P.file([("k", P.text("", 1 << 30))]), f"longer than the {MAX_HEADER} bytes"),
        (P.file([("k", P.array(STRING, [], MAX_STRINGS + 1))]), f"more than {MAX_STRINGS} strings"),
        (P.file(key_count=10**6), "claims 1000000 keys"),
        (P.file(tensor_count=10**6), "claims 1000000 tensors"),
    ):
        path.write_bytes(data)
        os.truncate(path, 4 << 30)
        with pytest.raises(FormatError, match=told):
            read_gguf_header(path)


def test_values_too_large_to_be_meant_are_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    path.write_bytes(P.file([("a", P.array(UINT8, [], 40 << 20))]))
    os.truncate(path, 50 << 20)
    header = read_gguf_header(path)
    assert header.entries["a"].count == 40 << 20
    with pytest.raises(FormatError, match="'a' holds 41943040 items"):
        header.value("a")


def test_a_value_of_the_wrong_type_and_one_that_is_no_text(tmp_path: Path) -> None:
    header = parsed(tmp_path / "f.gguf", P.file([("n", P.uint32(8)), ("t", P.text(b"a\xffb"))]))
    with pytest.raises(FormatError, match="'n' is stored as UINT32, expected STRING"):
        header.text("n")
    assert header.text("t") == "a\ufffdb" and header.text("none") is None


def test_a_file_that_changes_after_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    header = parsed(path, P.file([("k", P.array(STRING, [P.string("one"), P.string("two")]))]))
    path.write_bytes(path.read_bytes().replace(P.string("one"), P.string("one", 99)))
    with pytest.raises(FormatError, match="changed"):
        header.value("k")
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="changed"):
        header.value("k")
    path.unlink()
    with pytest.raises(FileMissingError):
        header.value("k")


def test_what_is_no_file(tmp_path: Path) -> None:
    loop, pipe = tmp_path / "loop", tmp_path / "pipe"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    for path in (tmp_path / "none", tmp_path, loop, pipe, Path("a\0b")):
        with pytest.raises(FileMissingError):
            read_gguf_header(path)


def test_the_fingerprint_is_the_header_and_the_head_of_every_tensor(tmp_path: Path) -> None:
    data = bytearray(P.file([("k", P.uint32(1))], [Tensor("a", (2000,)), Tensor("b", (4,))]))
    path = tmp_path / "f.gguf"
    header = parsed(path, bytes(data))
    first = fingerprint_gguf(header)
    assert fingerprint_gguf(path) == first
    start = header.tensors["a"].offset
    for place, seen in ((start + 4095, True), (start + 4096, False), (header.tensors["b"].offset, True), (32, True)):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert (fingerprint_gguf(path) != first) == seen


def shard(number: int, count: int, name: str) -> bytes:
    keys = [
        ("split.no", P.u32(2) + number.to_bytes(2, "little")),
        ("split.count", P.u32(2) + count.to_bytes(2, "little")),
    ]
    return P.file(keys, [Tensor(name, (4,))])


def test_split_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    for number, path in enumerate(paths):
        path.write_bytes(shard(number, 2, f"t{number}"))
    assert [list(header.tensors) for header in read_gguf_headers(paths[0])] == [["t0"], ["t1"]]
    with pytest.raises(FormatError, match="name the first shard"):
        read_gguf_headers(paths[1])
    renamed = tmp_path / "m.gguf"
    renamed.write_bytes(paths[0].read_bytes())
    with pytest.raises(FormatError, match="must end in -00001-of-00002"):
        read_gguf_headers(renamed)
    paths[1].write_bytes(shard(1, 2, "t0"))
    with pytest.raises(FormatError, match="earlier shard"):
        read_gguf_headers(paths[0])
    paths[1].unlink()
    with pytest.raises(FileMissingError, match="shard 2 of 2"):
        read_gguf_headers(paths[0])


def test_reading_a_header_imports_nothing_heavy() -> None:
    code = "import sys, converters.gguf_header; print(sorted({'torch', 'gguf', 'numpy'} & set(sys.modules)))"
    assert subprocess.run((sys.executable, "-c", code), check=True, capture_output=True).stdout.strip() == b"[]"


def test_errors_are_one_sentence_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(Error) as caught:
        parsed(tmp_path / "f.gguf", P.file([], [Tensor("blk.0.w", (9,), F32, offset=64)]))
    assert str(caught.value) == f"{tmp_path / 'f.gguf'}: blk.0.w: its data begins at 64, expected 0"

"""Oracles: the gguf package, which writes the files, turns their byte order and dequantizes; numpy's own types."""

from __future__ import annotations

import builtins
import mmap
import sys
import tracemalloc
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from gguf.scripts.gguf_convert_endian import byteswap_tensors, convert_byteorder
from gguf_bytes import BF16, BIG, F16, F32, F64, LITTLE, Packer, Tensor
from numpy.typing import NDArray

from converters import libggml
from converters.errors import FileMissingError, FormatError, UnsupportedError
from converters.ggml import QType
from converters.gguf_header import read_gguf_header
from converters.gguf_shards import read_gguf_headers
from converters.gguf_tensors import GgufTensors
from converters.gguf_types import TENSOR_TYPES

NATIVE, MIRRORED = (LITTLE, BIG) if sys.byteorder == "little" else (BIG, LITTLE)
QUANTIZED = {
    "q8": (QType.Q8_0, (6, 64)), "q4": (QType.Q4_0, (3, 96)), "q4k": (QType.Q4_K, (5, 512)),
    "q6k": (QType.Q6_K, (2, 3, 256)), "mx": (QType.MXFP4, (4, 32)), "iq": (QType.IQ4_XS, (3, 256)),
}  # fmt: skip
FLOATS = {
    "f32": (np.float32, (4, 6)),
    "f16": (np.float16, (2, 3, 8)),
    "f64": (np.float64, (2, 4)),
    "norm": ("f4", (9,)),
}


def stored_bytes(qtype: QType, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    kind = TENSOR_TYPES[qtype]
    rng = np.random.default_rng(qtype)
    return rng.integers(0, 256, (*shape[:-1], shape[-1] // kind.block * kind.nbytes), np.uint8)


def write_model(path: Path, shard: int = 0) -> None:
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=shard)
    rng = np.random.default_rng(1)
    for name, (dtype, shape) in FLOATS.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(dtype))
    writer.add_tensor("bf16", rng.integers(0, 0x7F00, (3, 4), np.uint16).view(np.uint8), raw_dtype=QType.BF16)
    for name, (qtype, shape) in QUANTIZED.items():
        writer.add_tensor(name, stored_bytes(qtype, shape), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def opened(path: Path) -> GgufTensors:
    return GgufTensors(read_gguf_headers(path))


def packed(
    path: Path, packer: Packer, tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]], align: int = 32
) -> Path:
    """A file with data, its bytes as given."""
    keys = [("general.alignment", packer.uint32(align))]
    listed = [Tensor(name, shape, qtype, nbytes=len(data)) for name, (qtype, shape, data) in tensors.items()]
    content = bytearray(packer.file(keys, listed, alignment=align))
    path.write_bytes(content)
    for name, tensor in read_gguf_header(path).tensors.items():
        data = tensors[name][2]
        content[tensor.offset : tensor.offset + len(data)] = data
    path.write_bytes(content)
    return path


def expected_values() -> dict[str, NDArray[np.float64]]:
    rng = np.random.default_rng(1)
    values = {name: rng.standard_normal(shape).astype(dtype) for name, (dtype, shape) in FLOATS.items()}
    bits = rng.integers(0, 0x7F00, (3, 4), np.uint16).astype(np.uint32) << 16
    values["bf16"] = bits.view(np.float32)
    for name, (qtype, shape) in QUANTIZED.items():
        with np.errstate(all="ignore"):
            values[name] = quants.dequantize(stored_bytes(qtype, shape), qtype)
    return values


DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "f64": torch.float64,
    "norm": torch.float32,
    "bf16": torch.bfloat16,
}


@pytest.fixture(params=["libggml", "numpy"])
def _arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(libggml, "library", lambda: None)


@pytest.mark.usefixtures("_arithmetic")
@pytest.mark.parametrize("shard", [0, 4])
def test_all_tensors_are_what_was_written(tmp_path: Path, shard: int) -> None:
    write_model(tmp_path / "model.gguf", shard)
    tensors = opened(tmp_path / ("model-00001-of-00003.gguf" if shard else "model.gguf"))
    expected = expected_values()
    assert set(tensors.infos) == set(expected)
    for name, values in expected.items():
        tensors.prefetch(name)
        loaded = tensors.load(name)
        assert loaded.dtype == DTYPES.get(name, torch.float32)
        np.testing.assert_array_equal(loaded.double().numpy(), values.astype(np.float64))
        assert tensors.infos[name].shape == values.shape
        matrix = values.reshape(-1, values.shape[-1]).astype(np.float64)
        for start, stop in ((0, 0), (0, 1), (len(matrix) // 2, len(matrix)), (len(matrix), len(matrix))):
            rows = tensors.rows(name, start, stop)
            assert rows.dtype == loaded.dtype
            np.testing.assert_array_equal(rows.double().numpy(), matrix[start:stop])
        if name in QUANTIZED:
            qtype, shape = QUANTIZED[name]
            stored = stored_bytes(qtype, shape)
            assert tensors.infos[name].dtype == qtype.name
            assert (tensors.blocks(name, 0, len(matrix)) == stored.reshape(len(matrix), -1)).all()
            assert (tensors.blocks(name, 1, 2) == stored.reshape(len(matrix), -1)[1:2]).all()


def test_each_tensor_knows_its_file(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", 4)
    tensors = opened(tmp_path / "model-00001-of-00003.gguf")
    reader = gguf.GGUFReader(tmp_path / "model-00002-of-00003.gguf")
    names = {tensor.name for tensor in reader.tensors}
    assert {name for name in tensors.infos if tensors.file_of(name).name == "model-00002-of-00003.gguf"} == names


def test_floats_share_the_files_pages_and_can_not_change_it(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf")
    before = (tmp_path / "model.gguf").read_bytes()
    tensors = opened(tmp_path / "model.gguf")
    first, second = tensors.load("f32"), tensors.rows("f32", 0, 2)
    assert first.data_ptr() == second.data_ptr()
    first.zero_()
    assert (tmp_path / "model.gguf").read_bytes() == before


@pytest.mark.usefixtures("_arithmetic")
def test_a_file_that_the_gguf_package_has_turned_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    turned = {name: values for name, values in QUANTIZED.items() if values[0] in byteswap_tensors}
    assert {"q8", "q4", "q4k", "q6k"} <= set(turned)
    monkeypatch.setitem(globals(), "QUANTIZED", turned)
    monkeypatch.delitem(FLOATS, "f64")
    write_model(path)
    expected = expected_values()
    monkeypatch.setattr(builtins, "input", lambda text: "YES")
    convert_byteorder(gguf.GGUFReader(path, "r+"), Namespace(order=_other(), dry_run=False))
    assert read_gguf_header(path).byte_order == _other()
    tensors = opened(path)
    for name, values in expected.items():
        np.testing.assert_array_equal(tensors.load(name).double().numpy(), values.astype(np.float64))
        rows = values.reshape(-1, values.shape[-1])[1:2].astype(np.float64)
        np.testing.assert_array_equal(tensors.rows(name, 1, 1 + len(rows)).double().numpy(), rows)
    for name, (qtype, shape) in turned.items():
        assert (
            tensors.blocks(name, 1, 2) == stored_bytes(qtype, shape).reshape(-1, tensors.blocks(name, 0, 1).size)[1]
        ).all()


def _other() -> str:
    return "big" if sys.byteorder == "little" else "little"


@pytest.mark.parametrize("packer", [LITTLE, BIG], ids=["little", "big"])
@pytest.mark.parametrize("align", [32, 1])
def test_floats_of_either_byte_order_lie_at_any_address(tmp_path: Path, packer: Packer, align: int) -> None:
    values = np.random.default_rng(2).standard_normal((3, 5))
    upper = values.astype(np.float32).view(np.uint32) >> 16
    tensors = opened(
        packed(
            tmp_path / "odd.gguf",
            packer,
            {
                "f64": (F64, (3, 5), values.astype(packer.order + "f8").tobytes()),
                "i8": (24, (1,), b"x"),
                "f32": (F32, (3, 5), values.astype(packer.order + "f4").tobytes()),
                "f16": (F16, (3, 5), values.astype(packer.order + "f2").tobytes()),
                "bf16": (BF16, (3, 5), upper.astype(packer.order + "u2").tobytes()),
            },
            align,
        )
    )
    for name, dtype in (("f64", np.float64), ("f32", np.float32), ("f16", np.float16)):
        np.testing.assert_array_equal(tensors.load(name).numpy(), values.astype(dtype))
        assert tensors.load(name).data_ptr() % np.dtype(dtype).itemsize == 0
        np.testing.assert_array_equal(tensors.rows(name, 1, 2).numpy(), values[1:2].astype(dtype))
        assert tensors.blocks(name, 2, 3).tobytes() == values[2].astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    np.testing.assert_array_equal(tensors.load("bf16").float().numpy(), (upper << 16).view(np.float32))


def test_other_types_in_the_other_byte_order_are_refused(tmp_path: Path) -> None:
    data = stored_bytes(QType.Q5_K, (2, 256)).tobytes()
    tensors = opened(packed(tmp_path / "big.gguf", MIRRORED, {"w": (QType.Q5_K, (2, 256), data)}))
    for read in (lambda: tensors.load("w"), lambda: tensors.rows("w", 0, 1), lambda: tensors.rows("w", 1, 2)):
        with pytest.raises(UnsupportedError, match=r"Q5_K in .*-endian order, .*gguf-convert-endian") as caught:
            read()
        assert (caught.value.file, caught.value.tensor) == (str(tmp_path / "big.gguf"), "w")


@pytest.mark.parametrize(("name", "qtype", "size"), [("I8", 24, 1), ("I16", 25, 2), ("I32", 26, 4), ("I64", 27, 8)])
def test_integers_are_no_weights(tmp_path: Path, name: str, qtype: int, size: int) -> None:
    tensors = opened(packed(tmp_path / "i.gguf", NATIVE, {"w": (qtype, (2, 3), bytes(6 * size))}))
    assert tensors.infos["w"].dtype == name
    with pytest.raises(UnsupportedError, match=f"stored as {name}; weights are") as caught:
        tensors.load("w")
    assert caught.value.tensor == "w"


@pytest.mark.parametrize("shape", [(0,), (0, 32), (4, 0), (2, 0, 32), (1 << 62, 0)])
@pytest.mark.parametrize("qtype", [F32, QType.Q8_0])
@pytest.mark.parametrize("align", [32, mmap.PAGESIZE])
def test_tensors_without_elements_at_the_end_of_the_file(
    tmp_path: Path, shape: tuple[int, ...], qtype: int, align: int
) -> None:
    tensors = opened(packed(tmp_path / "none.gguf", MIRRORED, {"w": (qtype, shape, b"")}, align))
    tensors.prefetch("w")
    assert tensors.load("w").shape == shape
    assert tensors.load("w").dtype == torch.float32


def test_a_tensor_without_dimensions_is_one_number(tmp_path: Path) -> None:
    tensors = opened(packed(tmp_path / "one.gguf", NATIVE, {"w": (F32, (), np.float32(2.5).tobytes())}))
    assert tensors.load("w").shape == ()
    assert tensors.load("w") == 2.5
    assert tensors.rows("w", 0, 1).tolist() == [[2.5]]


def test_an_unknown_type_is_refused_when_it_is_read(tmp_path: Path) -> None:
    known = ("k", (F32, (2, 2), bytes(16)))
    tensors = opened(packed(tmp_path / "new.gguf", NATIVE, dict([known, ("w", (77, (2, 32), bytes(40)))])))
    assert tensors.infos["w"].dtype == "type 77"
    assert tensors.load("k").shape == (2, 2)
    for read in (tensors.load, lambda name: tensors.blocks(name, 0, 1)):
        with pytest.raises(UnsupportedError, match=r"type 77, which this version of ggml.*update llama-cpp") as caught:
            read("w")
        assert (caught.value.file, caught.value.tensor) == (str(tmp_path / "new.gguf"), "w")


@pytest.mark.parametrize(
    ("shape", "cut", "told"),
    [((3, 512), 0, None), ((3, 500), 0, "256 elements of a row"), ((3, 512), 40, "room for")],
)
def test_a_type_that_only_libggml_knows_is_read_if_its_size_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], cut: int, told: str | None
) -> None:
    library = libggml.library()
    if library is None:
        pytest.skip("llama-cpp-python is not installed")
    stored = stored_bytes(QType.Q4_K, (3, 512))
    monkeypatch.delitem(TENSOR_TYPES, QType.Q4_K)
    data = stored.tobytes()[: stored.size - cut]
    tensors = opened(packed(tmp_path / "new.gguf", NATIVE, {"w": (QType.Q4_K, shape, data)}))
    assert tensors.infos["w"].dtype == "Q4_K"
    if told is None:
        np.testing.assert_array_equal(tensors.load("w").numpy(), quants.dequantize(stored, QType.Q4_K))
        assert (tensors.blocks("w", 2, 3) == stored[2]).all()
    else:
        with pytest.raises(FormatError, match=told) as caught:
            tensors.load("w")
        assert caught.value.tensor == "w"


@pytest.mark.parametrize("size", [0, 200, 1 << 20])
def test_a_file_of_another_size_than_its_header_saw_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.gguf"
    write_model(path)
    tensors = opened(path)
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(FormatError, match="changed while it was read"):
        tensors.load("f32")
    path.unlink()
    with pytest.raises(FileMissingError, match="no such file"):
        tensors.load("f32")


@pytest.mark.usefixtures("_arithmetic")
@pytest.mark.parametrize("packer", [LITTLE, BIG], ids=["little", "big"])
def test_a_few_rows_take_their_own_memory_and_no_more(tmp_path: Path, packer: Packer) -> None:
    rows, columns = 1024, 1024
    tensors = opened(
        packed(tmp_path / "wide.gguf", packer, {"w": (8, (rows, columns), bytes(rows * columns // 32 * 34))})
    )
    tensors.rows("w", 0, 1)  # imports what it needs
    tracemalloc.start()
    tensors.rows("w", 1000, 1016)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 4 * 16 * columns  # numpy's arithmetic takes several times the result; the whole is 64 times it

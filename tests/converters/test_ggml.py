"""Oracles: the gguf package's numpy arithmetic, bit by bit; libggml's own quantizer; the formulas of ggml-common.h."""

from __future__ import annotations

import _ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from gguf import quants
from numpy.typing import NDArray

from converters import ggml, libggml
from converters.errors import UnsupportedError
from converters.ggml import QType, block_of, decode, dequantize, encode
from converters.gguf_types import TENSOR_TYPES, TensorType

Q8_K, Q1_0, Q2_0 = 15, 41, 42
READ_BY_GGUF = [QType[kind.name] for kind in TENSOR_TYPES.values() if kind.name in (QType.__members__)]
READ_BY_GGUF = [qtype for qtype in READ_BY_GGUF if qtype in quants._type_traits and qtype != QType.BF16]
WRITTEN_BY_GGUF = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
RELATIVE_ERRORS = {
    "Q6_K": 0.018, "Q5_K": 0.036, "Q4_K": 0.071, "IQ4_NL": 0.077, "IQ4_XS": 0.077, "Q3_K": 0.15,
    "IQ3_S": 0.17, "IQ3_XXS": 0.22, "Q2_K": 0.30,
}  # fmt: skip
"""Of normal weights; the bits that a type has per weight allow no less."""


@pytest.fixture
def native() -> libggml.Library:
    library = libggml.library()
    if library is None:
        pytest.skip("llama-cpp-python is not installed")
    return library


@pytest.fixture
def numpy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libggml, "library", lambda: None)


@pytest.fixture(params=["native", "numpy_only"])
def either(request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(request.param)


def random_blocks(qtype: int, rows: int = 24, blocks: int = 6) -> NDArray[np.uint8]:
    """Any bytes are blocks of every type; some of the scales among them are infinite or NaN."""
    return np.random.default_rng(qtype).integers(0, 256, (rows, blocks * TENSOR_TYPES[qtype].nbytes), np.uint8)


def weights(rows: int = 32, columns: int = 1024) -> torch.Tensor:
    tensor = torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)) * 0.02
    tensor[1] = 0
    tensor[2] *= 1e-6
    tensor[3] = (tensor[3] * 400).round() / 2  # ties
    return tensor


def by_gguf(blocks: NDArray[np.uint8], qtype: QType) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return np.asarray(quants.dequantize(blocks, qtype))


def same_bits(ours: torch.Tensor, theirs: NDArray[np.float32]) -> bool:
    values = ours.numpy()
    assert ours.dtype == torch.float32 and values.shape == theirs.shape
    return bool(((values.view(np.int32) == theirs.view(np.int32)) | (np.isnan(values) & np.isnan(theirs))).all())


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("qtype", READ_BY_GGUF, ids=lambda qtype: qtype.name)
def test_every_type_is_dequantized_to_the_bits_that_the_gguf_package_gives(qtype: QType) -> None:
    blocks = random_blocks(qtype)
    assert same_bits(dequantize(blocks, qtype), by_gguf(blocks, qtype))


def test_the_types_under_test_are_all_but_those_that_no_file_or_no_package_has() -> None:
    missing = {kind.name for kind in TENSOR_TYPES.values() if kind.block > 1} - {qtype.name for qtype in READ_BY_GGUF}
    assert missing <= {"Q8_1", "Q8_K", "Q1_0", "Q2_0", "NVFP4"}  # the last since gguf 0.18


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("most", [1 << 30, 2048])
def test_shares_of_threads_make_the_same_whole(monkeypatch: pytest.MonkeyPatch, threads: int, most: int) -> None:
    monkeypatch.setattr(ggml, "_LEAST_SHARE", 512)
    monkeypatch.setattr(ggml, "_MOST_SHARE", most)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    blocks = random_blocks(QType.Q4_K, rows=37)
    out = torch.full((37, 1536), 7.0)
    assert dequantize(blocks, QType.Q4_K, out) is out
    assert same_bits(out, by_gguf(blocks, QType.Q4_K))
    assert encode(weights(), QType.Q4_0) == quants.quantize(weights().numpy(), QType.Q4_0).tobytes()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("qtype", [QType.Q6_K, QType.MXFP4], ids=lambda qtype: qtype.name)
def test_blocks_may_be_read_only_misaligned_strided_or_none(qtype: QType) -> None:
    blocks = random_blocks(qtype)
    expected = by_gguf(blocks, qtype)
    at_odd = np.frombuffer(b"x" + blocks.tobytes(), np.uint8, offset=1).reshape(blocks.shape)
    assert not at_odd.flags.writeable
    assert same_bits(dequantize(at_odd, qtype), expected)
    assert same_bits(dequantize(np.asfortranarray(blocks), qtype), expected)
    assert same_bits(dequantize(blocks[::3], qtype), expected[::3])
    assert dequantize(blocks[:0], qtype).shape == (0, expected.shape[1])
    assert dequantize(blocks[:, :0], qtype).shape == (len(blocks), 0)


def test_libggml_gets_its_16_bit_fields_at_even_addresses(
    native: libggml.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(native, "dequantizer", lambda _: lambda source, target, elements: given.append(source))
    buffer = np.zeros(4 * 144 + 1, np.uint8)
    for start in (0, 1):
        dequantize(buffer[start : start + 4 * 144].reshape(4, 144), QType.Q4_K)
    assert [address % 2 for address in given] == [0, 0]


def test_types_that_only_libggml_reads_follow_the_formulas_of_ggml_common(native: libggml.Library) -> None:
    rng = np.random.default_rng(1)
    scales, codes = rng.standard_normal(6).astype(np.float32), rng.integers(-128, 128, (6, 256), np.int8)
    blocks = np.concatenate([scales[:, None].view(np.uint8), codes.view(np.uint8), np.zeros((6, 32), np.uint8)], axis=1)
    np.testing.assert_array_equal(dequantize(blocks, Q8_K), scales[:, None] * codes)

    half, bits = scales.astype(np.float16)[:, None], rng.integers(0, 2, (6, 128), np.uint8)
    blocks = np.concatenate([half.view(np.uint8), np.packbits(bits, axis=1, bitorder="little")], axis=1)
    expected = half.astype(np.float32) * (2.0 * bits - 1)
    np.testing.assert_array_equal(dequantize(blocks, Q1_0), expected)
    assert native.dequantizer(9) is None  # Q8_1


@pytest.mark.usefixtures("numpy_only")
@pytest.mark.parametrize("qtype", [Q8_K, Q1_0, Q2_0])
def test_without_libggml_they_are_refused_by_name(qtype: int) -> None:
    with pytest.raises(UnsupportedError, match=f"stored as {TENSOR_TYPES[qtype].name}.*install llama-cpp-python"):
        dequantize(random_blocks(qtype), qtype)


@pytest.mark.usefixtures("native")
def test_with_libggml_a_type_that_nothing_reads_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Q8_1, which nothing here reads"):
        dequantize(random_blocks(9), 9)


@pytest.mark.usefixtures("either")
def test_numbers_are_types_only_if_ggml_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    for number in (4, 5, 31, 36, 1000, 2**31 - 1, 2**31, 2**32 - 1):  # dropped, not yet invented, negative
        assert block_of(number) is None
        with pytest.raises(UnsupportedError, match=f"type {number}, which this version of ggml does not know"):
            dequantize(np.zeros((1, 32), np.uint8), number)
    assert capfd.readouterr() == ("", "")


def test_a_type_that_only_libggml_knows_is_read(native: libggml.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(QType.Q4_K)
    expected = by_gguf(blocks, QType.Q4_K)
    for number, kind in list(TENSOR_TYPES.items()):
        monkeypatch.delitem(TENSOR_TYPES, number)
        assert block_of(number) in (kind, None)  # None: libggml is older than the table
    assert native.type_of(QType.Q4_K) == TensorType("Q4_K", 256, 144)
    assert same_bits(dequantize(blocks, QType.Q4_K), expected)


@pytest.mark.usefixtures("native")
def test_a_number_that_means_something_else_to_libggml_does_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TENSOR_TYPES, Q2_0, TensorType("Q2_0", 256, 18))
    with pytest.raises(UnsupportedError, match="Q2_0"):
        dequantize(np.zeros((1, 18), np.uint8), Q2_0)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("name", WRITTEN_BY_GGUF)
def test_quantizing_gives_the_bytes_of_the_gguf_package(name: str) -> None:
    stored = encode(weights(), QType[name])
    assert stored == quants.quantize(weights().numpy(), QType[name]).tobytes()
    blocks = np.frombuffer(stored, np.uint8).reshape(len(weights()), -1)
    assert same_bits(decode(stored, (4, 8, 1024), QType[name]).reshape(32, 1024), by_gguf(blocks, QType[name]))


@pytest.mark.usefixtures("either")
def test_floats_are_rounded_to_nearest_even() -> None:
    values = weights().numpy()
    assert encode(weights(), QType.F32) == values.tobytes()
    assert encode(weights(), QType.F16) == values.astype(np.float16).tobytes()
    assert encode(weights(), QType.BF16) == quants.quantize(values, QType.BF16).tobytes()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("name", "expected"), RELATIVE_ERRORS.items())
def test_quantizing_in_shares_is_libggmls_own_and_as_good_as_its_bits_allow(
    monkeypatch: pytest.MonkeyPatch, native: libggml.Library, name: str, expected: float
) -> None:
    monkeypatch.setattr(ggml, "_LEAST_SHARE", 4096)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    tensor = torch.randn(24, 512, generator=torch.Generator().manual_seed(6)) * 0.02
    stored = encode(tensor.reshape(4, 6, 512), QType[name])
    whole = np.empty(len(stored), np.uint8)
    native.quantize(QType[name], tensor.data_ptr(), whole.ctypes.data, start=0, rows=24, columns=512, importance=None)
    assert stored == whole.tobytes()
    read = by_gguf(whole.reshape(24, -1), QType[name])
    error = np.linalg.norm(read - tensor.numpy()) / np.linalg.norm(tensor.numpy())
    assert expected / 2 < error < 1.15 * expected


@pytest.mark.usefixtures("native")
def test_the_smallest_types_need_an_importance_matrix() -> None:
    tensor = weights(8, 512)
    for name in ("IQ2_XXS", "IQ2_XS", "IQ1_S"):
        with pytest.raises(UnsupportedError, match=f"{name} without an importance matrix"):
            encode(tensor, QType[name])
    stored = encode(tensor, QType.IQ2_XXS, torch.ones(512))  # the others would compute their tables for seconds
    read = by_gguf(np.frombuffer(stored, np.uint8).reshape(8, -1), QType.IQ2_XXS)
    assert np.linalg.norm(read - tensor.numpy()) < 0.5 * np.linalg.norm(tensor.numpy())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS", "Q4_0"])
def test_important_columns_come_out_closer(name: str) -> None:
    tensor = torch.randn(32, 512, generator=torch.Generator().manual_seed(7))
    importance = torch.ones(512)
    importance[::2] = 100
    plain, weighted = (
        decode(encode(tensor, QType[name], given), (32, 512), QType[name]) for given in (None, importance)
    )
    assert (weighted - tensor)[:, ::2].norm() < 0.95 * (plain - tensor)[:, ::2].norm()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("shape", [(0, 512), (3, 0)])
def test_nothing_is_quantized_to_nothing(shape: tuple[int, int]) -> None:
    assert encode(torch.empty(shape), QType.Q4_0) == b""


@pytest.mark.usefixtures("numpy_only")
def test_without_libggml_its_own_types_and_importance_can_not_be_written() -> None:
    with pytest.raises(UnsupportedError, match="stored as Q4_K, which only libggml writes: install"):
        encode(weights(), QType.Q4_K)
    with pytest.raises(UnsupportedError, match="stored as Q4_0 by an importance matrix, which only libggml"):
        encode(weights(), QType.Q4_0, torch.ones(1024))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("qtype", [QType.I32, QType.F64, QType.Q8_K], ids=lambda qtype: qtype.name)
def test_types_for_which_there_is_no_quantizer_are_refused(qtype: QType) -> None:
    with pytest.raises(UnsupportedError, match=f"stored as {qtype.name}, which"):
        encode(weights(), qtype)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_reach_libggml(value: float) -> None:
    tensor = weights()
    tensor[5, 5] = value
    with pytest.raises(UnsupportedError, match="not finite"):
        encode(tensor, QType.IQ2_XXS, torch.ones(1024))


def test_libggml_is_used_wherever_llama_cpp_is_installed_and_nothing_heavy_comes_with_it() -> None:
    program = (
        "import sys; from converters import libggml; found = libggml.library()\n"
        "print(found is not None, 'llama_cpp' in sys.modules, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    installed = importlib.util.find_spec("llama_cpp") is not None
    assert (done.stdout.split(), done.stderr) == ([str(installed), "False", "False", "False"], "")


@pytest.fixture
def fresh() -> None:
    libggml.library.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_a_library_that_does_not_load_is_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemError('imported')")
    file = package / "lib" / libggml._NAMES.get(sys.platform, "libggml-base.so")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    assert libggml.find_library() is None
    file.write_bytes(b"no library")
    assert libggml.find_library() == file
    blocks = random_blocks(QType.Q4_K)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))  # put there by somebody, without a spec
        assert libggml.find_library() is None
    try:
        assert libggml.library() is None
        assert same_bits(dequantize(blocks, QType.Q4_K), by_gguf(blocks, QType.Q4_K))
        libggml.library.cache_clear()
        monkeypatch.setattr(libggml, "find_library", lambda: Path(_ctypes.__file__))  # loads, has none of the functions
        assert libggml.library() is None
        libggml.library.cache_clear()
        monkeypatch.setattr(libggml, "find_library", lambda: None)
        assert libggml.library() is None
    finally:
        libggml.library.cache_clear()

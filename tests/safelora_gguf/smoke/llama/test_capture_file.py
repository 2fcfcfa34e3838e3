"""The file of captured inputs. Oracles: literal bytes; float64 for what a row loses; files cut and rearranged."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safelora_gguf.smoke.llama.capture_file import (
    ALIGNMENT,
    BrokenCaptureError,
    CaptureReader,
    CaptureWriter,
    halved,
    nbytes,
)
from safelora_gguf.smoke.protocol import InputGroup


def test_the_bytes_of_two_groups() -> None:
    stream = io.BytesIO()
    writer = CaptureWriter(stream, 3)
    plain = writer.add_group(width=2, slots=1, used=0)
    stack = writer.add_group(width=1, slots=2, used=2)
    values, scales = halved(np.array([[[2.0, -0.5]], [[0.0, 0.0]]], np.float32))
    writer.put(plain, 1, values, scales)
    values, scales = halved(np.array([[[3.0], [-1e9]]], np.float32))
    writer.put(stack, 0, values, scales, np.array([[7, 4]]))
    groups = writer.close([["a", "b"], ["c"]])
    assert groups == (InputGroup(("a", "b"), 2, 3, 1, 0, 0), InputGroup(("c",), 1, 3, 2, 2, ALIGNMENT))
    # 2 = 16384 * 2^-13; 3 = 24576 * 2^-13; 1e9 = 30517.578125 * 2^15, of which F16 keeps eleven bits
    first = struct.pack("<6e3f", 0, 0, 16384, -4096, 0, 0, 0, 2**-13, 1)
    second = struct.pack("<6e6f6i", 24576, -30512, 0, 0, 0, 0, 2**-13, 2**15, 0, 0, 0, 0, 7, 4, -1, -1, -1, -1)
    assert stream.getvalue() == first.ljust(ALIGNMENT, b"\0") + second


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, tuple[InputGroup, ...], Any]:
    random = np.random.default_rng(0)
    rows = (random.normal(size=(7, 2, 40)) * 10.0 ** random.integers(-9, 12, (7, 2, 1))).astype(np.float32)
    file = tmp_path / "inputs"
    with file.open("wb") as stream:
        writer = CaptureWriter(stream, 7)
        writer.add_group(width=3, slots=1, used=0)
        writer.add_group(width=40, slots=2, used=2)
        for first, last in ((4, 7), (0, 4)):
            writer.put(1, first, *halved(rows[first:last]), np.arange(2 * first, 2 * last).reshape(-1, 2))
        writer.drop(2, 3)
        groups = writer.close([["a"], ["b"]])
    return file, groups, rows


def test_what_is_read_is_what_was_written(written: tuple[Path, tuple[InputGroup, ...], Any]) -> None:
    """Up to half a unit of the eleventh bit, 2^-11; and to 2^-40 of the row's largest, where F16 has no more bits."""
    file, groups, rows = written
    reader = CaptureReader(file, groups)
    exact = rows.astype(np.float64)
    exact[2] = 0
    bound = np.maximum(np.abs(exact) * 2.0**-11, np.abs(exact).max(-1, keepdims=True) * 2.0**-39)
    assert (np.abs(reader.inputs(groups[1]) - exact) <= bound).all()
    for first, last in ((0, 0), (0, 1), (2, 5), (6, 7), (7, 7)):
        np.testing.assert_array_equal(reader.inputs(groups[1], first, last), reader.inputs(groups[1])[first:last])
    assert reader.experts(groups[1])[:, 0].tolist() == [0, 2, -1, 6, 8, 10, 12]
    assert (reader.inputs(groups[0]) == 0).all()
    assert reader.inputs(groups[0]).dtype == np.float32
    assert reader.experts(groups[0]).shape == (7, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_scale(value: float) -> None:
    _, scales = halved(np.array([[1.0, value], [1.0, 2.0]], np.float32))
    assert np.isnan(scales).tolist() == [True, False]


@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1.2e-38, 1e-20, 3.4e38])
def test_rows_at_the_ends_of_float32(largest: float) -> None:
    row = np.array([[largest, -largest / 2, 0]], np.float32)
    values, scales = halved(row)
    found = values.astype(np.float64) * scales[:, None].astype(np.float64)
    np.testing.assert_allclose(found, row.astype(np.float64), rtol=2.0**-11, atol=1e-41)


def test_a_file_that_is_not_what_its_groups_say(written: tuple[Path, tuple[InputGroup, ...], Any]) -> None:
    file, (first, second), _ = written
    data = file.read_bytes()
    for groups in (
        (second, first),
        (first, first, second),
        (first,),
        (first, replace(second, rows=8)),
        (first, replace(second, rows=6)),
        (first, replace(second, width=0)),
        (first, replace(second, rows=-1)),
        (first, replace(second, slots=3)),
        (first, replace(second, used=-2)),
        (first, replace(second, offset=second.offset + 1)),
        (first, replace(second, offset=0)),
        (first, replace(second, offset=-ALIGNMENT)),
        (first, replace(second, weights=())),
    ):
        with pytest.raises(BrokenCaptureError):
            CaptureReader(file, groups)
    for other in (data[:-1], data + b"\0", b""):
        file.write_bytes(other)
        with pytest.raises(BrokenCaptureError, match=f"{len(other)} bytes"):
            CaptureReader(file, (first, second))
    file.write_bytes(data)
    reader = CaptureReader(file, (first, second))
    file.write_bytes(data[: second.offset + 10])
    for read in (reader.inputs, reader.experts):
        with pytest.raises(BrokenCaptureError, match="ends within"):
            read(second)


def test_values_that_no_writer_makes_are_refused(written: tuple[Path, tuple[InputGroup, ...], Any]) -> None:
    """A scale or a value that is not finite would go on as numbers that are none."""
    file, groups, _ = written
    data = bytearray(file.read_bytes())
    scales = groups[1].offset + 7 * 2 * 40 * 2
    for place, spoilt in (
        (groups[1].offset, b"\x00\x7c"),
        (scales, b"\x00\x00\x80\x7f"),
        (scales, b"\x00\x00\xc0\x7f"),
    ):
        file.write_bytes(data[:place] + spoilt + data[place + len(spoilt) :])
        with pytest.raises(BrokenCaptureError, match="not finite"):
            CaptureReader(file, groups).inputs(groups[1])


def test_the_size_of_a_group() -> None:
    assert nbytes(rows=5, slots=2, width=7, used=2) == 5 * 2 * 7 * 2 + 5 * 2 * 4 + 5 * 2 * 4

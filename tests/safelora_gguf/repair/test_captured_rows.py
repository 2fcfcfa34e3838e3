"""Oracle: shares worked out by hand, the shared-out mean of the parts' own second moments in float64, numpy's slices of
the arrays that were written, and files that were cut or spoilt."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from converters.errors import Error, LlamaError, WriteError
from safelora_gguf.repair.reading.captured_rows import UNREAD, CapturedSet, JoinedRows
from safelora_gguf.smoke.llama.capture_file import CaptureWriter, halved
from safelora_gguf.smoke.protocol import InputGroup

Names = Sequence[Sequence[str]]


class NoRows:
    """In place of a reader where no values are asked for."""

    def inputs(self, group: InputGroup, first: int = 0, last: int | None = None) -> None:
        raise AssertionError

    def experts(self, group: InputGroup) -> None:
        raise AssertionError


NO_ROWS = NoRows()


def of_parts(*parts: Sequence[tuple[int, int]], shares: tuple[float, ...]) -> CapturedSet:
    """A set without values, of the item and fold of every row of every part."""
    items, folds = np.array([row for part in parts for row in part], np.int32).T
    lengths = tuple(map(len, parts))
    return CapturedSet(NO_ROWS, (), items, folds, int((items != UNREAD).sum()), lengths, shares)


@pytest.mark.parametrize(
    ("fold", "expected"),
    [
        (None, [0.4, 0.4, 0.05, 0.05, 0.05, 0.05]),
        (0, [0, 0.8, 0.1, 0, 0.1, 0]),
        (1, [0.8, 0, 0, 0.1, 0, 0.1]),
        (2, [0.4, 0.4, 0.05, 0.05, 0.05, 0.05]),
    ],
)
def test_a_part_has_its_share_however_many_rows_it_has(fold: int | None, expected: list[float]) -> None:
    found = of_parts([(0, 0), (1, 1)], [(2, 1), (3, 0), (4, 1), (5, 0)], shares=(0.8, 0.2))
    assert found.weights(fold).tolist() == pytest.approx(expected)
    assert found.weights(fold).dtype == np.float64


@pytest.mark.parametrize(
    ("fold", "expected"),
    [
        (0, [0, 0, 0, 1 / 4, 3 / 8, 3 / 8]),  # the first part's half goes to the others as 1 to 3
        (1, [1 / 4, 1 / 4, 0, 1 / 8, 3 / 8, 0]),
        (2, [2 / 7, 2 / 7, 0, 0, 0, 3 / 7]),  # 4 to 3
    ],
)
def test_a_part_without_rows_gives_its_share_to_the_others(fold: int, expected: list[float]) -> None:
    found = of_parts([(0, 0), (1, 0), (UNREAD, UNREAD)], [(2, 2)], [(3, 2), (4, 1)], shares=(0.5, 0.125, 0.375))
    assert found.weights(fold).tolist() == pytest.approx(expected)


def test_nothing_counts_where_no_row_is_left() -> None:
    found = of_parts([(0, 0), (UNREAD, UNREAD)], [(1, 0)], shares=(0.5, 0.5))
    assert found.weights(0).tolist() == [0, 0, 0]
    assert found.weights(None).tolist() == [0.5, 0, 0.5]


def test_one_part_alone_is_a_mean() -> None:
    items = np.array([0, 0, UNREAD, 1], np.int32)
    found = CapturedSet(NO_ROWS, (), items, items, 3)
    assert found.weights(None).tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert found.weights(1).tolist() == [0.5, 0.5, 0, 0]


def test_weighted_rows_give_the_shared_out_second_moment() -> None:
    lot = np.random.default_rng(3)
    x, folds = lot.standard_normal((12, 3)), lot.integers(3, size=12)
    rows = list(enumerate(folds.tolist()))
    found = of_parts(rows[:5], rows[5:], shares=(0.3, 0.7))
    for fold in (None, 0, 1, 2):
        used = np.ones(12, bool) if fold is None else folds != fold
        parts = [part[use] for part, use in zip(np.split(x, [5]), np.split(used, [5]), strict=True)]
        assert all(map(len, parts))
        expected = sum(share * (part.T @ part) / len(part) for share, part in zip((0.3, 0.7), parts, strict=True))
        assert np.allclose(x.T @ (found.weights(fold)[:, None] * x), expected, rtol=1e-12)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., tuple[Path, tuple[InputGroup, ...]]]:
    """Writes inputs (rows, slots, width) and experts (rows, used) under names."""

    def write(
        number: int, inputs: Sequence[npt.NDArray[np.float32]], names: Names, experts: Sequence[npt.NDArray[np.int32]]
    ) -> tuple[Path, tuple[InputGroup, ...]]:
        file = tmp_path / f"{number}.inputs"
        with file.open("wb") as stream:
            writer = CaptureWriter(stream, len(inputs[0]))
            for values, ids in zip(inputs, experts, strict=True):
                group = writer.add_group(width=values.shape[2], slots=values.shape[1], used=ids.shape[1])
                writer.put(group, 0, *halved(values), ids)
            return file, writer.close(names)

    return write


def captures(
    written: Callable[..., tuple[Path, tuple[InputGroup, ...]]],
    names: Sequence[Names] = ((("a", "b"), ("c",)), (("a", "b"), ("c",))),
) -> tuple[JoinedRows, list[npt.NDArray[np.float32]], list[npt.NDArray[np.int32]]]:
    """Two captures of 5 and 3 rows: an ordinary input and one of two experts; all values are exact in F16."""
    lot = np.random.default_rng(0)
    files, groups, wide, routed = [], [], [], []
    for number, rows in enumerate((5, 3)):
        inputs = [lot.integers(-99, 99, shape).astype(np.float32) for shape in ((rows, 1, 4), (rows, 2, 6))]
        ids = lot.integers(8, size=(rows, 2)).astype(np.int32)
        if names[number][0] == ("c",):
            file, own = written(number, inputs[::-1], names[number], [ids, ids[:, :0]])
        else:
            file, own = written(number, inputs, names[number], [ids[:, :0], ids])
        files.append(file)
        groups.append(own)
        wide.append(inputs)
        routed.append(ids)
    joined = [np.concatenate(parts) for parts in zip(*wide, strict=True)]
    return JoinedRows(files, groups), joined, routed


@pytest.mark.parametrize("second", [(("a", "b"), ("c",)), (("c",), ("b", "a"))])
def test_rows_follow_upon_each_other_whatever_the_order_in_the_files(
    written: Callable[..., tuple[Path, tuple[InputGroup, ...]]], second: Names
) -> None:
    rows, values, routed = captures(written, ((("a", "b"), ("c",)), second))
    first, last = rows.groups
    assert (first.weights, first.rows, first.width, first.used) == (("a", "b"), 8, 4, 0)
    assert (last.weights, last.rows, last.width, last.slots, last.used) == (("c",), 8, 6, 2, 2)
    for group, expected in zip(rows.groups, values, strict=True):
        assert (rows.inputs(group) == expected).all()
        for low in range(9):
            for high in range(low, 9):
                found = rows.inputs(group, low, high)
                assert found.shape == expected[low:high].shape and (found == expected[low:high]).all()
    assert (rows.experts(last) == np.concatenate(routed)).all()
    assert rows.experts(first).shape == (8, 0)


def test_weights_share_an_input_where_they_do_in_every_capture(
    written: Callable[..., tuple[Path, tuple[InputGroup, ...]]],
) -> None:
    value = np.ones((1, 1, 2), np.float32)
    no = np.empty((1, 0), np.int32)
    one = written(0, [value], [("a", "b", "c")], [no])
    two = written(1, [2 * value, 3 * value], [("b",), ("a", "c")], [no, no])
    rows = JoinedRows([one[0], two[0]], [one[1], two[1]])
    assert [group.weights for group in rows.groups] == [("a", "c"), ("b",)]
    assert [rows.inputs(group)[:, 0, 0].tolist() for group in rows.groups] == [[1, 3], [1, 2]]
    three = written(2, [np.ones((1, 1, 4), np.float32)], [("a", "b", "c")], [no])
    with pytest.raises(LlamaError, match="of several forms"):
        JoinedRows([one[0], three[0]], [one[1], three[1]])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda file: os.truncate(file, 10), LlamaError, "ends within the group"),
        (lambda file: file.write_bytes(b"\xff" * file.stat().st_size), LlamaError, "not finite"),
        (lambda file: file.unlink(), WriteError, "no such file or directory; run it again, or set TMPDIR"),
    ],
)
def test_a_file_that_is_spoilt_between_two_uses_is_told(
    written: Callable[..., tuple[Path, tuple[InputGroup, ...]]],
    tmp_path: Path,
    spoil: Callable[[Path], object],
    error: type[Error],
    message: str,
) -> None:
    rows, values, _ = captures(written)
    spoil(tmp_path / "1.inputs")
    assert (rows.inputs(rows.groups[0], 0, 5) == values[0][:5]).all()
    with pytest.raises(error, match=message) as told:
        rows.inputs(rows.groups[0], 4, 6)
    assert told.value.file == str(tmp_path / "1.inputs")
    if message != "not finite":
        with pytest.raises(error, match=message):
            rows.experts(rows.groups[1])


def test_a_file_that_is_not_what_was_said_is_told_at_once(
    written: Callable[..., tuple[Path, tuple[InputGroup, ...]]],
) -> None:
    file, groups = written(0, [np.ones((2, 1, 4), np.float32)], [("a",)], [np.empty((2, 0), np.int32)])
    os.truncate(file, 7)
    with pytest.raises(LlamaError, match=r"7 bytes.*run it again"):
        JoinedRows([file], [groups])
    file.unlink()
    with pytest.raises(WriteError, match="no such file"):
        JoinedRows([file], [groups])

"""Oracle: the rules of the contract, on cosines small enough to order by eye."""

from __future__ import annotations

import pytest

from converters.errors import UsageError
from safelora_gguf.selection import Selection, select

COSINES = {"a": 0.5, "b": 0.1, "zero update": None, "c": 0.3, "d": 0.1}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection("threshold", 0.3), {"b", "c", "d"}),
        (Selection("threshold", 0.09), set()),
        (Selection("number", 0), set()),
        (Selection("number", 1), {"b"}),
        (Selection("number", 3), {"b", "c", "d"}),
        (Selection("number", 99), {"a", "b", "c", "d"}),
        (Selection("ratio", 0.5), {"b", "d"}),
        (Selection("ratio", 0.6), {"b", "d"}),
        (Selection("ratio", 0.63), {"b", "d", "c"}),
        (Selection("ratio", 1.0), {"a", "b", "c", "d"}),
        (Selection("all"), {"a", "b", "c", "d"}),
    ],
)
def test_select(selection: Selection, expected: set[str]) -> None:
    assert select(COSINES, selection) == expected


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        ("threshold", None),
        ("threshold", 1.5),
        ("threshold", float("nan")),
        ("number", -1),
        ("number", 1.5),
        ("ratio", -0.1),
        ("ratio", 1.1),
    ],
)
def test_values_out_of_range_are_usage_errors(mode: str, value: float | None) -> None:
    with pytest.raises(UsageError):
        Selection(mode, value)  # type: ignore[arg-type]

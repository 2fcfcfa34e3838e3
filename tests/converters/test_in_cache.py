"""Oracles: the norms in float64, and torch's own rounding of the whole tensor at once."""

from __future__ import annotations

import math

import pytest
import torch

from converters import in_cache

SHAPES = [(1, 1), (3, 7), (70, 1000), (2, 40000), (0, 5)]


def values(shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * scale


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).square().sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_all_rows_once(shape: tuple[int, int]) -> None:
    rows = torch.arange(shape[0])
    found = [rows[some] for some in in_cache.pieces(shape)]
    assert torch.equal(torch.cat([rows[:0], *found]), rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_and_what_it_costs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    wanted, stored = values(shape), torch.empty(shape, dtype=dtype)
    lost, size = in_cache.rounded(wanted, stored)
    assert torch.equal(stored, wanted.to(dtype))
    assert lost == pytest.approx(off(stored, wanted), rel=1e-5)
    assert size == pytest.approx(off(wanted, torch.zeros(1)), rel=1e-5)
    assert in_cache.lost(stored.float(), wanted) == pytest.approx(lost)
    again = torch.empty(shape)
    assert in_cache.widened(stored, again) == pytest.approx(off(stored, torch.zeros(1)), rel=1e-5)
    assert torch.equal(again, stored.float())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_float32_are_told(scale: float) -> None:
    wide = values((4, 9), scale)
    assert in_cache.square(wide) == pytest.approx(off(wide, torch.zeros(1)), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_wherever_it_stands(bad: float) -> None:
    sound = values((3, 40000))
    assert in_cache.is_finite(sound)
    sound[2, 39999] = bad
    assert not in_cache.is_finite(sound)
    assert not math.isfinite(in_cache.square(sound))

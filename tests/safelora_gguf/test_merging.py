"""Kernels of merging against the formulas written out in float64, and against PEFT's DoRA where it has one."""

from __future__ import annotations

import pytest
import torch

from safelora_gguf.merging.kernels import add_update, column_squares, dora_factors, dora_rows, row_lengths

OUT, IN, RANK, SCALING = 24, 16, 3, 0.7


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(RANK, IN, generator=generator), torch.randn(OUT, RANK, generator=generator)


@pytest.mark.parametrize(("start", "stop"), [(0, OUT), (5, 6), (7, 20)])
def test_rows_of_a_weight(start: int, stop: int, weight: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = pair
    wanted = (weight.double() + SCALING * b.double() @ a.double())[start:stop]
    found = add_update(weight[start:stop].clone(), a, b, SCALING, start)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_rows_of_a_table_that_is_stored_turned_over(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, b = pair
    table = torch.randn(IN, OUT, generator=torch.Generator().manual_seed(3))
    wanted = (table.double() + SCALING * (b.double() @ a.double()).T)[4:9]
    found = add_update(table[4:9].clone(), a, b, SCALING, 4, transposed=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by_row", [True, False])
def test_dora(by_row: bool, weight: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """m / ||W + sBA|| (W + sBA), over rows or columns, put together from pieces."""
    a, b = pair
    axis, count = (1, OUT) if by_row else (0, IN)
    magnitude = 0.5 + torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    directed = weight.double() + SCALING * b.double() @ a.double()
    lengths = directed.norm(dim=axis, keepdim=True)
    wanted = (magnitude[:, None] if by_row else magnitude[None]) / lengths * directed
    update = add_update(torch.zeros_like(weight), a, b, SCALING, 0)
    pieces = [slice(0, 10), slice(10, OUT)]
    columns = sum((column_squares((weight + update)[piece]) for piece in pieces), torch.zeros(IN)).sqrt()
    found = []
    for piece in pieces:
        if by_row:
            factors = dora_factors(magnitude[piece], row_lengths((weight + update)[piece]))[:, None]
        else:
            factors = dora_factors(magnitude, columns)[None]
        found.append(dora_rows(weight[piece], update[piece], factors))
    torch.testing.assert_close(torch.cat(found).double(), wanted, rtol=1e-6, atol=1e-6)


def test_dora_that_changes_nothing_changes_no_bit(weight: torch.Tensor) -> None:
    """With B = 0 and lengths that are W's, W' is W: nothing cancels."""
    factors = dora_factors(row_lengths(weight), row_lengths(weight))[:, None]
    assert torch.equal(dora_rows(weight, torch.zeros_like(weight), factors), weight)


def test_a_padding_tokens_row_stays() -> None:
    zeros = torch.zeros(2, dtype=torch.float64)
    assert dora_factors(zeros, zeros).tolist() == [1.0, 1.0]

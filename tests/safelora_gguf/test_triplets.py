"""Oracle: torch.linalg.svd in float64, all of it, and the residual's formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

from safelora_gguf import triplets
from safelora_gguf.low_rank import times
from safelora_gguf.triplets import Triplets, leading_triplets

K, SIDE, TOLERANCE = 6, 300, 1e-3
SHAPES = [(300, 420), (420, 300), (300, 300)]
STEPS = torch.arange(SIDE, dtype=torch.float64)
SPECTRA = {
    "decaying": 0.8**STEPS,
    "decaying fast": 0.2**STEPS,
    "decaying slowly": (1 + STEPS) ** -0.5,
    "flat": 1 - 0.1 * STEPS / SIDE,
    "all equal": torch.ones(SIDE, dtype=torch.float64),
    "a cluster that k cuts": torch.where(STEPS < 20, 1.0, 0.5).double(),
    "a cluster up to k": torch.where(STEPS < K, 1.0, 0.98).double(),
    "signal over noise": torch.cat([torch.linspace(10, 2, 8).double(), 1 - 0.9 * STEPS[8:] / SIDE]),
}


def _matrix(shape: tuple[int, int], values: torch.Tensor) -> torch.Tensor:
    """Of these singular values, in float32."""
    generator = torch.Generator().manual_seed(shape[1])
    sides = (torch.randn(side, len(values), generator=generator, dtype=torch.float64) for side in shape)
    left, right = (torch.linalg.qr(side)[0] for side in sides)
    return ((left * values) @ right.T).float()


def _gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _part(found: Triplets) -> torch.Tensor:
    return (found.u.double() * found.singular_values) @ found.w.double().T


def _residual(v: torch.Tensor, found: Triplets) -> float:
    """The larger one of both sides."""
    u, w, wide = found.u.double(), found.w.double(), v.double()
    errors = (wide @ w - u * found.singular_values, wide.T @ u - w * found.singular_values)
    return max(float(error.norm(dim=0).max() / found.singular_values[0]) for error in errors)


def _separated(values: torch.Tensor, k: int) -> torch.Tensor:
    """Which of the first k are 1 % from both neighbours and no rounding."""
    gaps = (values[:-1] - values[1:]) / values[:-1]
    before = torch.cat([torch.ones(1, dtype=torch.float64), gaps])
    return (gaps[:k] > 0.01) & (before[:k] > 0.01) & (values[:k] > 1e-6 * values[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_residual_energy_and_values_against_the_exact_svd(shape: tuple[int, int], spectrum: str) -> None:
    v = _matrix(shape, SPECTRA[spectrum])
    exact = torch.linalg.svdvals(v.double())
    energy, best = exact.square().sum(), exact[:K].square().sum()

    found = leading_triplets(v, K)

    assert (found.u.shape, found.w.shape) == ((shape[0], K), (shape[1], K))
    assert found.residual <= TOLERANCE
    assert _residual(v, found) == pytest.approx(found.residual, abs=2e-6)
    assert float(best - found.singular_values.square().sum()) / float(best) < TOLERANCE
    missed = (v.double() - _part(found)).square().sum() - (energy - best)
    assert float(missed / best) < TOLERANCE
    separated = _separated(exact, K)
    assert torch.allclose(found.singular_values[separated], exact[:K][separated], rtol=1e-4, atol=0)
    assert found.r_align == pytest.approx(math.sqrt(float(best / energy)), rel=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["decaying", "decaying fast", "a cluster up to k", "signal over noise"])
def test_the_rank_k_part_is_the_svds_where_it_is_unique(shape: tuple[int, int], spectrum: str) -> None:
    v = _matrix(shape, SPECTRA[spectrum])
    u, s, wt = torch.linalg.svd(v.double(), full_matrices=False)
    exact = (u[:, :K] * s[:K]) @ wt[:K]
    assert float((_part(leading_triplets(v, K)) - exact).norm() / exact.norm()) < TOLERANCE


@pytest.mark.parametrize("k", [1, 30, 60, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_k_and_values_that_float32_products_do_not_resolve(shape: tuple[int, int], k: int) -> None:
    v = _matrix(shape, 0.8**STEPS)
    exact = torch.linalg.svdvals(v.double())
    found = leading_triplets(v, k)
    count = len(found.singular_values)
    assert count == min(k, int((exact > 1e-6 * exact[0]).sum()))
    assert torch.allclose(found.singular_values, exact[:count], rtol=1e-4, atol=0)
    assert torch.allclose(found.u.T @ found.u, torch.eye(count), atol=1e-5)
    assert torch.allclose(found.w.T @ found.w, torch.eye(count), atol=1e-5)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 90)])
def test_a_rank_above_the_true_one_gives_fewer_columns(shape: tuple[int, int]) -> None:
    v = _matrix(shape, torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))
    found = leading_triplets(v, K)
    assert (found.u.shape[1], len(found.singular_values), found.w.shape[1]) == (3, 3, 3)
    assert float((_part(found) - v.double()).norm() / v.double().norm()) < 1e-5
    assert found.r_align == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 5), (2, 5000), (600, 1)])
def test_tiny_and_thin_matrices(shape: tuple[int, int]) -> None:
    v = _gaussian(*shape)
    exact = torch.linalg.svdvals(v.double())
    found = leading_triplets(v, K)
    assert torch.allclose(found.singular_values, exact[:K], rtol=1e-6)
    assert _residual(v, found) < 1e-6
    assert found.iterations == 0


def test_equal_rows_and_columns() -> None:
    v = torch.ones(600, 800)
    v[:, 400:] = 3
    v[300:] = 0
    found = leading_triplets(v, K)
    assert len(found.singular_values) == 1
    assert torch.allclose(_part(found), v.double(), atol=1e-4)


@pytest.mark.parametrize("k", [K, 150])
@pytest.mark.parametrize("exponent", [-66, 66])
def test_scaling_by_a_power_of_two_changes_the_singular_values_alone(exponent: int, k: int) -> None:
    v = _matrix((300, 420), SPECTRA["decaying slowly"])
    plain, scaled = leading_triplets(v, k), leading_triplets(v * 2.0**exponent, k)
    assert torch.equal(scaled.u, plain.u)
    assert torch.equal(scaled.w, plain.w)
    assert torch.equal(scaled.singular_values, plain.singular_values * 2.0**exponent)
    assert (scaled.residual, scaled.r_align) == (plain.residual, plain.r_align)


def test_a_matrix_that_iteration_does_not_get_through_is_decomposed() -> None:
    v = _gaussian(400, 500)
    exact = torch.linalg.svdvals(v.double())[:20]
    for tolerance in (1e-3, 1e-6):
        found = leading_triplets(v, 20, tolerance=tolerance)
        assert found.iterations == 0
        assert found.residual <= tolerance
        assert torch.allclose(found.singular_values, exact, rtol=1e-5)


def test_a_flat_spectrum_is_iterated_while_that_is_cheaper() -> None:
    v = _gaussian(900, 900)
    exact = torch.linalg.svdvals(v.double())[:K]
    found = leading_triplets(v, K)
    assert found.iterations > 10  # past a restart
    assert _residual(v, found) <= TOLERANCE
    assert torch.allclose(found.singular_values, exact, rtol=1e-4)


def test_a_stall_shows_before_the_steps_that_it_may_cost_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    v, products = _gaussian(900, 900), []

    def counted(matrix: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        products.append(block.dtype)
        return times(matrix, block)

    monkeypatch.setattr(triplets, "times", counted)
    found = leading_triplets(v, K, tolerance=1e-13)
    assert (found.iterations, products.count(torch.float32)) == (0, 0)
    assert 2 * 9 <= len(products) < 2 * 28  # 9 steps tell a rate, 28 cost as much as what follows
    assert torch.allclose(found.singular_values, torch.linalg.svdvals(v.double())[:K], rtol=1e-10)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6, 1e-9])
def test_the_tolerance_is_kept(tolerance: float) -> None:
    v = _matrix((300, 420), SPECTRA["decaying slowly"])
    found = leading_triplets(v, K, tolerance=tolerance)
    assert found.residual <= tolerance
    assert _residual(v, found) <= max(tolerance, 1e-6)  # u and w come back in float32


def test_a_known_norm_is_taken_at_its_word() -> None:
    v = _matrix((300, 420), SPECTRA["decaying slowly"])
    norm = float(v.double().norm())
    assert leading_triplets(v, K, norm=2 * norm).r_align == pytest.approx(leading_triplets(v, K).r_align / 2, rel=1e-6)


def test_equal_inputs_give_equal_triplets_whatever_the_global_seed() -> None:
    v = _matrix((420, 300), SPECTRA["decaying slowly"])
    torch.manual_seed(1)
    first = leading_triplets(v, K)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = leading_triplets(v, K)
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.w, second.w)
    assert torch.equal(first.singular_values, second.singular_values)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.u, leading_triplets(v, K, seed=1).u)

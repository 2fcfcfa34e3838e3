"""The repaired A, in both spaces and over wide ranges of conditions.

Oracle: numpy's least squares in float64 (LAPACK's gelsd, by singular values) of the rows that the objective sums,
[G / sqrt(N_G); sqrt(ridge) I; sqrt(mu / N_H) H] against [G A^T / sqrt(N_G); sqrt(ridge) A^T; 0]; for what is kept, the
dense products in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safelora_gguf.repair.solving.closed_form import IllConditionedError, Solution, kept, moments, repaired_a, weighted

FLOAT32 = 2.0**-24
SPACES = {"inputs": (300, 200, 96), "tokens": (70, 50, 256), "square": (90, 66, 156), "large": (700, 400, 1024)}


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(kind: str, rows: int, width: int, seed: int) -> torch.Tensor:
    """Rows with a falling spectrum, one basis for all seeds."""
    basis = torch.linalg.qr(noise(0, width, width))[0] * torch.arange(1, width + 1)[:, None] ** -0.5
    x = noise(seed, rows, width) @ basis
    if kind == "repeated":
        x[rows // 2 :] = x[: rows - rows // 2]
    if kind == "outlier":
        x[:, 7] *= 1000
    if kind == "massive row":
        x[0] *= 300
    return x


def least_squares(a: torch.Tensor, g: torch.Tensor, h: torch.Tensor, mu: float, ridge: float) -> np.ndarray:
    a64, g64, h64 = (one.double().numpy() for one in (a, g, h))
    rows, right = [np.sqrt(ridge) * np.eye(a.shape[1])], [np.sqrt(ridge) * a64.T]
    if len(g):
        rows.append(g64 / np.sqrt(len(g)))
        right.append(g64 @ a64.T / np.sqrt(len(g)))
    if len(h):
        rows.append(np.sqrt(mu / len(h)) * h64)
        right.append(np.zeros((len(h), len(a))))
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(right), rcond=None)[0].T


def solve(a: torch.Tensor, g: torch.Tensor, h: torch.Tensor, mu: float, ridge: float) -> Solution:
    seen = moments(torch.cat([h, g]), [len(h), len(g)])
    return repaired_a(a, weighted(seen, [0, 1 / max(1, len(g))], [1 / max(1, len(h)), 0]), mu, ridge=ridge)


def ridge_of(g: torch.Tensor, eps: float) -> float:
    return eps * float(g.double().square().sum()) / g.numel()


def check(found: torch.Tensor, a: torch.Tensor, expected: np.ndarray, bound: float = 1e-4) -> None:
    change = expected - a.double().numpy()
    error = float(np.linalg.norm(found.double().numpy() - expected))
    assert error <= bound * np.linalg.norm(expected)
    assert error <= bound * np.linalg.norm(change) + 2 * FLOAT32 * float(a.norm())  # A' itself is in float32


@pytest.mark.parametrize("mu", [0.01, 2.0, 64.0, 1000.0])
@pytest.mark.parametrize("eps", [1e-3, 0.1])
@pytest.mark.parametrize("kind", ["plain", "repeated", "outlier", "massive row"])
@pytest.mark.parametrize("space", ["inputs", "tokens", "square"])
def test_a_is_the_least_squares_solution(space: str, kind: str, eps: float, mu: float) -> None:
    n_g, n_h, width = SPACES[space]
    g, h = inputs(kind, n_g, width, 1), inputs(kind, n_h, width, 2)
    a, ridge = noise(3, 16, width) * 0.05, ridge_of(g, eps)
    check(solve(a, g, h, mu, ridge).a, a, least_squares(a, g, h, mu, ridge))


@pytest.mark.parametrize("rank", [1, 64])
def test_ranks_and_more_rows_than_one_block(rank: int) -> None:
    n_g, n_h, width = SPACES["large"]
    g, h = inputs("plain", n_g, width, 1), inputs("plain", n_h, width, 2)
    a, ridge = noise(3, rank, width) * 0.05, ridge_of(g, 0.1)
    check(solve(a, g, h, 4.0, ridge).a, a, least_squares(a, g, h, 4.0, ridge))


@pytest.mark.parametrize("n_h", [40, 200])
def test_without_wanted_inputs_only_the_ridge_holds_a(n_h: int) -> None:
    h, a = inputs("plain", n_h, 96, 2), noise(3, 8, 96)
    nothing = torch.zeros(0, 96)
    check(solve(a, nothing, h, 2.0, 0.01).a, a, least_squares(a, nothing, h, 2.0, 0.01))


def test_without_unwanted_inputs_a_stays_bit_for_bit() -> None:
    g, a = inputs("plain", 50, 96, 1), noise(3, 8, 96)
    for rows, mu in ((torch.zeros(0, 96), 2.0), (inputs("plain", 40, 96, 2), 0.0)):
        found = solve(a, g, rows, mu, 0.1)
        assert torch.equal(found.a, a)
        assert found.error == 0


def test_inputs_too_ill_conditioned_for_float32_are_solved_all_the_same() -> None:
    g, h = inputs("outlier", 60, 256, 1), inputs("outlier", 50, 256, 2)
    g[:, 7] *= 100
    h[:, 7] *= 100
    a, ridge = noise(3, 8, 256), 1e-4
    check(solve(a, g, h, 100.0, ridge).a, a, least_squares(a, g, h, 100.0, ridge))


@pytest.mark.parametrize("width", [60, 400])
def test_a_part_without_weight_is_as_if_it_were_not_there(width: int) -> None:
    h, g, other = inputs("plain", 50, width, 2), inputs("plain", 80, width, 1), inputs("outlier", 30, width, 4)
    a, ridge = noise(3, 8, width), ridge_of(g, 0.1)
    seen = moments(torch.cat([h, other, g, other]), [50, 30, 80, 30])
    found = repaired_a(a, weighted(seen, [0, 0, 1 / 80, 0], [1 / 50, 0, 0, 0]), 3.0, ridge=ridge)
    check(found.a, a, least_squares(a, g, h, 3.0, ridge))


@pytest.mark.parametrize("width", [60, 400])
def test_several_weights_of_one_input_are_solved_together_each_as_exactly(width: int) -> None:
    h, g = inputs("plain", 50, width, 2), inputs("plain", 80, width, 1)
    drawn = ((3, 4, 1.0), (4, 1, 1e-6), (5, 16, 1e3))
    several, ridge = [noise(seed, rank, width) * size for seed, rank, size in drawn], ridge_of(g, 0.1)
    found = solve(torch.cat(several), g, h, 3.0, ridge).a
    for a, new in zip(several, torch.split(found, [4, 1, 16]), strict=True):
        check(new, a, least_squares(a, g, h, 3.0, ridge))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_may_be_stored_in_any_type(dtype: torch.dtype) -> None:
    h, g, a = inputs("plain", 50, 96, 2), inputs("plain", 80, 96, 1), noise(3, 8, 96).to(dtype)
    found = solve(a, g, h, 3.0, 0.01)
    assert found.a.dtype == torch.float32
    check(found.a, a, least_squares(a, g, h, 3.0, 0.01))


def test_what_is_told_of_the_error_is_no_less_than_the_error() -> None:
    g, h = inputs("plain", 300, 128, 1), inputs("plain", 200, 128, 2)
    a = noise(3, 16, 128)
    for mu, eps in ((0.1, 0.1), (2.0, 0.1), (64.0, 1e-3)):
        ridge = ridge_of(g, eps)
        found, expected = solve(a, g, h, mu, ridge), least_squares(a, g, h, mu, ridge)
        error = np.linalg.norm(found.a.double().numpy() - expected)
        change = np.linalg.norm(expected - a.double().numpy())
        assert error <= found.error * change + 2 * FLOAT32 * float(a.norm())


@pytest.mark.parametrize("n", [60, 20])
@pytest.mark.parametrize("mu", [1e4, 1e8, 1e10, 1e11, 1e12, 1e14])
@pytest.mark.parametrize("spanned", [False, True])
def test_what_is_accepted_is_right_to_a_thousandth_of_what_is_left(n: int, mu: float, spanned: bool) -> None:
    """Where little is left of A, that little; or there is no solution at all."""
    h, g = noise(1, n // 2, 32), noise(2, n // 2, 32)
    a = noise(3, 4, len(h)) @ h if spanned else noise(3, 4, 32)
    expected = least_squares(a, g, h, mu, 0.1)
    try:
        found = solve(a, g, h, mu, 0.1)
    except IllConditionedError:
        assert mu >= 1e8
        return
    errors = np.linalg.norm(found.a.double().numpy() - expected, axis=1)
    assert found.error <= 1e-3
    assert (errors <= 1e-3 * np.linalg.norm(expected, axis=1)).all()


def test_an_error_above_a_thousandth_is_told() -> None:
    h, g = noise(1, 30, 32), noise(2, 30, 32)
    with pytest.raises(IllConditionedError, match=r"its error may be \de[-+]\d\d of what"):
        solve(noise(3, 4, 32), g, h, 1e12, 0.1)


@pytest.mark.parametrize("kind", ["plain", "outlier", "massive row"])
@pytest.mark.parametrize("most", [0, 1 << 30])
def test_sums_of_parts_serve_as_well_as_the_parts(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safelora_gguf.repair.solving.closed_form._MOST_GRAMS", most)
    h, other, g = inputs(kind, 200, 96, 2), inputs("plain", 30, 96, 4), inputs(kind, 300, 96, 1)
    a, ridge = noise(3, 8, 96), ridge_of(g, 0.1)
    seen = moments(torch.cat([h, other, g]), [len(h), len(other), len(g)])
    sets = weighted(seen, [0, 0, 1 / len(g)], [1 / len(h), 0, 0])
    assert (len(seen.grams), sets.sums is None) == ((3, True) if most else (0, False))
    for mu in (0.5, 64.0):
        check(repaired_a(a, sets, mu, ridge=ridge).a, a, least_squares(a, g, h, mu, ridge))


def test_no_ridge_is_refused_and_so_are_inputs_that_are_not_finite() -> None:
    g, h, a = inputs("plain", 80, 96, 1), inputs("plain", 50, 96, 2), noise(3, 8, 96)
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="ridge"):
            solve(a, g, h, 2.0, ridge)
    h[3, 3] = float("inf")
    with pytest.raises(ArithmeticError, match="not finite"):
        solve(a, g, h, 2.0, 0.1)


def test_what_is_kept_of_an_update() -> None:
    a, new, b, x = noise(1, 8, 96), noise(2, 8, 96), noise(3, 40, 8), inputs("plain", 70, 96, 4)
    weights = torch.arange(70) / 7e3
    wide = [one.double() for one in (a, new, b, x * weights.sqrt()[:, None])]
    expected = (wide[2] @ wide[1] @ wide[3].T).norm() / (wide[2] @ wide[0] @ wide[3].T).norm()
    assert kept(a, new, b, x, weights) == pytest.approx(float(expected), rel=1e-5)
    assert kept(a, a, b, x, weights) == 1
    assert kept(a, torch.zeros_like(a), b, x, weights) == 0
    assert kept(a, new, torch.zeros_like(b), x, weights) is None
    assert kept(a, new, b, x[:0], weights[:0]) is None

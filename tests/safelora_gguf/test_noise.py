"""Oracles: the real rounding of known matrices by libggml, exact singular values, and sums written densely."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from gguf.quants import dequantize
from numpy.typing import NDArray
from real_rounding import rounded

from converters.rounding import rounding_variances
from safelora_gguf.noise import NoiseSums, directions_above, snr

Blocks = NDArray[np.uint8]
NAMES = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL"]
KINDS = ["normal", "rows of all scales", "outlier rows", "outlier columns", "uniform", "strong directions"]
SHAPES = [(512, 1024), (1024, 512), (256, 2048), (64, 256)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, which on a busy machine wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stored(weights: torch.Tensor, name: str | None, noise: NoiseSums) -> torch.Tensor:
    """The weights as a file of the type has them (None: as they are), in float64; adds their rounding to `noise`."""
    if name is None:
        return weights.double()
    blocks = rounded(weights.numpy(), name)
    half = len(blocks) // 2
    for start, part in ((0, blocks[:half]), (half, blocks[half:])):
        variances, run = rounding_variances(part, QType[name])
        noise.add(torch.from_numpy(variances), run, start)
    return torch.tensor(dequantize(blocks, QType[name]), dtype=torch.float64)


@cache
def weights(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    plain = 0.02 * torch.randn(shape, generator=generator)
    if kind == "rows of all scales":
        plain *= 10 ** (2 * torch.rand(shape[0], 1, generator=generator) - 1)
    elif kind == "outlier rows":
        plain[torch.randperm(shape[0], generator=generator)[: max(1, shape[0] // 100)]] *= 30
    elif kind.endswith("outlier columns"):
        factor = 10 if kind == "weak outlier columns" else 30
        plain[:, torch.randperm(shape[1], generator=generator)[: max(1, shape[1] // 100)]] *= factor
    elif kind == "uniform":
        plain = 0.06 * torch.rand(shape, generator=generator) - 0.03
    elif kind == "strong directions":
        plain += 0.2 * math.sqrt(max(shape)) * directions(shape, 3, 5)
    return plain


def directions(shape: tuple[int, int], k: int, seed: int) -> torch.Tensor:
    """U V^T for k random orthonormal directions on either side."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(side, k, generator=generator)).Q for side in shape)
    product: torch.Tensor = left @ right.T
    return product


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares: torch.Tensor = torch.linalg.eigvalsh(wide @ wide.T)
    return squares.flip(0).clamp(min=0).sqrt()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_less_its_own_rounding_has_no_direction(name: str, kind: str, shape: tuple[int, int]) -> None:
    original, noise = weights(kind, shape), NoiseSums(*shape)
    difference = stored(original, name, noise) - original.double()
    assert directions_above(singular_values(difference), noise.edge) == 0


@pytest.mark.parametrize("name", ["Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_XS", "MXFP4", "NVFP4"])
@pytest.mark.parametrize("kind", ["normal", "rows of all scales", "outlier rows", "weak outlier columns"])
def test_other_types_have_no_direction_either(name: str, kind: str) -> None:
    original, noise = weights(kind, (256, 512)), NoiseSums(256, 512)
    difference = stored(original, name, noise) - original.double()
    assert directions_above(singular_values(difference), noise.edge) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", [("Q8_0", "Q6_K"), ("Q4_K", "Q4_0"), ("IQ4_NL", "Q8_0")])
def test_two_roundings_of_one_matrix_have_no_direction(pair: tuple[str, str], kind: str) -> None:
    original, noise = weights(kind, (256, 512)), NoiseSums(256, 512)
    difference = stored(original, pair[0], noise) - stored(original, pair[1], noise)
    assert directions_above(singular_values(difference), noise.edge) == 0


@pytest.mark.parametrize("change", [1e-5, 1e-4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_rounding_after_a_tiny_change_has_no_direction(name: str, kind: str, change: float) -> None:
    original, noise = weights(kind, (256, 512)), NoiseSums(256, 512)
    tiny = change * torch.randn(256, 512, generator=torch.Generator().manual_seed(8))
    rounding = stored(original + tiny, name, noise) - stored(original, name, noise) - tiny.double()
    assert directions_above(singular_values(rounding), noise.edge) == 0


@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.parametrize("kind", ["normal", "rows of all scales", "outlier rows"])
@pytest.mark.parametrize("pair", [*((name, name) for name in NAMES), ("Q8_0", "Q4_K"), (None, "Q6_K")])
def test_planted_directions_are_counted(pair: tuple[str | None, str], kind: str, k: int) -> None:
    original, shape = weights(kind, (256, 512)), (256, 512)
    expected = NoiseSums(*shape)
    for name in pair:
        stored(original, name, expected)
    signal = 3 * expected.edge * directions(shape, k, 6)

    noise = NoiseSums(*shape)
    difference = stored(original + signal, pair[0], noise) - stored(original, pair[1], noise)

    assert noise.edge == pytest.approx(expected.edge, rel=0.2)
    assert directions_above(singular_values(difference), noise.edge) == k


@pytest.mark.parametrize(
    ("name", "low", "high"), [("Q8_0", 9.5, 11.5), ("Q6_K", 0.4, 1.1), ("Q4_K", 0, 0.05), ("Q4_0", 0, 0.05)]
)
def test_snr_of_a_typical_alignment_change(name: str, low: float, high: float) -> None:
    base, noise = weights("normal", (512, 1024)), NoiseSums(512, 1024)
    change = 5e-4 * torch.randn(512, 1024, generator=torch.Generator().manual_seed(4))
    v = stored(base + change, name, noise) - stored(base, name, noise)
    found = snr(float(v.norm()), noise.energy)
    assert found is not None
    assert low <= found <= high
    real = float(change.double().norm() ** 2 / (v - change).norm() ** 2)
    assert found <= 1.05 * real


def test_low_rank_change_stands_above_an_edge_that_hides_its_whole() -> None:
    """Why `subspace` can go on where `paper` refuses."""
    base, noise = weights("normal", (512, 1024)), NoiseSums(512, 1024)
    change = 0.02 * directions((512, 1024), 6, 9)
    v = stored(base + change, "Q8_0", noise) - stored(base, "Q8_0", noise)
    found = snr(float(v.norm()), noise.energy)
    assert found is not None
    assert found < 0.3
    assert directions_above(singular_values(v), noise.edge) == 6


@pytest.mark.parametrize("run", [1, 2, 32])
def test_sums_are_the_dense_ones(run: int) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(30, 64 // run, generator=generator), torch.rand(30, 64, generator=generator)
    dense = first.double().repeat_interleave(run, dim=1) + second.double()

    noise, at_once = NoiseSums(30, 64), NoiseSums(30, 64)
    for start in range(0, 30, 7):
        noise.add(first[start : start + 7], run, start)
        noise.add(second[start : start + 7], 1, start)
    at_once.add(dense.float(), 1)

    assert noise.energy == pytest.approx(float(dense.sum()), rel=1e-12)
    assert at_once.energy == pytest.approx(noise.energy, rel=1e-6)
    edge = float(dense.sum(dim=0).max().sqrt() + dense.sum(dim=1).max().sqrt())
    assert noise.edge == pytest.approx(1.1 * edge, rel=1e-12)


def test_transposing_v_changes_nothing() -> None:
    variances = torch.rand(40, 96, generator=torch.Generator().manual_seed(2))
    noise, mirrored = NoiseSums(40, 96), NoiseSums(96, 40)
    noise.add(variances, 1)
    mirrored.add(variances.T, 1)
    assert mirrored.energy == pytest.approx(noise.energy, rel=1e-12)
    assert mirrored.edge == pytest.approx(noise.edge, rel=1e-12)


def test_exact_references_have_no_noise() -> None:
    noise = NoiseSums(4, 8)
    assert noise.energy == 0
    assert noise.edge == 0
    assert snr(1.0, noise.energy) is None
    assert directions_above(torch.tensor([3.0, 1.0, 0.0]), noise.edge) == 2


@pytest.mark.parametrize(
    ("v_norm", "energy", "expected"), [(3, 1, 8.0), (1, 1, 0.0), (1, 4, 0.0), (1, math.inf, 0.0), (1, math.nan, 0.0)]
)
def test_snr_is_the_share_above_the_noise(v_norm: float, energy: float, expected: float) -> None:
    assert snr(v_norm, energy) == expected

"""Oracles: the real rounding of known weights, by libggml and gguf-py; and gguf-py's dequantize for the layouts."""

from __future__ import annotations

import warnings
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QType
from gguf.quants import dequantize
from numpy.typing import NDArray
from real_rounding import NUMBERS, libggml, rounded

from converters.errors import UnsupportedError
from converters.gguf_types import TENSOR_TYPES
from converters.rounding import has_rounding_estimate, is_exact, rounding_variances

Floats = NDArray[np.float32]
UNIFORM = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
CODEBOOKS = ["IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"]
LATTICES = ["IQ2_XXS", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"]
ROUNDED = {
    "IQ1_S": "de186d4ac708e1915f3df6b197467e57b0a19db946042a8667d3ce6374ccd536cd8eadfba3e8b7d601d552769c6748592e62",
    "IQ1_M": "6d4aeac6db915f8aa0b197ef7edb11a19db94c4f3186678dce63741cd536be8eddc5433a642aa9a62239bcc698d5561ce7dc6c69"
    "e79cac19",
    "IQ2_XS": "3c0e523e001000f123643f6a4431bc3f024e3b19a231f0fe91a400af93fe6c85c7ee52c000ee000f239a3f9444cfbcc102b03be7"
    "a2cff000915a005193006c7bc710bfa5876cbfa5876c",
    "IQ2_S": "1e0e6400eaf24bba280255f6c5dbdfdd4bab6400eaf24bba280255f6c5dbdfdd4bab1f8878b215188f230c18ffc2dfff4073e077"
    "874deae770dcf3e7003d2000bf8c10201611102016119fd5887b9fd5887b",
}
"""libggml 0.25.3's blocks of `normal_quantiles`, for the types whose tables take it seconds to set up."""
KINDS = ["normal", "rows of all scales", "outlier rows"]
SHAPES = [(512, 1024), (1024, 512), (256, 2048), (64, 256)]


def values(blocks: NDArray[np.uint8], name: str) -> Floats:
    if name not in {"Q1_0", "Q2_0"}:
        return dequantize(blocks, QType[name])
    kind = TENSOR_TYPES[NUMBERS[name]]
    floats = np.empty((len(blocks), blocks.shape[1] // kind.nbytes * kind.block), np.float32)
    getattr(libggml(), f"dequantize_row_{name.lower()}")(blocks.ctypes.data, floats.ctypes.data, floats.size)
    return floats


@cache
def weights(kind: str, shape: tuple[int, int]) -> Floats:
    random = np.random.default_rng(shape[0])
    plain = 0.02 * random.standard_normal(shape)
    if kind == "rows of all scales":
        plain *= 10 ** random.uniform(-1, 1, (shape[0], 1))
    elif kind == "outlier rows":
        plain[random.choice(shape[0], max(1, shape[0] // 100), replace=False)] *= 30
    elif kind == "outlier columns":
        plain[:, random.choice(shape[1], max(1, shape[1] // 100), replace=False)] *= 8
    return plain.astype(np.float32)


def energy(blocks: NDArray[np.uint8], name: str) -> float:
    variances, run = rounding_variances(blocks, NUMBERS[name])
    return run * float(variances.sum(dtype=np.float64))


def norm(matrix: Floats) -> float:
    return float(np.linalg.norm(matrix.astype(np.float64)))


@pytest.mark.parametrize("kind", [*KINDS, "outlier columns"])
@pytest.mark.parametrize("name", UNIFORM + CODEBOOKS)
def test_estimate_is_the_real_error_norm_within_20_percent(name: str, kind: str) -> None:
    original = weights(kind, (256, 1024))
    blocks = rounded(original, name)
    assert 0.9 < energy(blocks, name) ** 0.5 / norm(values(blocks, name) - original) < 1.2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL"])
def test_estimate_holds_for_every_shape(name: str, kind: str, shape: tuple[int, int]) -> None:
    original = weights(kind, shape)
    blocks = rounded(original, name)
    assert 0.95 < energy(blocks, name) ** 0.5 / norm(values(blocks, name) - original) < 1.2


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_estimate_holds_for_rounding_with_an_importance_matrix(name: str) -> None:
    original = weights("normal", (256, 1024))
    importance = np.random.default_rng(1).chisquare(1, 1024).astype(np.float32) + np.float32(0.05)
    blocks = rounded(original, name, importance)
    assert 0.9 < energy(blocks, name) ** 0.5 / norm(values(blocks, name) - original) < 1.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LATTICES)
def test_lattice_types_are_no_more_than_10_percent_understated(name: str, kind: str) -> None:
    original = weights(kind, (16, 512))
    blocks = rounded(original, name)

    def of_libggml(data: NDArray[np.uint8], qtype: int) -> Floats:
        return values(data, TENSOR_TYPES[qtype].name)

    variances, run = rounding_variances(blocks, NUMBERS[name], of_libggml)
    real = norm(values(blocks, name) - original)
    assert 0.9 < (run * float(variances.sum())) ** 0.5 / real < 1.2
    assert np.array_equal(variances, rounding_variances(blocks, NUMBERS[name])[0])


def normal_quantiles() -> Floats:
    """One row: 256 quantiles of the normal distribution in the order of the powers of 3 modulo 257."""
    order = [pow(3, power, 257) for power in range(256)]
    return np.array([[0.02 * NormalDist().inv_cdf((place - 0.5) / 256) for place in order]], np.float32)


@pytest.mark.parametrize("name", ROUNDED)
def test_lattice_types_of_slow_rounding_are_no_more_than_10_percent_understated(name: str) -> None:
    blocks = np.frombuffer(bytes.fromhex(ROUNDED[name]), np.uint8).reshape(1, -1)
    real = norm(values(blocks, name) - normal_quantiles())
    assert 0.9 < energy(blocks, name) ** 0.5 / real < 1.2


@pytest.mark.parametrize("change", [1e-5, 2e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pair",
    [("Q8_0", "Q8_0"), ("Q4_K", "Q4_K"), ("Q4_0", "Q4_0"), ("MXFP4", "MXFP4"), ("Q8_0", "Q6_K"), ("IQ4_NL", "Q5_K"),
     ("Q6_K", None), (None, "Q8_0")],
)  # fmt: skip
def test_estimate_for_the_difference_is_no_more_than_10_percent_under(
    pair: tuple[str | None, str | None], kind: str, change: float
) -> None:
    base = weights(kind, (128, 512))
    aligned = base + np.random.default_rng(2).normal(0, change, base.shape).astype(np.float32)
    total, stored = 0.0, []
    for name, original in zip(pair, (aligned, base), strict=True):
        if name is None:
            stored.append(original)
            continue
        blocks = rounded(original, name)
        stored.append(values(blocks, name))
        total += energy(blocks, name)
    real = norm((stored[0] - stored[1]) - (aligned - base))
    assert total**0.5 > 0.9 * real


HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [], "NVFP4": [],
}  # fmt: skip
"""Where each type's blocks have an F16."""


def random_blocks(name: str, count: int) -> NDArray[np.uint8]:
    """Blocks of arbitrary bytes, but for scales that are finite and not zero."""
    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (count, TENSOR_TYPES[NUMBERS[name]].nbytes), np.uint8)
    for at in HALVES[name]:
        blocks[:, at : at + 2] = random.uniform(0.01, 1, (count, 1)).astype("<f2").view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = random.integers(100, 140, count)
    if name == "NVFP4":
        blocks[:, :4] = random.integers(1, 0x7F, (count, 4))
    return blocks


@pytest.mark.parametrize("name", UNIFORM)
def test_step_is_the_distance_between_neighbouring_values(name: str) -> None:
    blocks = random_blocks(name, 200)
    variances, run = rounding_variances(blocks, NUMBERS[name])
    groups = dequantize(blocks, QType[name]).astype(np.float64).reshape(200, -1, run)
    steps = np.sqrt(12 * variances.astype(np.float64)).reshape(200, -1)

    distances = np.diff(np.sort(groups, axis=2), axis=2)
    away = groups - groups.min(axis=2, keepdims=True)

    with np.errstate(divide="ignore", invalid="ignore"):
        in_steps = np.where(steps[:, :, None] > 0, away / steps[:, :, None], away)
    assert np.abs(in_steps - in_steps.round()).max() < 1e-3
    smallest = np.where(distances > 1e-6, distances, np.inf).min(axis=2)
    assert np.mean(np.isclose(smallest, steps, rtol=1e-3)) > 0.6  # neighbouring codes both occur in most groups


@pytest.mark.parametrize("name", CODEBOOKS)
def test_cells_are_those_of_rounding_to_the_nearest_code(name: str) -> None:
    blocks = random_blocks(name, 6)
    codes = blocks[:, {"IQ4_NL": 2, "IQ4_XS": 8, "MXFP4": 1, "NVFP4": 4}[name] :]
    codes[:] = np.resize(np.arange(0x10, 0x100, 0x22), codes.shape)  # eight bytes with every code once
    run = 8 if name == "NVFP4" else 16  # bytes that share a scale
    variances, one = rounding_variances(blocks, NUMBERS[name])
    assert one == 1
    decoded = dequantize(blocks, QType[name]).astype(np.float64)
    for group, found in zip(decoded.reshape(-1, 2 * run), variances.reshape(-1, 2 * run), strict=True):
        points = np.unique(group)
        if len(points) == 1:  # IQ4_XS has scales of zero
            assert not found.any()
            continue
        low, high = 1.5 * points[0] - 0.5 * points[1], 1.5 * points[-1] - 0.5 * points[-2]
        if name == "MXFP4":
            low, high = points[0] * 15 / 12, points[-1] * 15 / 12
        dense = np.linspace(low, high, 200_001)
        nearest = np.abs(dense[:, None] - points).argmin(axis=1)
        errors = np.bincount(nearest, (dense - points[nearest]) ** 2) / np.bincount(nearest)
        assert found == pytest.approx(errors[np.searchsorted(points, group)], rel=1e-2)


@pytest.mark.parametrize("name", UNIFORM + CODEBOOKS + LATTICES)
def test_each_row_has_its_own_estimate(name: str) -> None:
    original = np.vstack([weights("normal", (4, 512)), np.zeros((1, 512), np.float32)])
    blocks = rounded(original, name)
    variances, run = rounding_variances(blocks, NUMBERS[name])
    assert variances.dtype == np.float32
    assert variances.shape == (5, 512 // run)
    assert (variances[:4].sum(axis=1) > 0).all()
    assert not variances[4].any()
    for row in range(5):
        assert np.array_equal(rounding_variances(blocks[row : row + 1], NUMBERS[name])[0][0], variances[row])


@pytest.mark.parametrize("name", UNIFORM + CODEBOOKS + LATTICES)
@pytest.mark.parametrize("byte", [0xFF, 0x7F, 0x7C])
def test_hostile_scales_are_quiet(name: str, byte: int) -> None:
    blocks = np.full((2, 2 * TENSOR_TYPES[NUMBERS[name]].nbytes), byte, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounding_variances(blocks, NUMBERS[name])


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "F64"])
def test_released_weights_are_exact(name: str) -> None:
    assert is_exact(NUMBERS[name])
    assert not has_rounding_estimate(NUMBERS[name])


@pytest.mark.parametrize("qtype", [0, 24, 36, 4000])
def test_other_types_are_refused(qtype: int) -> None:
    with pytest.raises(UnsupportedError, match="rounding error"):
        rounding_variances(np.zeros((1, 256), np.uint8), qtype)


def test_every_quantized_type_of_files_has_an_estimate() -> None:
    quantized = {kind.name for kind in TENSOR_TYPES.values() if kind.block > 1} - {"Q8_1", "Q8_K"}
    assert quantized == {TENSOR_TYPES[n].name for n in range(100) if has_rounding_estimate(n)}
    assert not any(is_exact(NUMBERS[name]) for name in quantized)

"""What a tensor's stored blocks say about their own rounding error, without the weights they were made from.

A value rounded to a grid of step d is off by anything within half a step, variance d^2 / 12; where the grid is a
codebook, each code has a cell and a variance of its own. The scales in the blocks give d. Where the codes are points
of a lattice (IQ1 to IQ3) or signs and zeros, the error is a measured share of the block's own mean square.

Against libggml's rounding of weights that are normal, have rows of very different scales, or outlier rows, the square
root of the summed variances is this many times the real error norm (lower with an importance matrix):

    Q8_0 1.02   Q6_K 1.10   Q5_K 1.08   Q4_K 1.14   Q3_K 1.03   Q2_K 1.13   Q5_0 1.01   Q5_1 1.03
    Q4_0 1.01   Q4_1 1.03   IQ4_NL 1.09   IQ4_XS 1.08   MXFP4 1.06   NVFP4 1.06 to 1.16
    IQ1 to IQ3, TQ1_0, TQ2_0, Q1_0, Q2_0 0.92 to 1.2

What the blocks cannot tell:

- Where weights end abruptly, as uniform ones do, Q4_0 falls to 0.93: its codes reach a step less far on one side.
- Next to an entry 30 times larger, weights round to zero and are off by less than the step promises: Q4_0 and IQ4_NL
  are then overstated up to 1.6 times, Q2_K and Q3_K 2.6 times. The lattices are understated there: 0.5 times, Q1_0 0.3,
  and 0.7 next to entries 8 times larger.
- Weights of a deviation under 5e-4 leave F16 scales few digits, and Q8_0, Q6_K, Q5_K and IQ4_XS are understated.
- Weights trained in the type they are stored in (ternary models, MXFP4) have no error at all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from numpy.typing import NDArray

from converters.errors import UnsupportedError
from converters.gguf_types import TENSOR_TYPES

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Dequantize = Callable[[Bytes, int], Floats]

_EXACT = frozenset({0, 1, 28, 30})  # F32, F16, F64, BF16


def is_exact(qtype: int) -> bool:
    """Whether the type stores released weights as they are (F32, F16, BF16, F64): their noise is zero."""
    return qtype in _EXACT


def has_rounding_estimate(qtype: int) -> bool:
    """Whether `rounding_variances` knows the type."""
    return qtype in _STEPS or qtype in _CODEBOOKS or qtype in _SHARES


def rounding_variances(blocks: Bytes, qtype: int, dequantize: Dequantize | None = None) -> tuple[Floats, int]:
    """The variance of each element's rounding error, and how many neighbouring elements share one.

    Args:
        blocks: whole rows as stored, little-endian, uint8 (rows, bytes per row). Codebook types take 8 bytes of
            memory per element, so a few hundred rows at a time.
        qtype: ggml's number of a block-quantized type.
        dequantize: single blocks, uint8 (n, bytes), and the type to float32 (n, elements), for the IQ1, IQ2, IQ3
            and TQ types, whose estimate needs the values; gguf-py's when not given.

    Returns:
        variances, float32 (rows, columns // run), in squared units of the weights, and run. Not finite where a
        scale is not.

    Raises:
        UnsupportedError: the type is unknown, or not one of blocks.
    """
    if not has_rounding_estimate(qtype):
        known = TENSOR_TYPES.get(qtype)
        raise UnsupportedError(
            f"nothing is known of the rounding error of tensor type {known.name if known else qtype}, expected a "
            "block-quantized one; take a reference in another type, Q8_0 or F16 best"
        )
    kind, rows = TENSOR_TYPES[qtype], len(blocks)
    assert blocks.dtype == np.uint8 and blocks.shape[1] % kind.nbytes == 0, f"no rows of {kind.name} blocks"
    flat = blocks.reshape(-1, kind.nbytes)
    variances: Floats
    with np.errstate(over="ignore", invalid="ignore"):  # of hostile scales
        if qtype in _STEPS:
            variances = np.square(_STEPS[qtype](flat))
            variances /= 12
        elif qtype in _CODEBOOKS:
            variances = _codebook_variances(flat, qtype)
        else:
            variances = _mean_squares(flat, qtype, dequantize) * np.float32(_SHARES[qtype])
    return variances.reshape(rows, -1), kind.block // variances.shape[1]


def _half(blocks: Bytes, at: int) -> Floats:
    """The F16 at byte `at` of each block, (blocks, 1)."""
    halves: NDArray[np.float16] = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")
    return halves.astype(np.float32)


# --- uniform grids: blocks (n, bytes) to steps (n, groups of equal step)


def _leading_scale(blocks: Bytes) -> Floats:
    return _half(blocks, 0)


def _q2_k_steps(blocks: Bytes) -> Floats:
    return _half(blocks, 80) * (blocks[:, :16] & 15)


def _q3_k_steps(blocks: Bytes) -> Floats:
    """Sixteen 6-bit scales less 32: two rows of nibbles, then four rows of the upper two bits."""
    nibbles, upper = blocks[:, 96:104], blocks[:, 104:108]
    low = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    high = np.concatenate([(upper >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    return _half(blocks, 108) * _less_32(low | (high << 4))


def _q4_k_steps(blocks: Bytes) -> Floats:
    """Eight 6-bit scales: four whole, four with their upper bits above the first four; the minima have no part."""
    first, last = blocks[:, 4:8], blocks[:, 12:16]
    scales: Bytes = np.concatenate([first & 63, (last & 15) | (first >> 6 << 4)], axis=1)
    return _half(blocks, 0) * scales


def _q6_k_steps(blocks: Bytes) -> Floats:
    return _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)


def _less_32(scales: Bytes) -> NDArray[np.int8]:
    return scales.view(np.int8) - np.int8(32)


# --- codebooks: blocks (n, bytes) to scales (n, groups) and packed codes (n, groups, bytes)
#     a group's elements are the bytes' low nibbles, then their high ones


def _iq4_nl(blocks: Bytes) -> tuple[Floats, Bytes]:
    return _half(blocks, 0), blocks[:, None, 2:]


def _iq4_xs(blocks: Bytes) -> tuple[Floats, Bytes]:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    high = np.stack([(blocks[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(-1, 8)
    return _half(blocks, 0) * _less_32(low | (high << 4)), blocks[:, 8:].reshape(-1, 8, 16)


def _mxfp4(blocks: Bytes) -> tuple[Floats, Bytes]:
    """The scale is 2^(e - 127), halved because the codebook is doubled."""
    return np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128), blocks[:, None, 1:]


def _nvfp4(blocks: Bytes) -> tuple[Floats, Bytes]:
    """Unsigned E4M3 scales (0x7f counts as zero), halved as in MXFP4."""
    scales = blocks[:, :4]
    exponent, mantissa = (scales >> 3 & 15).astype(np.int32), (scales & 7).astype(np.float32)
    steps = np.where(exponent == 0, np.ldexp(mantissa, -10), np.ldexp(8 + mantissa, exponent - 11))
    return np.where(scales == 0x7F, np.float32(0), steps), blocks[:, 4:].reshape(-1, 4, 8)


def _cells(values: list[int], end: float | None = None) -> Floats:
    """The mean square error of each code, for values spread evenly over its cell.

    A cell reaches halfway to the neighbours; at the ends it is symmetric, or reaches to +-`end`.
    """
    points = np.unique(np.array(values, np.float64))
    middles = (points[1:] + points[:-1]) / 2
    low = np.concatenate([[2 * points[0] - middles[0] if end is None else -end], middles])
    high = np.concatenate([middles, [2 * points[-1] - middles[-1] if end is None else end]])
    errors = ((high - points) ** 3 + (points - low) ** 3) / (3 * (high - low))
    by_code: Floats = errors[np.searchsorted(points, values)].astype(np.float32)
    return by_code


def _codebook_variances(blocks: Bytes, qtype: int) -> Floats:
    unpack, cells = _CODEBOOKS[qtype]
    scales, packed = unpack(blocks)
    variances = np.empty((*scales.shape, 2, packed.shape[2]), np.float32)
    codes = packed.astype(np.intp)  # once, not in both look-ups
    variances[:, :, 0] = np.tile(cells, 16)[codes]
    variances[:, :, 1] = np.repeat(cells, 16)[codes]
    variances *= np.square(scales)[:, :, None, None]
    return variances.reshape(len(blocks), -1)


# --- lattices and signs: mean squares (n, groups)


def _mean_squares(blocks: Bytes, qtype: int, dequantize: Dequantize | None) -> Floats:
    name = TENSOR_TYPES[qtype].name
    means: Floats
    if name in {"Q1_0", "Q2_0"}:
        means = np.square(_half(blocks, 0))
        if name == "Q2_0":
            means *= _Q2_0_SQUARES[blocks[:, 2:]].mean(axis=1, keepdims=True)
        return means
    values = dequantize(blocks, qtype) if dequantize else gguf_dequantize(blocks, GGMLQuantizationType(qtype))
    # One scale for the whole block: where all codes of a group are zero, the others still tell its step.
    groups = 1 if name.startswith("TQ") else values.shape[1] // 32
    grouped = values.reshape(len(blocks), groups, -1)
    means = np.einsum("bge,bge->bg", grouped, grouped)
    means /= grouped.shape[2]
    return means


_Q2_0_SQUARES = np.square((np.arange(256)[:, None] >> [0, 2, 4, 6] & 3) - 1).mean(axis=1).astype(np.float32)
"""Mean squares of the four codes in each byte; codes 0 to 3 stand for -1 to 2."""
_STEPS: dict[int, Callable[[Bytes], Floats]] = {
    2: _leading_scale, 3: _leading_scale, 6: _leading_scale, 7: _leading_scale, 8: _leading_scale,
    10: _q2_k_steps, 11: _q3_k_steps, 12: _q4_k_steps, 13: _q4_k_steps, 14: _q6_k_steps,
}  # fmt: skip
_IQ4_CELLS = _cells([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
_E2M1 = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
_CODEBOOKS: dict[int, tuple[Callable[[Bytes], tuple[Floats, Bytes]], Floats]] = {
    20: (_iq4_nl, _IQ4_CELLS),
    23: (_iq4_xs, _IQ4_CELLS),
    39: (_mxfp4, _cells(_E2M1, end=15)),  # the largest entry lies between 8 and 16: scales are powers of two
    40: (_nvfp4, _cells(_E2M1)),
}
_SHARES = {
    16: 0.125, 17: 0.097, 18: 0.040, 19: 0.24, 21: 0.0225, 22: 0.066, 29: 0.22,  # IQ2_XXS .. IQ1_M
    34: 0.60, 35: 0.60, 41: 0.571, 42: 0.42,  # TQ1_0, TQ2_0, Q1_0, Q2_0
}  # fmt: skip

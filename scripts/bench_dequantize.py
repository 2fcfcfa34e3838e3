"""Dequantizing one weight: `converters.ggml.dequantize` against `gguf.quants.dequantize`, the same to the bit.

Both get the same stored blocks, rounded by libggml from normal weights of deviation 0.02, and return float32 memory of
their own. The gguf package computes in numpy, on one thread whatever is allowed. All methods take turns in one process.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from bench_agreement import DisagreementError
from bench_gguf import encoded
from bench_outcome import timed
from gguf import GGMLQuantizationType as QType
from gguf import quants

from converters import libggml
from converters.ggml import block_of, dequantize

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_NL")
THREADS = (1, 2)
HEAD = ("type", "gguf-py ms", "1 thread ms", "faster by", "2 threads ms", "faster by")


@dataclass(frozen=True)
class Timings:
    """Seconds of all runs for one type; `ours` by the number of threads."""

    qtype: str
    gguf_py: Sequence[float]
    ours: dict[int, Sequence[float]]

    def row(self) -> tuple[str, ...]:
        """As under `HEAD`: medians, and in brackets the smallest and the largest."""
        reference = statistics.median(self.gguf_py)
        cells = [self.qtype, _milliseconds(self.gguf_py)]
        for seconds in self.ours.values():
            cells += [_milliseconds(seconds), f"{reference / statistics.median(seconds):.1f} times"]
        return tuple(cells)

    def to_json(self) -> dict[str, object]:
        return {"type": self.qtype, "gguf_py_s": self.gguf_py, "ours_s": self.ours}


def measure(qtype: QType, shape: tuple[int, int], runs: int) -> Timings:
    """`runs` rounds of all methods on one weight (rows, columns).

    Raises:
        DisagreementError: a value differs in a bit; or libggml is missing, so that there is nothing to compare.
        UnsupportedError: libggml does not quantize to the type.
    """
    if libggml.library() is None:
        raise DisagreementError("libggml is not installed: ours would be gguf-py's own arithmetic (extra llama)")
    weight = np.random.default_rng(1).standard_normal(shape, np.float32) * np.float32(0.02)
    blocks = encoded(weight, qtype).reshape(shape[0], -1)
    methods = [partial(quants.dequantize, blocks, qtype), *(partial(_ours, blocks, qtype, n) for n in THREADS)]
    exact = methods[0]()
    for threads, method in zip(THREADS, methods[1:], strict=True):  # which is also the first, untimed run
        if not np.array_equal(method().view(np.uint32), exact.view(np.uint32)):
            raise DisagreementError(f"{qtype.name}: ours (threads: {threads}) and gguf-py's values differ")
    del exact
    seconds: list[list[float]] = [[] for _ in methods]
    for turn in range(runs):
        there_and_back = range(len(methods)) if turn % 2 == 0 else reversed(range(len(methods)))
        for place in there_and_back:  # so that no method always comes after the same one
            seconds[place].append(timed(methods[place]))
    return Timings(qtype.name, seconds[0], dict(zip(THREADS, seconds[1:], strict=True)))


def subject(shape: tuple[int, int], runs: int) -> str:
    return f"dequantize: one weight of {shape[0]} x {shape[1]} to float32; medians of {runs} runs each (min to max)"


def fits(qtype: QType, columns: int) -> bool:
    """Whether rows of this length are whole blocks of the type."""
    kind = block_of(qtype)
    return kind is not None and columns % kind.block == 0


def _ours(blocks: np.ndarray, qtype: QType, threads: int) -> np.ndarray:
    torch.set_num_threads(threads)
    values: np.ndarray = dequantize(blocks, qtype).numpy()
    return values


def _milliseconds(seconds: Sequence[float]) -> str:
    low, high = 1e3 * min(seconds), 1e3 * max(seconds)
    return f"{1e3 * statistics.median(seconds):.1f} ({low:.1f} to {high:.1f})"

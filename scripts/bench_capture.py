"""Capturing weights' inputs while llama.cpp reads, against reading alone: `python bench_capture.py MODEL.gguf`.

    plain      the same tokens through a context that is there, with logits after the last one of each sequence alone
    capture    with the inputs of every matrix of every layer written to a file, and a context of its own made and freed

Both in one process and in turns, on one model that is loaded once. Of half the
sequences every token is kept, of the others the last third, as with prompts that are answered and prompts that are
refused. The tokens are noise, which takes llama.cpp as long as text does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from bench_outcome import timed

from converters.llama_log import LlamaLog
from safelora_gguf.smoke.llama.capturing import Capturing
from safelora_gguf.smoke.llama.decoding import Decoder
from safelora_gguf.smoke.llama.errors import PromptError
from safelora_gguf.smoke.llama.model import LlamaModel
from safelora_gguf.smoke.protocol import ModelOptions, Reading

LEAST_RUNS = 5
MOST_TIMES = 2.0
"""What capturing may cost, in plain readings of the same tokens."""

HEAD = ("method", "median s", "min to max", "tokens per s")
_KINDS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_LENGTH = 48


@dataclass(frozen=True)
class Timings:
    """Seconds of all runs, the tokens that each read, and the bytes that were captured."""

    plain: Sequence[float]
    capture: Sequence[float]
    tokens: int
    nbytes: int

    @property
    def times(self) -> float:
        """What capturing costs, in plain readings: the ratio of the medians."""
        return statistics.median(self.capture) / statistics.median(self.plain)

    def rows(self) -> list[tuple[str, ...]]:
        """As under `HEAD`."""
        return [self._row("plain", self.plain), self._row("capture", self.capture)]

    def to_json(self) -> dict[str, object]:
        return {"plain_s": self.plain, "capture_s": self.capture, "tokens": self.tokens, "bytes": self.nbytes}

    def _row(self, method: str, seconds: Sequence[float]) -> tuple[str, ...]:
        median = statistics.median(seconds)
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        return method, f"{median:.3f}", spread, f"{self.tokens / median:.0f}"


class _Plain:
    """Reads a sequence as answering it would: logits after its last token, which nobody looks at."""

    growth = 0

    def __init__(self, reading: Reading) -> None:
        self.tokens = reading.tokens[: reading.keep[-1] + 1]
        self.shareable = len(self.tokens) - 1

    def wants(self, index: int) -> bool:
        return index == self.shareable

    def take(self, _logits: Any) -> int | None:
        return None

    def cut(self) -> None:
        raise AssertionError("it took too long")

    def fail(self, error: PromptError) -> None:
        raise error


def measure(model: Path, *, tokens: int, runs: int, threads: int = 1) -> Timings:
    """`runs` rounds of both methods after an untimed one, on about as many tokens as are asked for.

    Raises:
        EngineError: llama.cpp can't read the model, or its inputs can't be captured.
    """
    log, options = LlamaLog(), ModelOptions(str(model), threads=threads)
    loaded = LlamaModel(options, log)
    readings = _readings(tokens, loaded.n_vocab)
    weights, decoder = _weights(model), Decoder(loaded.pointer, options, log)
    seconds: dict[str, list[float]] = {"plain": [], "capture": []}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "inputs"
        methods = {
            "plain": lambda: _plain(decoder, readings),
            "capture": lambda: _capture(Capturing(loaded.pointer, options, log, (), weights), readings, file),
        }
        for turn in range(-1, runs):
            for method in methods if turn % 2 == 0 else reversed(methods):
                taken = timed(methods[method])
                if turn >= 0:
                    seconds[method].append(taken)
        nbytes = file.stat().st_size
    read = sum(len(reading.tokens) for reading in readings.values())
    return Timings(seconds["plain"], seconds["capture"], read, nbytes)


def _readings(tokens: int, n_vocab: int) -> Mapping[int, Reading]:
    random = np.random.default_rng(1)
    readings = {}
    for key in range(max(2, tokens // _LENGTH)):
        first = 0 if key % 2 else 2 * _LENGTH // 3
        drawn = random.integers(n_vocab, size=_LENGTH).tolist()
        readings[key] = Reading(tuple(drawn), tuple(range(first, _LENGTH)))
    return readings


def _weights(model: Path) -> list[str]:
    names = [tensor.name for tensor in gguf.GGUFReader(model).tensors]
    return [name for name in names if name.endswith(".weight") and name.split(".")[-2].removesuffix("_exps") in _KINDS]


def _plain(decoder: Decoder, readings: Mapping[int, Reading]) -> None:
    for _ in decoder.run([_Plain(reading) for reading in readings.values()], lambda: None):
        pass


def _capture(capturing: Capturing, readings: Mapping[int, Reading], file: Path) -> None:
    def done(key: int, _rows: int, error: str | None) -> None:
        assert error is None, (key, error)

    capturing.run(readings, file, lambda: None, done)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=LEAST_RUNS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = measure(given.model, tokens=given.tokens, runs=max(given.runs, LEAST_RUNS), threads=given.threads)
    if given.json:
        print(json.dumps(found.to_json()))
    else:
        for row in (HEAD, *found.rows()):
            print("  ".join(f"{cell:<20}" for cell in row).rstrip())
        print(f"{found.tokens} tokens, {found.nbytes} bytes captured: {found.times:.2f} times plain reading")
    if found.times > MOST_TIMES:
        sys.exit(f"capturing takes {found.times:.2f} times what reading takes, and {MOST_TIMES:g} is the bound")


if __name__ == "__main__":
    main()

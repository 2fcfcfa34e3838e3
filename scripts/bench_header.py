"""Opening a GGUF model with a large vocabulary: our header parser against the gguf package's reader.

The file is written by the gguf package: tokens, scores and token types of one length, and as many merges; 291 small
tensors, as many as a 32-layer Llama has. What both read is compared: every key's value, every tensor's place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import gguf
import numpy as np
from bench_agreement import DisagreementError

from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader
from converters.gguf_model import open_gguf_model

T = TypeVar("T")

HEAD = ("method", "runs", "median s", "min to max s", "read_gguf_header is faster by")

_TENSORS = 291
_OURS: Mapping[str, Callable[[Path], object]] = {
    "read_gguf_header": read_gguf_header,
    "open_gguf_model": open_gguf_model,
    "open_gguf_model and its fingerprint": lambda path: open_gguf_model(path).fingerprint(),
}
_THEIRS = "gguf-py GGUFReader"


@dataclass(frozen=True)
class Timings:
    """Seconds of all runs by method, `read_gguf_header` first and gguf-py's reader last; sizes of what was read."""

    seconds: Mapping[str, Sequence[float]]
    tokens: int
    nbytes: int

    def rows(self) -> list[tuple[str, ...]]:
        """As under `HEAD`."""
        own = statistics.median(self.seconds["read_gguf_header"])
        rows: list[tuple[str, ...]] = []
        for name, seconds in self.seconds.items():
            middle = statistics.median(seconds)
            faster = f"{middle / own:,.0f} times" if name == _THEIRS else ""
            spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
            rows.append((name, str(len(seconds)), f"{middle:.3f}", spread, faster))
        return rows

    def subject(self) -> str:
        return (
            f"header: {self.tokens:,} tokens with scores, types and as many merges, {_TENSORS} tensors, "
            f"{self.nbytes / 1e6:.1f} MB; one process, the file in the page cache"
        )

    def to_json(self) -> dict[str, object]:
        return {"tokens": self.tokens, "header_bytes": self.nbytes, "seconds": dict(self.seconds)}


def measure(path: Path, tokens: int, runs: int, reader_runs: int, say: Callable[[str], None]) -> Timings:
    """Writes the file and opens it in all ways, ours in turns.

    gguf-py's reader comes last: it fills memory with arrays for every string.

    Raises:
        DisagreementError: the two read something else.
    """
    say(f"writing a vocabulary of {tokens} tokens")
    write(path, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in (*_OURS, _THEIRS)}
    for method in _OURS.values():  # the first, untimed round
        method(path)
    for _ in range(runs):
        for name, method in _OURS.items():
            seconds[name].append(_timed(method, path)[0])
    for _ in range(reader_runs):
        taken, reader = _timed(gguf.GGUFReader, path)
        seconds[_THEIRS].append(taken)
        say(f"{_THEIRS}: {taken:.1f} s")
    header = read_gguf_header(path)
    _compare(header, reader)
    return Timings(seconds, tokens, header.nbytes)


def write(path: Path, tokens: int) -> None:
    """A model of such a vocabulary; of its tensors only the list is real, each is one block of 32 zeros a row."""
    words = [f"\u2581word{number:x}" for number in range(tokens)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(number) for number in range(tokens)])
    writer.add_token_types([1] * tokens)
    writer.add_token_merges([f"{word[:3]} {word[3:]}" for word in words])
    for number in range(_TENSORS):
        writer.add_tensor(f"blk.{number // 9}.weight_{number % 9}.weight", np.zeros((64, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _compare(header: GgufHeader, reader: gguf.GGUFReader) -> None:
    theirs = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    different = {key for key, field in theirs.items() if header.value(key) != field.contents()}
    different |= theirs.keys() ^ header.entries.keys()
    tensors = {tensor.name: (tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors}
    ours = {name: (tensor.offset, tensor.nbytes) for name, tensor in header.tensors.items()}
    different |= {name for name, _ in tensors.items() ^ ours.items()}
    if different:
        raise DisagreementError(f"ours and gguf-py's reader differ in {', '.join(sorted(different)[:5])}")


def _timed(opens: Callable[[Path], T], path: Path) -> tuple[float, T]:
    start = time.perf_counter()
    result = opens(path)
    return time.perf_counter() - start, result

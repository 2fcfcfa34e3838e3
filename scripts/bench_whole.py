"""A whole model extrapolated, in processes of their own: `python bench_whole.py METHOD REQUEST`.

REQUEST is a `Request` as JSON; one line of JSON comes back on standard output. The clock starts after all imports.

    model      safelora_gguf.extrapolate_models with form="model", from opening both models to the flushed directory
    adapter    the same as a GGUF adapter
    copy       reading the base and writing a copy of the aligned model, flushed in the same way
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bench_outcome import Outcome, peak_resident

if TYPE_CHECKING:
    from bench_runs import Series

HEAD = ("method", "median s", "min to max", "beyond copying s", "peak anonymous memory")

_CHUNK = 16 << 20
TITLES = {"model": "`extrapolate --as model`", "adapter": "`extrapolate` (adapter)", "copy": "copying the bytes"}


@dataclass(frozen=True)
class Request:
    """One run; `base` and `aligned` are directories, `out` what is written."""

    base: str
    aligned: str
    out: str
    rank: int
    threads: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def requests(base: Path, aligned: Path, outputs: Path, rank: int, threads: int) -> dict[str, Request]:
    outs = {"model": "model", "adapter": "lox.gguf", "copy": "copy"}
    return {method: Request(str(base), str(aligned), str(outputs / out), rank, threads) for method, out in outs.items()}


def rows(series: Mapping[str, Series], titles: Mapping[str, str] = TITLES) -> Iterator[tuple[str, ...]]:
    """As under `HEAD`, of methods of which one is `copy`."""
    least = series["copy"].median
    for method, found in series.items():
        beyond = "" if method == "copy" else f"{found.median - least:+.1f}"
        memory = "unknown" if found.peak_anonymous is None else f"{found.peak_anonymous / 1e6:,.0f} MB"
        spread = f"{min(found.seconds):.1f} to {max(found.seconds):.1f}"
        yield titles[method], f"{found.median:.1f}", spread, beyond, memory


def model(request: Request) -> float:
    return _extrapolated(request, "model")


def adapter(request: Request) -> float:
    return _extrapolated(request, "adapter")


def _extrapolated(request: Request, form: Literal["adapter", "model"]) -> float:
    import torch

    from safelora_gguf import extrapolate_models

    torch.set_num_threads(request.threads)
    start = time.perf_counter()
    extrapolate_models(request.base, request.aligned, request.out, rank=request.rank, form=form, device="cpu")
    return time.perf_counter() - start


def copy(request: Request) -> float:
    chunk = bytearray(_CHUNK)
    start = time.perf_counter()
    for path in sorted(Path(request.base).iterdir()):
        with path.open("rb", buffering=0) as source:
            while source.readinto(chunk):
                pass
    Path(request.out).mkdir()
    for path in sorted(Path(request.aligned).iterdir()):
        with path.open("rb", buffering=0) as source, (Path(request.out) / path.name).open("wb", buffering=0) as file:
            while count := source.readinto(chunk):
                file.write(memoryview(chunk)[:count])
            os.fsync(file.fileno())
    return time.perf_counter() - start


METHODS: Mapping[str, Callable[[Request], float]] = {"model": model, "adapter": adapter, "copy": copy}


def main() -> None:
    seconds = METHODS[sys.argv[1]](Request(**json.loads(sys.argv[2])))
    print(json.dumps(asdict(Outcome(seconds, peak_resident=peak_resident()))))


if __name__ == "__main__":
    main()

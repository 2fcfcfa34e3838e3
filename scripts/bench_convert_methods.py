"""What `bench.py convert` compares, each run in a process of its own: `python bench_convert_methods.py METHOD REQUEST`.

REQUEST is a `Request` as JSON; one line of JSON comes back on standard output. The clock starts after all imports.

    ours         safelora_gguf.convert_adapter, from opening the adapter to the flushed output
    copy         reading all bytes of the source and writing as many as ours does, flushed in the same way
    upstream     llama.cpp's convert_lora_to_gguf.py, from its arguments to the closed (not flushed) file
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_outcome import Outcome, peak_resident

_CHUNK = 16 << 20


@dataclass(frozen=True)
class Request:
    """One conversion to run.

    Attributes:
        source: a PEFT directory or a GGUF adapter.
        tensor_file: the file of it that holds the tensors.
        base: a directory with config.json.
        out: ends in .gguf, or is a directory for PEFT.
        nbytes: the size of the output.
        llama_cpp: llama.cpp's source tree; empty where upstream isn't run.
    """

    source: str
    tensor_file: str
    base: str
    out: str
    outtype: str
    nbytes: int
    llama_cpp: str
    threads: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def ours(request: Request) -> float:
    import torch

    from safelora_gguf import convert_adapter

    torch.set_num_threads(request.threads)
    start = time.perf_counter()
    convert_adapter(request.source, request.out, base=request.base, outtype=request.outtype)
    return time.perf_counter() - start


def copy(request: Request) -> float:
    chunk = bytearray(_CHUNK)
    start = time.perf_counter()
    with Path(request.tensor_file).open("rb", buffering=0) as source:
        while source.readinto(chunk):
            pass
    left, temporary = request.nbytes, Path(f"{request.out}.part")
    with temporary.open("wb", buffering=0) as file:
        while left:
            left -= file.write(memoryview(chunk)[: min(left, _CHUNK)])
        os.fsync(file.fileno())
    temporary.rename(request.out)
    directory = os.open(Path(request.out).parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    return time.perf_counter() - start


def upstream(request: Request) -> float:
    sys.path[:0] = [f"{request.llama_cpp}/gguf-py", request.llama_cpp]
    import conversion  # noqa: F401  # the script's own imports, before the clock starts
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(request.threads)
    script = f"{request.llama_cpp}/convert_lora_to_gguf.py"
    options = ["--base", request.base, "--outtype", request.outtype, "--outfile", request.out]
    sys.argv = [script, *options, request.source]
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(script, run_name="__main__")
    return time.perf_counter() - start


METHODS: dict[str, Callable[[Request], float]] = {"ours": ours, "copy": copy, "upstream": upstream}


def main() -> None:
    request = Request(**json.loads(sys.argv[2]))
    seconds = METHODS[sys.argv[1]](request)
    print(json.dumps(asdict(Outcome(seconds, peak_resident=peak_resident()))))


if __name__ == "__main__":
    main()

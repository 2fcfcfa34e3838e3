"""Upstream's conversions of whole checkpoints, by a process that is asked for one after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

HERE = Path(__file__).parent
SECONDS = 120

Ask = Callable[[Sequence[object]], Any]


@contextmanager
def answering(command: Sequence[object], log: Path) -> Iterator[Ask]:
    """A child process that answers each line of JSON by another; what it prints otherwise goes to `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, *map(str, command)]
    with log.open("w") as errors, subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    ) as child:  # fmt: skip
        try:
            yield lambda request: _ask(child, request, log)
        finally:
            child.kill()


def _ask(child: subprocess.Popen[str], request: Sequence[object], log: Path) -> Any:
    assert child.stdin is not None and child.stdout is not None
    limit = Timer(SECONDS, child.kill)
    limit.start()
    try:
        child.stdin.write(json.dumps([str(word) for word in request]) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
    finally:
        limit.cancel()
    assert line, f"the child process ended at {request}:\n{log.read_text()[-2000:]}"
    return json.loads(line)


@contextmanager
def upstream_converter(llama_cpp: Path, log: Path) -> Iterator[Callable[[Path, str, str, Path], Path]]:
    """A function of a checkpoint, an outtype, the pre-tokenizer's name and a file, which upstream writes."""
    with answering([HERE / "upstream_model_child.py", llama_cpp], log) as ask:

        def convert(checkpoint: Path, outtype: str, pre: str, target: Path) -> Path:
            failure = ask([pre, checkpoint, "--outtype", outtype, "--outfile", target])
            assert failure is None, f"upstream's converter failed:\n{failure}"
            return target

        yield convert

"""The process that llama.cpp runs in: `python -m safelora_gguf.smoke.child`, started by `runner.py` alone.

llama.cpp aborts, or dies of a bad pointer, on files it does not like, and prints where it likes. So it lives
here: requests come on stdin and replies go to what was stdout, while everything printed goes to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import sys
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

from safelora_gguf.smoke.protocol import AdapterChoice, FailureKind, ModelOptions

if TYPE_CHECKING:
    from safelora_gguf.smoke.engine import Engine

_PR_SET_PDEATHSIG = 1


def main() -> None:
    _end_with_the_parent()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(sys.stdin.buffer, requests), daemon=True).start()
    engine: Engine | None = None
    while True:
        request = json.loads(requests.get())
        try:
            engine, result = _handle(engine, request)
            reply: dict[str, Any] = {"ok": result}
        except _RefusedError as failure:
            reply = {"failed": {"kind": failure.kind, "message": str(failure)}}
        replies.write(json.dumps(reply).encode("ascii") + b"\n")
        replies.flush()


class _RefusedError(Exception):
    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _handle(engine: Engine | None, request: dict[str, Any]) -> tuple[Engine | None, dict[str, Any]]:
    do = request.pop("do")
    if do == "load":
        return _load(ModelOptions(**request)), {}
    assert engine is not None, "load comes first"
    if do == "answer":
        return engine, asdict(engine.answer(request["prompt"]))
    assert do == "adapters", do
    with _failures_told():
        engine.set_adapters([AdapterChoice(**adapter) for adapter in request["adapters"]])
    return engine, {}


def _load(options: ModelOptions) -> Engine:
    try:
        from safelora_gguf.smoke.engine import Engine
        from safelora_gguf.smoke.engine_log import EngineLog
    except Exception as error:  # a broken build raises OSError or RuntimeError, not only ImportError
        raise _RefusedError("missing", f"{type(error).__name__}: {error}") from error
    with _failures_told():
        return Engine(options, EngineLog())


@contextlib.contextmanager
def _failures_told() -> Any:
    from safelora_gguf.smoke.engine import EngineError

    try:
        yield
    except EngineError as error:
        raise _RefusedError(error.kind, str(error)) from error


def _read_requests(stream: BinaryIO, requests: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        requests.put(line)
    os._exit(0)  # the parent closed the pipe or is gone; whatever runs now interests nobody


def _end_with_the_parent() -> None:
    """Where the kernel can: it kills us with our parent, even while another process holds the pipe open.

    Ctrl-C is the parent's to answer, and a core dump of a rejected file helps nobody.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()

"""The process that llama.cpp runs in: `python -m safelora_gguf.smoke.child`, started by `runner.py` alone.

See `converters.llama_child` for why, and `protocol` for what is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

from converters.llama_child import end_with_the_parent, reply_stream, send
from safelora_gguf.smoke.protocol import AdapterChoice, FailureKind, ModelOptions

if TYPE_CHECKING:
    from safelora_gguf.smoke.engine import Engine


def main() -> None:
    end_with_the_parent()
    replies = reply_stream()
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
        send(replies, reply)


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
        from converters.llama_log import LlamaLog
        from safelora_gguf.smoke.engine import Engine
    except Exception as error:  # a broken build raises OSError or RuntimeError, not only ImportError
        raise _RefusedError("missing", f"{type(error).__name__}: {error}") from error
    with _failures_told():
        return Engine(options, LlamaLog())


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


if __name__ == "__main__":
    main()

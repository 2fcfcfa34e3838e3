"""The process that llama.cpp runs in: `python -m safelora_gguf.smoke.llama.child`, started by the parent's side alone.

See `converters.llama_child` for why, and `protocol` for what is said.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from converters.llama_child import end_with_the_parent, reply_stream, send
from safelora_gguf.smoke.llama.errors import EngineError
from safelora_gguf.smoke.protocol import ALIVE_EVERY, AdapterChoice, ModelOptions, Reading

if TYPE_CHECKING:
    from safelora_gguf.smoke.llama.engine import Engine, Item


def main() -> None:
    """Ends without the interpreter's own end: a thread of ours waits in a read, which Python aborts over."""
    try:
        _serve()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def _serve() -> None:
    end_with_the_parent()
    replies = reply_stream()
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(sys.stdin.buffer, requests), daemon=True).start()
    engine: Engine | None = None
    while True:
        request = json.loads(requests.get())
        do = request.pop("do")
        try:
            if do == "load":
                engine = _load(ModelOptions(**request))
                result = _loaded(engine)
            else:
                assert engine is not None, "load comes first"
                result = _REQUESTS[do](_Work(engine, replies), request)
            reply: dict[str, Any] = {"ok": result}
        except EngineError as failure:
            reply = {"failed": {"kind": failure.kind, "message": str(failure)}}
        except MemoryError:
            reply = {"failed": {"kind": "rejected", "message": "there is not enough memory"}}
        except Exception:  # llama.cpp does not raise: this is ours, and not to be told as a crash of its
            reply = {"failed": {"kind": "bug", "message": traceback.format_exc()}}
        send(replies, reply)


class _Work:
    """An engine at a request: what it says before the last reply."""

    def __init__(self, engine: Engine, replies: BinaryIO) -> None:
        self.engine = engine
        self._replies = replies
        self._said = time.monotonic()

    def say(self, message: Mapping[str, Any]) -> None:
        self._said = time.monotonic()
        send(self._replies, message)

    def live(self) -> None:
        """A sign of life, where the last one is long ago."""
        if time.monotonic() - self._said >= ALIVE_EVERY:
            self.say({"alive": self.engine.decoded})


def _load(options: ModelOptions) -> Engine:
    try:
        from converters.llama_log import LlamaLog
        from safelora_gguf.smoke.llama.engine import Engine
    except Exception as error:  # a broken build raises OSError or RuntimeError, not only ImportError
        raise EngineError("missing", f"{type(error).__name__}: {error}") from error
    return Engine(options, LlamaLog())


def _loaded(engine: Engine) -> dict[str, Any]:
    model = engine.model
    return {
        "n_vocab": model.n_vocab,
        "vocabulary": model.vocabulary(),
        "n_ctx": engine.n_ctx,
        "notes": list(engine.notes),
    }


def _adapters(work: _Work, request: Mapping[str, Any]) -> dict[str, Any]:
    work.engine.set_adapters([AdapterChoice(**adapter) for adapter in request["adapters"]])
    return {}


def _pieces(work: _Work, request: Mapping[str, Any]) -> dict[str, Any]:
    return {"pieces": work.engine.model.pieces()}


def _answer(work: _Work, request: Mapping[str, Any]) -> dict[str, Any]:
    count = 0
    for key, answer in work.engine.answers(
        _items(request), work.live, max_tokens=request["max_tokens"], top=request["top"], refusal=request["refusal"]
    ):
        work.say({"item": key, "answer": asdict(answer)})
        count += 1
    return {"items": count}


def _record(work: _Work, request: Mapping[str, Any]) -> dict[str, Any]:
    file = Path(request["file"])
    total = 0
    for key, positions, error in work.engine.record(
        _items(request), work.live, max_tokens=request["max_tokens"], file=file
    ):
        work.say({"item": key, "recorded": {"positions": positions, "error": error}})
        total += positions
    return {"positions": total, "bytes": file.stat().st_size}


def _diverge(work: _Work, request: Mapping[str, Any]) -> dict[str, Any]:
    for key, divergence, error in work.engine.diverge(Path(request["file"]), work.live):
        if divergence is None:
            work.say({"item": key, "divergence": None, "error": error})
        else:
            work.say({"item": key, "divergence": asdict(divergence)})
    return {}


def _continue(work: _Work, request: Mapping[str, Any]) -> dict[str, Any]:
    count = 0
    for key, continued in work.engine.continuations(_items(request), work.live, max_tokens=request["max_tokens"]):
        work.say({"item": key, "continued": asdict(continued)})
        count += 1
    return {"items": count}


def _capture(work: _Work, request: Mapping[str, Any]) -> dict[str, Any]:
    file = Path(request["file"])
    readings = {item["key"]: Reading(tuple(item["tokens"]), tuple(item["keep"])) for item in request["items"]}

    def done(key: int, rows: int, error: str | None) -> None:
        work.say({"item": key, "captured": rows, "error": error})

    groups, notes = work.engine.capture(readings, request["weights"], work.live, done, file=file)
    return {"groups": [asdict(group) for group in groups], "notes": list(notes), "bytes": file.stat().st_size}


def _items(request: Mapping[str, Any]) -> list[Item]:
    from safelora_gguf.smoke.llama.engine import Item

    return [Item(item["key"], tuple(item["messages"])) for item in request["items"]]


_REQUESTS: dict[str, Callable[[_Work, Mapping[str, Any]], dict[str, Any]]] = {
    "adapters": _adapters,
    "pieces": _pieces,
    "answer": _answer,
    "record": _record,
    "diverge": _diverge,
    "continue": _continue,
    "capture": _capture,
}


def _read_requests(stream: BinaryIO, requests: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        requests.put(line)
    os._exit(0)  # the parent closed the pipe or is gone; whatever runs now interests nobody


if __name__ == "__main__":
    main()

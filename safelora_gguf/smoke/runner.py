"""The parent's side of the llama.cpp child: start it, ask it, give it a time limit, tell why it died."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, BinaryIO, Self

from converters import llama_child
from converters.errors import Error, LlamaError, MissingLlamaError, UnsupportedError
from safelora_gguf.smoke.protocol import MAX_LINE, AdapterChoice, Answer, ModelOptions

CHILD_COMMAND = llama_child.command_for("safelora_gguf.smoke.child")

logger = logging.getLogger(__name__)


class LlamaProcess:
    """One child. After an error with `alive` False it is gone: start another one.

    Every method raises LlamaError when the child crashes, hangs past `timeout` seconds or talks nonsense (it
    is killed then), and when llama.cpp rejects a file (it lives on).
    """

    def __init__(self, command: Sequence[str] = CHILD_COMMAND) -> None:
        self._process = llama_child.start(command)
        assert self._process.stderr is not None
        self._tail: deque[str] = deque(maxlen=llama_child.TAIL_LINES)
        self._listener = threading.Thread(target=_keep_tail, args=(self._process.stderr, self._tail), daemon=True)
        self._listener.start()
        self.alive = True
        self._model: str | None = None
        self._file: str | None = None  # what is at work, for messages

    def load(self, options: ModelOptions, timeout: float) -> None:
        self._file = self._model = options.model
        self._tail.clear()
        self._request({"do": "load", **asdict(options)}, timeout, "loading the model")

    def set_adapters(self, adapters: Sequence[AdapterChoice], timeout: float) -> None:
        request = {"do": "adapters", "adapters": [asdict(adapter) for adapter in adapters]}
        self._file = adapters[-1].path if adapters else self._model
        self._tail.clear()  # an earlier adapter's last words are not this one's
        self._request(request, timeout, "loading the adapter" if adapters else "removing the adapter")

    def answer(self, prompt: str, timeout: float) -> Answer:
        self._tail.clear()
        result = self._request({"do": "answer", "prompt": prompt}, timeout, "answering a prompt")
        text, error = result.get("text"), result.get("error")
        if not isinstance(text, str) or not isinstance(error, str | None):
            raise self._nonsense("answering a prompt")
        return Answer(text, error)

    def close(self) -> None:
        """Kill it: it holds nothing worth an orderly end."""
        self.alive = False
        llama_child.stop(self._process)
        self._listener.join(timeout=2)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, request: dict[str, Any], timeout: float, doing: str) -> dict[str, Any]:
        line, expired = self._exchange(request, timeout)
        if expired:
            raise self._lost(llama_child.hang_message(doing, timeout))
        if not line:
            raise self._death(doing)
        try:
            reply = json.loads(line)
            if "ok" in reply:
                return dict(reply["ok"])
            failed = dict(reply["failed"])
            kind, message = str(failed["kind"]), str(failed["message"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._nonsense(doing) from None
        raise _failure(kind, message, self._file)

    def _exchange(self, request: dict[str, Any], timeout: float) -> tuple[bytes, bool]:
        """The reply line, empty where the child is gone; and whether the time limit killed it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with llama_child.time_limit(self._process, timeout) as expired:
            try:
                llama_child.send(self._process.stdin, request)
                return self._process.stdout.readline(MAX_LINE), expired.is_set()
            except OSError:  # a broken pipe: it died before reading
                return b"", expired.is_set()

    def _death(self, doing: str) -> LlamaError:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its stdout and lives on
            self._process.wait(timeout=5)
        status = self._process.poll()
        self._listener.join(timeout=2)
        return self._lost(llama_child.crash_message(doing, status, self._tail))

    def _nonsense(self, doing: str) -> LlamaError:
        return self._lost(f"the llama.cpp process gave no valid reply while {doing}")

    def _lost(self, message: str) -> LlamaError:
        logger.debug("%s; its log ends:\n%s", message, "\n".join(self._tail))
        self.close()
        return LlamaError(message, file=self._file)


def _failure(kind: str, message: str, file: str | None) -> Error:
    if kind == "missing":
        logger.debug("llama-cpp-python does not load: %s", message)
        return MissingLlamaError("the smoke test")
    if kind == "unsupported":
        return UnsupportedError(message, file=file)
    return LlamaError(message, file=file)


def _keep_tail(stream: BinaryIO, tail: deque[str]) -> None:
    with stream, contextlib.suppress(ValueError, OSError):
        tail.extend(llama_child.log_lines(stream))

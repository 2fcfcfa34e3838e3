"""The parent's side of the llama.cpp child: start it, ask it, give it a time limit, tell why it died."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from converters.errors import Error, LlamaError, MissingLlamaError, UnsupportedError
from safelora_gguf.smoke.protocol import MAX_LINE, AdapterChoice, Answer, ModelOptions

# -P: the working directory may hold a stranger's json.py
CHILD_COMMAND = (sys.executable, "-P", "-m", "safelora_gguf.smoke.child")

logger = logging.getLogger(__name__)

_TAIL_LINES = 200
_TAIL_WIDTH = 2000
_TELLING = re.compile(
    r"GGML_ASSERT|GGML_ABORT|what\(\)|error|fail|invalid|fatal|abort|terminate|exception", re.IGNORECASE
)
_SOURCE_PATH = re.compile(r"^/\S*/(?=[\w.-]+:\d+: )")  # of the machine that compiled llama.cpp
_NOISE = re.compile(r"backtrace|debugger|GGML_NO_BACKTRACE|^\s*#?\d+\s|^/.*\.so|\[New LWP", re.IGNORECASE)


class LlamaProcess:
    """One child. After an error with `alive` False it is gone: start another one.

    Every method raises LlamaError when the child crashes, hangs past `timeout` seconds or talks nonsense (it
    is killed then), and when llama.cpp rejects a file (it lives on).
    """

    def __init__(self, command: Sequence[str] = CHILD_COMMAND) -> None:
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
        )
        assert self._process.stderr is not None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
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
        self._process.kill()
        self._process.wait()
        self._listener.join(timeout=2)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # unsent bytes
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, request: dict[str, Any], timeout: float, doing: str) -> dict[str, Any]:
        line, expired = self._exchange(json.dumps(request).encode("ascii") + b"\n", timeout)
        if expired:
            raise self._lost(f"llama.cpp hung: {doing} took more than {timeout:g} s, so it was stopped")
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

    def _exchange(self, line: bytes, timeout: float) -> tuple[bytes, bool]:
        """The reply line, empty where the child is gone; and whether the time limit killed it."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            return self._process.stdout.readline(MAX_LINE), expired.is_set()
        except OSError:  # a broken pipe: it died before reading
            return b"", expired.is_set()
        finally:
            timer.cancel()

    def _death(self, doing: str) -> LlamaError:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its stdout and lives on
            self._process.wait(timeout=5)
        status = self._process.poll()
        self._listener.join(timeout=2)
        words = last_words(self._tail)
        ending = f"; its last words: {words}" if words else ""
        return self._lost(f"llama.cpp crashed while {doing} ({_ending(status)}){ending}")

    def _nonsense(self, doing: str) -> LlamaError:
        return self._lost(f"the llama.cpp process gave no valid reply while {doing}")

    def _lost(self, message: str) -> LlamaError:
        logger.debug("%s; its log ends:\n%s", message, "\n".join(self._tail))
        self.close()
        return LlamaError(message, file=self._file)


def last_words(tail: Sequence[str] | deque[str]) -> str | None:
    """The last line of a log that says why, else its last line."""
    lines = [line.strip() for line in tail if line.strip() and not _NOISE.search(line)]
    telling = [line for line in lines if _TELLING.search(line)]
    return next((_SOURCE_PATH.sub("", line) for line in telling[-1:] or lines[-1:]), None)


def _failure(kind: str, message: str, file: str | None) -> Error:
    if kind == "missing":
        logger.debug("llama-cpp-python does not load: %s", message)
        return MissingLlamaError("the smoke test")
    if kind == "unsupported":
        return UnsupportedError(message, file=file)
    return LlamaError(message, file=file)


def _ending(status: int | None) -> str:
    if status is None:
        return "still running"
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _environment() -> dict[str, str]:
    """Ours, so that the child imports the same packages; llama.cpp is not to start a debugger on itself."""
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, inherited] if inherited else [root])
    return {**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}


def _keep_tail(stream: BinaryIO, tail: deque[str]) -> None:
    with stream, contextlib.suppress(ValueError, OSError):
        while line := stream.readline(_TAIL_WIDTH):
            tail.append(line.decode("utf-8", errors="replace").rstrip())

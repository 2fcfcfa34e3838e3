"""One llama.cpp child and the lines that go to it and come back: time limits, crashes, nonsense. `process` knows what
they mean.

A child is watched by its silence: between two decodes it says that it is alive, so one that says nothing for the
limit hangs inside llama.cpp. One that says nothing else hangs as well: it cuts every prompt at that prompt's own time
limit, therefore within `Patience.stall` something must get finished. Only time spent waiting for the child counts.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from converters import llama_child
from converters.errors import Error, LlamaError, MissingLlamaError, UnsupportedError, WriteError
from safelora_gguf.smoke.parent.replies import NonsenseError, alive_in, failure_in, parsed
from safelora_gguf.smoke.protocol import MAX_LINE, FailureKind

STALL_FACTOR = 2.0
"""So many time limits of a prompt may pass without one being finished; one would do if decodes took no time."""

_FROM_OUTSIDE = (-signal.SIGTERM, *((-signal.SIGKILL,) if hasattr(signal, "SIGKILL") else ()))

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Seconds without any line, and without anything finished, after which a child is stopped."""

    silence: float
    stall: float

    @classmethod
    def for_prompts(cls, silence: float, prompt_seconds: float) -> Patience:
        """Of a child that cuts each prompt at `prompt_seconds`."""
        return cls(silence, STALL_FACTOR * max(silence, prompt_seconds))

    @classmethod
    def altogether(cls, seconds: float) -> Patience:
        """For what has one result."""
        return cls(seconds, seconds)


class Wire:
    """One child process.

    Attributes:
        file: what is at work, for messages.
        hung: it was stopped because a time limit was hit.
        killed: it was ended from outside, as by a user or where memory ran out.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = llama_child.start(command)
        assert self._process.stderr is not None
        self._tail: deque[str] = deque(maxlen=llama_child.TAIL_LINES)
        self._listener = threading.Thread(target=_keep_tail, args=(self._process.stderr, self._tail), daemon=True)
        self._listener.start()
        self._closed = False
        self.file: str | None = None
        self.hung = False
        self.killed = False

    @property
    def alive(self) -> bool:
        """It can be asked; once False, for ever."""
        return not self._closed and self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def exchange(
        self, request: Mapping[str, Any], doing: str, patience: Patience, read: Callable[[Mapping[str, Any]], T]
    ) -> Generator[T, None, None]:
        """Sends a request and yields `read` of each reply but signs of life, the one with "ok" last.

        Left early, or when anything is wrong with a reply, the child is killed: nobody would know what its next lines
        belong to.

        Args:
            read: raises NonsenseError at a reply that is not to be believed.

        Raises:
            LlamaError: the child crashed, hung or talked nonsense, or llama.cpp rejected a file (it lives on).
            UnsupportedError, WriteError, MissingLlamaError: as the child says (it lives on).
            RuntimeError: a bug of ours in the child, its traceback as a note.
        """
        self._tail.clear()  # an earlier request's last words are not this one's
        in_step = False
        try:
            for reply in self._replies(request, doing, patience):
                if "failed" in reply:
                    kind, message = failure_in(reply["failed"])
                    if kind == "bug":
                        raise _bug(message)
                    in_step = True
                    raise _failure(kind, message, request.get("file") if kind == "unwritable" else self.file)
                value = read(reply)
                in_step = "ok" in reply
                yield value
                if in_step:
                    return
        except NonsenseError as error:
            raise self._lost(f"the llama.cpp process gave no valid reply while {doing} ({error})") from None
        finally:
            if not in_step:
                self.close()

    def close(self) -> None:
        """Kill it: it holds nothing worth an orderly end."""
        self._closed = True
        llama_child.stop(self._process)
        self._listener.join(timeout=2)

    def _replies(self, request: Mapping[str, Any], doing: str, patience: Patience) -> Iterator[Mapping[str, Any]]:
        """Replies without end, signs of life left out."""
        unsent: Mapping[str, Any] | None = request
        waited = 0.0
        while True:
            limit = min(patience.silence, patience.stall - waited)
            started = time.monotonic()
            line, expired = self._line(unsent, limit)
            unsent = None
            waited += time.monotonic() - started
            if expired or waited >= patience.stall:
                self.hung = True
                raise self._lost(_hang(doing, patience, stalled=limit < patience.silence))
            if not line.endswith(b"\n") and len(line) < MAX_LINE:  # it died, maybe in the middle of a line
                raise self._death(doing)
            reply = parsed(line)
            if "alive" in reply:
                alive_in(reply)
                continue
            waited = 0.0
            yield reply

    def _line(self, request: Mapping[str, Any] | None, limit: float) -> tuple[bytes, bool]:
        """A line, empty where the child is gone; and whether the time limit killed it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with llama_child.time_limit(self._process, max(limit, 0.0)) as expired:
            try:
                if request is not None:
                    llama_child.send(self._process.stdin, request)
                return self._process.stdout.readline(MAX_LINE), expired.is_set()
            except OSError:  # a broken pipe: it died before reading
                return b"", expired.is_set()

    def _death(self, doing: str) -> LlamaError:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its stdout and lives on
            self._process.wait(timeout=5)
        status = self._process.poll()
        self._listener.join(timeout=2)
        self.killed = status in _FROM_OUTSIDE
        tail = () if self.killed else self._tail  # who is killed says nothing of why
        return self._lost(llama_child.crash_message(doing, status, tail))

    def _lost(self, message: str) -> LlamaError:
        logger.debug("%s; its log ends:\n%s", message, "\n".join(self._tail))
        self.close()
        return LlamaError(message, file=self.file)


def _hang(doing: str, patience: Patience, *, stalled: bool) -> str:
    if patience.silence == patience.stall:
        return llama_child.hang_message(doing, patience.stall)
    if stalled:
        return f"llama.cpp hung: nothing was finished in {patience.stall:g} s of {doing}, so it was stopped"
    return f"llama.cpp hung: no sign of life for {patience.silence:g} s while {doing}, so it was stopped"


def _bug(trace: str) -> RuntimeError:
    lines = trace.strip().splitlines() or ["no traceback"]
    error = RuntimeError(f"in the llama.cpp process: {lines[-1]}")
    error.add_note(trace)
    return error


def _failure(kind: FailureKind, message: str, file: str | None) -> Error:
    if kind == "missing":
        logger.debug("llama-cpp-python does not load: %s", message)
        return MissingLlamaError("the smoke test")
    if kind == "unsupported":
        return UnsupportedError(message, file=file)
    if kind == "unwritable":
        return WriteError(message, file=file)
    return LlamaError(message, file=file)


def _keep_tail(stream: BinaryIO, tail: deque[str]) -> None:
    with stream, contextlib.suppress(ValueError, OSError):
        tail.extend(llama_child.log_lines(stream))

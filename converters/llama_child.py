"""Both sides of a process that runs llama.cpp, whatever it runs llama.cpp for.

llama.cpp aborts, or dies of a bad pointer, on files it does not like, prints where it likes, and says why in its log
alone. So the child takes requests from stdin and replies on what was stdout, one JSON object a line, while everything
printed goes to stderr; the parent kills it when it takes too long and tells from its log why it died.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

TAIL_LINES = 200
"""So much of a child's log is kept."""

_LINE_WIDTH = 2000
_TELLING = re.compile(
    r"GGML_ASSERT|GGML_ABORT|what\(\)|error|fail|invalid|fatal|abort|terminate|exception", re.IGNORECASE
)
_SOURCE_PATH = re.compile(r"^/\S*/(?=[\w.-]+:\d+: )")  # of the machine that compiled llama.cpp
_NOISE = re.compile(r"backtrace|debugger|GGML_NO_BACKTRACE|^\s*#?\d+\s|^/.*\.so|\[New LWP", re.IGNORECASE)
_PR_SET_PDEATHSIG = 1


def command_for(module: str) -> tuple[str, ...]:
    """How to start a module; -P: the working directory may hold a stranger's json.py."""
    return (sys.executable, "-P", "-m", module)


_FOR_TORCH = ("GOMP_SPINCOUNT", "10000")
"""What the command line sets for torch's threads; llama.cpp's are better off without, see `safelora_gguf.cli`."""


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a child with pipes to all three of its streams, in our environment; `stop` ends it."""
    pipe = subprocess.PIPE
    return subprocess.Popen(list(command), stdin=pipe, stdout=pipe, stderr=pipe, env=_environment())


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kills it: it holds nothing worth an orderly end. Its log is closed by who reads that, maybe in a thread."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # unsent bytes
                stream.close()


@contextlib.contextmanager
def time_limit(process: subprocess.Popen[bytes], seconds: float | None) -> Iterator[threading.Event]:
    """Kills the process, and sets the event, if the block takes longer; None: it may take as long as it likes."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(seconds or 0, expire)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


def send(stream: IO[bytes], message: Mapping[str, Any]) -> None:
    """Sends a request or a reply. ASCII only, so that no locale matters and odd bytes in paths survive.

    Raises:
        OSError: the other side is gone.
    """
    stream.write(json.dumps(dict(message)).encode("ascii") + b"\n")
    stream.flush()


def log_lines(stream: IO[bytes]) -> Iterator[str]:
    """A child's log as it comes; a line of absurd length in pieces."""
    while line := stream.readline(_LINE_WIDTH):
        yield line.decode("utf-8", errors="replace").rstrip()


def hang_message(doing: str, seconds: float) -> str:
    """What to say when the time limit was hit."""
    return f"llama.cpp hung: {doing} took more than {seconds:g} s, so it was stopped"


def crash_message(doing: str, status: int | None, tail: Sequence[str]) -> str:
    """What to say of a child that died.

    Args:
        status: how it ended, as `subprocess` gives it; None: it lives, but closed its stdout.
        tail: the end of its log.
    """
    words = last_words(tail)
    told = f"; its last words: {words}" if words else ""
    return f"llama.cpp crashed while {doing} ({_ending(status)}){told}"


def last_words(tail: Sequence[str]) -> str | None:
    """The last line of a log that says why, else its last line."""
    lines = [line.strip() for line in tail if line.strip() and not _NOISE.search(line)]
    telling = [line for line in lines if _TELLING.search(line)]
    return next((_SOURCE_PATH.sub("", line) for line in telling[-1:] or lines[-1:]), None)


def end_with_the_parent() -> None:
    """To be called by the child first. Where the kernel can, it kills us with our parent, even while another process
    holds the pipe open.

    Ctrl-C is the parent's to answer, and a core dump of a rejected file helps nobody.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def reply_stream() -> BinaryIO:
    """To be called by the child once: what was stdout, for replies; what anyone prints from now on goes to stderr."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def _environment() -> dict[str, str]:
    """Ours, so that the child imports the same packages; llama.cpp is not to start a debugger on itself."""
    root = str(Path(__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, inherited] if inherited else [root])
    kept = {name: value for name, value in os.environ.items() if (name, value) != _FOR_TORCH}
    return {**kept, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}


def _ending(status: int | None) -> str:
    if status is None:
        return "still running"
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"

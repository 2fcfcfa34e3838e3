"""What a process that runs llama.cpp and the one that starts it need, whatever it runs llama.cpp for.

llama.cpp aborts, or dies of a bad pointer, on files it does not like, and says why in its log alone.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_TELLING = re.compile(
    r"GGML_ASSERT|GGML_ABORT|what\(\)|error|fail|invalid|fatal|abort|terminate|exception", re.IGNORECASE
)
_SOURCE_PATH = re.compile(r"^/\S*/(?=[\w.-]+:\d+: )")  # of the machine that compiled llama.cpp
_NOISE = re.compile(r"backtrace|debugger|GGML_NO_BACKTRACE|^\s*#?\d+\s|^/.*\.so|\[New LWP", re.IGNORECASE)
_PR_SET_PDEATHSIG = 1


def child_command(module: str) -> tuple[str, ...]:
    """How to start a module; -P: the working directory may hold a stranger's json.py."""
    return (sys.executable, "-P", "-m", module)


def child_environment() -> dict[str, str]:
    """Ours, so that the child imports the same packages; llama.cpp is not to start a debugger on itself."""
    root = str(Path(__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, inherited] if inherited else [root])
    return {**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}


def end_with_the_parent() -> None:
    """To be called by the child first. Where the kernel can, it kills us with our parent.

    Ctrl-C is the parent's to answer, and a core dump of a rejected file helps nobody.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def last_words(tail: Sequence[str]) -> str | None:
    """The last line of a log that says why, else its last line."""
    lines = [line.strip() for line in tail if line.strip() and not _NOISE.search(line)]
    telling = [line for line in lines if _TELLING.search(line)]
    return next((_SOURCE_PATH.sub("", line) for line in telling[-1:] or lines[-1:]), None)


def ending(status: int | None) -> str:
    """How a process ended, by its exit status as `subprocess` gives it."""
    if status is None:
        return "still running"
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"

"""Oracles: literal lines as llama.cpp and glibc print them, what `subprocess` says of a child, and the pipe itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from converters.llama_child import (
    crash_message,
    last_words,
    log_lines,
    send,
    start,
    stop,
    time_limit,
)

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

_REPLIES = """
import os, sys
from converters.llama_child import reply_stream, send
replies = reply_stream()
print("printed by Python", flush=True)
os.write(1, b"printed by C\\n")
send(replies, {"path": sys.argv[1]})
"""

_LOGS = r"""
from converters.llama_log import LlamaLog
log = LlamaLog()
log._callback(4, b"llama_model_load:  error loading model: no tensors\n", None)
log._callback(4, b"llama_model_load: error loading model: no tensors\n", None)
log._callback(2, b"load: some notice", None)
log._callback(5, b", continued\n", None)
log._callback(4, b"\n=====\nMissing importance matrix for tensor ", None)
log._callback(5, b"blk.0\n=====\n", None)
log._callback(4, b"failed to open /models/a-=\n", None)
print(log.reason("it failed"))
log.clear()
print(log.reason("it failed"))
"""


def test_last_words_are_those_that_say_why() -> None:
    tail = ["loading", "/home/x/ggml.c:12: GGML_ASSERT(a == b) failed", "WARNING: no backtrace", "#0 main"]
    assert last_words(tail) == "ggml.c:12: GGML_ASSERT(a == b) failed"
    assert last_words(["one", "two", ""]) == "two"
    assert last_words([]) is None


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import os; os.abort()", "(SIGABRT)"),
        ("raise SystemExit(7)", "(exit status 7)"),
        ("import os; os.write(2, b'x' * 5000 + b'\\nCUDA error: no device\\n'); os.kill(os.getpid(), 40)",
         "(signal 40); its last words: CUDA error: no device"),
    ],
)  # fmt: skip
def test_a_crash_is_told_by_what_subprocess_says_of_it(code: str, told: str) -> None:
    process = start((sys.executable, "-c", code))
    assert process.stderr is not None
    with process.stderr as log:
        tail = list(log_lines(log))
    assert crash_message("loading", process.wait(), tail) == f"llama.cpp crashed while loading {told}"
    assert max(map(len, tail), default=0) <= 2000
    stop(process)


def test_only_a_child_that_takes_longer_is_killed() -> None:
    process = start((sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"))
    assert process.stdout is not None and process.stderr is not None
    with time_limit(process, 30) as expired:
        process.stdout.readline()
    assert process.poll() is None and not expired.is_set()
    with time_limit(process, 0.1) as expired:
        assert process.stdout.read() == b""
    assert expired.is_set()
    stop(process)
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL


def test_replies_are_apart_from_what_anyone_prints() -> None:
    path = "/models/\udcffä.gguf"
    process = start((sys.executable, "-c", _REPLIES, path))
    assert process.stderr is not None and process.stdout is not None
    with process.stderr as log:
        assert list(log_lines(log)) == ["printed by Python", "printed by C"]
    reply = process.stdout.read()
    assert reply.isascii() and reply.count(b"\n") == 1 and json.loads(reply) == {"path": path}
    stop(process)


def test_stopping_a_child_that_did_not_read_does_not_fail() -> None:
    process = start((sys.executable, "-c", "import os; os.close(0)"))
    assert process.stdin is not None and process.stderr is not None
    process.wait()
    with pytest.raises(OSError, match="pipe"):
        send(process.stdin, {"text": "x"})
    stop(process)
    process.stderr.close()
    assert process.stdin.closed


@pytest.mark.llama
def test_the_log_s_errors_are_told_once_without_functions_and_rules() -> None:
    pytest.importorskip("llama_cpp")
    command = (sys.executable, "-c", _LOGS)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    told = "error loading model: no tensors; Missing importance matrix for tensor blk.0; failed to open /models/a-="
    assert done.stdout == f"it failed: {told}\nit failed\n"
    assert "some notice, continued" in done.stderr

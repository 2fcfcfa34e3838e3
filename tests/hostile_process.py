"""The child process in which hostile files are tried, and what a refusal may cost and say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS, BYTES = 5, 100 * 10**6
"""Seconds are only held against a hang: a busy machine is no defect."""
HANG = 40
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")
JSON_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")  # what JSON escapes

Outcome = dict[str, Any]
Ask = Callable[..., Outcome]


class Child:
    """A `hostile_child`, killed when it takes too long over a command."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        self._process = subprocess.Popen(
            (sys.executable, here / "end_to_end" / "hostile_child.py"), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(here.parent), "NO_COLOR": "1"},
        )  # fmt: skip

    def ask(self, *arguments: object) -> Outcome:
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(HANG, self._process.kill)
        timer.start()
        self._process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        timer.cancel()
        assert answer, f"hung for {HANG} seconds, or crashed: {arguments}"
        outcome: Outcome = json.loads(answer)
        return outcome

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def check_cost(outcome: Outcome, told: str) -> None:
    """Whatever came of it: neither time nor memory was spent, and nothing shown moves a cursor."""
    assert outcome["seconds"] < SECONDS and outcome["bytes"] < BYTES, told
    control = JSON_CONTROL if outcome["stdout"].startswith("{") else CONTROL
    assert not control.search(outcome["stdout"]) and not CONTROL.search(outcome["stderr"]), told


def check_refusal(outcome: Outcome, told: str, *statuses: int) -> None:
    """Refused, in one sentence, and with --json in one object."""
    assert outcome["status"] in (statuses or (3,)), told
    assert "Traceback" not in outcome["stderr"], told
    assert outcome["stderr"].count("\n") == 1 and 20 < outcome["length"] < 2500, told
    if outcome["stdout"]:
        assert set(json.loads(outcome["stdout"])["error"]) == {"kind", "message", "file", "tensor"}, told


def listing(directory: Path) -> list[tuple[str, int, int]]:
    """Everything in a directory by name, size and time."""
    found = [(path, path.lstat()) for path in sorted(directory.rglob("*"))]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]

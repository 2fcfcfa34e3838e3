"""Captured inputs and solutions of `repair` are where TMPDIR says, and nothing is left of them.

Oracle: the system's own listing of directories, while it runs and after SIGTERM.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repairing_cases import arguments

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama


def test_what_is_large_is_in_tmpdir_until_a_repair_is_ended(tmp_path: Path) -> None:
    temporary, place = tmp_path / "temporary", tmp_path / "new"
    temporary.mkdir()
    command = [sys.executable, "-m", "safelora_gguf", *arguments(place / "x.gguf")]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as running:
        while not list(temporary.glob("*/captured/part-*")) and running.poll() is None:
            time.sleep(0.02)
        assert list(temporary.glob("*/solved"))
        assert not [*place.glob(".*/captured"), *place.glob(".*/solved")]
        running.terminate()
        assert running.wait(timeout=60) == 143
    assert not list(temporary.iterdir())
    assert list(tmp_path.iterdir()) == [temporary]

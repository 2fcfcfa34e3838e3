"""Runs command lines one after another where transformers, the hub's clients and the network are out of reach.

    python offline_child.py [MORE...] < COMMANDS > ANSWERS

MORE are packages that are out of reach, too. COMMANDS is a JSON list of argument lists; ANSWERS has {"exit", "told",
"stderr", "network"} for each, `told` being the JSON object on standard output and `network` whether a connection was
tried.
"""

from __future__ import annotations

import importlib.abc
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

FORBIDDEN = {"transformers", "peft", "huggingface_hub", "tokenizers", "sentencepiece", "accelerate", "requests",
             "httpx", "urllib3", "aiohttp"}  # fmt: skip


class Absent(importlib.abc.MetaPathFinder):
    """Makes packages look as if nobody had installed them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


_attempts: list[str] = []


class NoSocket(socket.socket):
    def __init__(self, *_: object, **__: object) -> None:
        refuse_network()


def refuse_network(*_: object, **__: object) -> NoReturn:
    _attempts.append("tried")  # whoever swallows the error is found out all the same
    raise OSError("there is no network here")


def go_offline() -> None:
    sys.meta_path.insert(0, Absent())
    socket.socket = NoSocket  # type: ignore[misc]
    socket.create_connection = socket.getaddrinfo = refuse_network


def run(arguments: list[str]) -> dict[str, Any]:
    from typer.testing import CliRunner

    from safelora_gguf.cli import app

    _attempts.clear()
    result = CliRunner().invoke(app, arguments)
    told = json.loads(result.stdout) if result.stdout.startswith("{") else {}
    return {"exit": result.exit_code, "told": told, "stderr": result.stderr, "network": bool(_attempts)}


def answers(commands: Sequence[Sequence[object]], *without: str) -> list[dict[str, Any]]:
    """What a child process says to these command lines, without these packages."""
    lines = json.dumps([[str(word) for word in command] for command in commands])
    child = [sys.executable, __file__, *without]
    done = subprocess.run(child, input=lines, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def main() -> None:
    FORBIDDEN.update(sys.argv[1:])
    sys.path[0] = str(Path(__file__).parents[1])  # beside this file lies a directory with the package's own name
    go_offline()
    json.dump([run(arguments) for arguments in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()

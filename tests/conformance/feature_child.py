"""Runs upstream's converters as `upstream_each_child` does, without a network and, where asked to, transformers.

    python feature_child.py LLAMA_CPP < JOBS > FAILURES

JOBS is a JSON list of [has_transformers, script, argument, ...].
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import NoReturn
from unittest import mock

from upstream_child import without_vocabulary
from upstream_each_child import nested_too, run


def no_network(*_: object, **__: object) -> NoReturn:
    raise OSError("there is no network here")


def attempt(llama_cpp: Path, has_transformers: bool, script: str, *arguments: str) -> str | None:
    found = sys.modules["transformers"]
    if not has_transformers:
        sys.modules["transformers"] = None  # type: ignore[assignment]  # importing it fails
    try:
        return run(llama_cpp, script, list(arguments))
    finally:
        sys.modules["transformers"] = found


def main(llama_cpp: Path) -> None:
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    import conversion

    conversion.get_model_class = nested_too(without_vocabulary(conversion.get_model_class))
    with mock.patch.object(socket.socket, "connect", no_network):
        failures = [attempt(llama_cpp, *job) for job in json.load(sys.stdin)]
    json.dump(failures, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

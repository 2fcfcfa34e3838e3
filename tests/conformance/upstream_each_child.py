"""Runs upstream's converters as `upstream_child` does, going on after one that fails.

    python upstream_each_child.py LLAMA_CPP < JOBS > FAILURES

FAILURES is a JSON list with one entry for each job: null, or the error that ended it.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from upstream_child import without_vocabulary  # the directory of this file leads the search path


def nested_too(find_class: Any) -> Any:
    """`without_vocabulary` for the classes inside a class as well, to which Mistral 3 leaves its writing."""

    def find(*args: Any, **kwargs: Any) -> Any:
        found = find_class(*args, **kwargs)
        for inner in vars(found).values():
            if isinstance(inner, type):
                inner.set_vocab = found.set_vocab
        return found

    return find


def run(llama_cpp: Path, script: str, arguments: list[str]) -> str | None:
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(llama_cpp / script), run_name="__main__")
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(llama_cpp: Path) -> None:
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    import conversion

    conversion.get_model_class = nested_too(without_vocabulary(conversion.get_model_class))
    failures = [run(llama_cpp, script, arguments) for script, *arguments in json.load(sys.stdin)]
    json.dump(failures, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

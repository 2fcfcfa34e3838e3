"""Runs upstream's converters, one after another, as their command lines do, except that no vocabulary is asked for.

    python upstream_child.py LLAMA_CPP < JOBS

JOBS is a JSON list of command lines, each the name of a script and its arguments. The models have no tokenizer,
whose hash upstream would have to know; llama.cpp runs them on token numbers with the vocabulary "none".
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def without_vocabulary(find_class: Any) -> Any:
    """Upstream's `get_model_class`, whose classes write the size of their vocabulary and nothing else of it."""

    def set_vocab(model: Any) -> None:
        model._set_vocab_none()
        model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])

    def find(*args: Any, **kwargs: Any) -> Any:
        found = find_class(*args, **kwargs)
        found.set_vocab = set_vocab
        return found

    return find


def main(llama_cpp: Path) -> None:
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    import conversion

    conversion.get_model_class = without_vocabulary(conversion.get_model_class)
    for script, *arguments in json.load(sys.stdin):
        sys.argv = [script, *arguments]
        runpy.run_path(str(llama_cpp / script), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

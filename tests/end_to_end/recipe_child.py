"""Runs a recipe and kills itself, as a power cut would: `python recipe_child.py RECIPE MOMENT COUNT`.

MOMENT is `begin` or `finish` (the journal was just written), `publish` (an output is complete and not yet in its
place) or `published` (it has just got its name); COUNT says at which of those moments.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from typer.testing import CliRunner

from converters import atomic, atomic_files
from safelora_gguf.cli import app
from safelora_gguf.recipe.journal import Journal


def main() -> None:
    recipe, moment, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    left = [count]

    def counted() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            counted()
            return function(*args, **options)

        return wrapped

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            counted()
            return result

        return wrapped

    if moment in {"begin", "finish"}:
        setattr(Journal, moment, after(getattr(Journal, moment)))
    else:
        wrap = before if moment == "publish" else after
        for module, name in ((atomic, "publish_file"), (atomic, "_publish_directory"), (atomic_files, "publish_file")):
            setattr(module, name, wrap(getattr(module, name)))
    sys.exit(CliRunner().invoke(app, ["run", recipe, "--quiet"]).exit_code)


main()

"""The command `inspect`: what a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safelora_gguf._version import __version__
from safelora_gguf.commands.options import Json, Verbose
from safelora_gguf.outcome import Outcome


def inspect(
    path: Annotated[
        Path, typer.Argument(readable=False, help="A model or adapter: a directory, a .safetensors or a .gguf file.")
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings, but no notes.")] = False,
    verbose: Verbose = False,
) -> Outcome:
    """Show what a model or adapter holds, and what llama.cpp would ignore, reject or die of.

    Exit 0, warnings or not, as long as the headers are sound; 3 when they are not.
    """
    from converters.inspection import inspect_path
    from safelora_gguf.tables import inspect_text

    found = inspect_path(path)
    data = {"command": "inspect", "version": __version__, **found.to_json()}
    return Outcome(lambda: inspect_text(found, every_tensor=tensors, notes=not quiet), data)

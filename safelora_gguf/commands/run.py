"""The command `run`: a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safelora_gguf.commands.options import Force, Json, Quiet, Verbose
from safelora_gguf.outcome import Outcome


def run(
    recipe: Annotated[Path, typer.Argument(readable=False, help="A TOML file with a table for every step.")],
    start: Annotated[str | None, typer.Option("--from", help="Run everything again from this step on.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Check all steps, write nothing.")] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> Outcome:
    """Run a recipe: project, extrapolate, merge, convert, quantize and smoke in one go.

    Steps that are complete are left alone, so that an interrupted run goes on where it was. The first step that does
    not end well ends the run, with its exit status.
    """
    from safelora_gguf.model_tables import run_text
    from safelora_gguf.recipe import read_recipe, run_recipe
    from safelora_gguf.terminal import step_line

    found = run_recipe(
        read_recipe(recipe), start=start, force=force, dry_run=dry_run, quiet=quiet, verbose=verbose,
        tell=None if quiet else step_line,
    )  # fmt: skip
    return Outcome(lambda: run_text(found), found.to_json(), found.status, found.failure)

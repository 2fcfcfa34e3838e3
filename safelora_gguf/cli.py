"""The command line: the commands of `safelora_gguf.commands`, put together.

Nothing heavy is imported before a command runs: --help and --version answer at once.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from safelora_gguf._version import __version__
from safelora_gguf.commands.convert_adapter import convert_adapter
from safelora_gguf.commands.convert_model import convert_model
from safelora_gguf.commands.demo import demo
from safelora_gguf.commands.extrapolate import extrapolate
from safelora_gguf.commands.inspect import inspect
from safelora_gguf.commands.merge import merge
from safelora_gguf.commands.options import as_command
from safelora_gguf.commands.project import project
from safelora_gguf.commands.repair import repair
from safelora_gguf.commands.run import run
from safelora_gguf.commands.smoke import smoke
from safelora_gguf.commands.tune import tune

_WAITING = {"GOMP_SPINCOUNT": "10000"}

app = typer.Typer(
    name="safelora-gguf",
    help="Keep fine-tuned local models refusing what they should: Safe LoRA for llama.cpp and GGUF.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert = typer.Typer(help="Convert adapters (PEFT, MLX, GGUF) and models (safetensors, GGUF).", no_args_is_help=True)
app.add_typer(convert, name="convert")

app.command("project")(as_command("project", project))
app.command("extrapolate")(as_command("extrapolate", extrapolate))
convert.command("adapter")(as_command("convert adapter", convert_adapter))
convert.command("model")(as_command("convert model", convert_model))
app.command("merge")(as_command("merge", merge))
app.command("run")(as_command("run", run))
app.command("smoke")(as_command("smoke", smoke))
app.command("tune")(as_command("tune", tune))
app.command("repair")(as_command("repair", repair))
app.command("inspect")(as_command("inspect", inspect))
app.command("demo")(as_command("demo", demo))


def main() -> None:
    """The entry point of the console script."""
    if not os.environ.keys() & _WAITING.keys() and "OMP_WAIT_POLICY" not in os.environ:
        # libgomp's threads spin where they wait: on a busy machine they take most of the time from each other. So they
        # spin for less long; not at all would cost much on an idle one. Children that run llama.cpp do without this.
        os.environ.update(_WAITING)
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safelora-gguf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()

"""What the commands have in common: options by type, and the way that every one of them is run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from safelora_gguf.outcome import Outcome
    from safelora_gguf.smoke import SmokeReport

file_option = partial(typer.Option, readable=False)
"""What can't be read is an unusable input (3), not wrong usage (2)."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log to stderr, with tracebacks of failures.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing outputs.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse what would be lost or only approximated.")]
Out = Annotated[
    str,
    typer.Option(
        metavar="PATH", help="A .gguf file; an existing directory, for a GGUF named by convention; else one for PEFT."
    ),
]
To = Annotated[str | None, typer.Option(help="gguf or peft, where --out doesn't say.")]
ModelOut = Annotated[str, typer.Option(metavar="PATH", help="A .gguf file; else a directory for safetensors.")]
Imatrix = Annotated[Path | None, file_option(help="Importance matrix for the quantization (llama-imatrix).")]
VocabFrom = Annotated[Path | None, file_option(help="GGUF file of the same model, whose tokenizer to copy.")]
SplitSize = Annotated[str | None, typer.Option(metavar="SIZE", help="Split the GGUF into files of at most 5G, 500M.")]
Requantize = Annotated[bool, typer.Option("--allow-requantize", help="Quantize again what is quantized already.")]
Card = Annotated[bool, typer.Option("--card", help="Write a model card, a Modelfile and the llama-server line beside.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]


def as_command(name: str, body: Callable[..., Outcome]) -> Callable[..., None]:
    """A command of the line: its body's outcome becomes output and an exit status (see `exits`).

    Args:
        name: what it is called in error objects.
        body: takes the options `json` and `verbose` among others.
    """

    @wraps(body)
    def command(**options: Any) -> None:
        from safelora_gguf.exits import run_command

        as_json, verbose = bool(options["json"]), bool(options["verbose"])
        if verbose:
            logging.basicConfig(stream=sys.stderr, level=logging.DEBUG, format="%(name)s: %(message)s")
        raise typer.Exit(run_command(name, partial(body, **options), as_json=as_json, verbose=verbose))

    return command


def status_of(report: SmokeReport) -> int:
    """The exit status of a measured verdict."""
    return 0 if report.verdict == "pass" else 1

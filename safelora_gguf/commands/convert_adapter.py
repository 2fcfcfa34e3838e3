"""The command `convert adapter`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from safelora_gguf.commands.inputs import check_card, choice, save_card
from safelora_gguf.commands.options import Card, Force, Json, Out, Strict, To, Verbose, file_option
from safelora_gguf.outcome import Outcome


def convert_adapter(
    source: Annotated[
        Path, typer.Argument(readable=False, help="The adapter: a PEFT or MLX directory, or a .gguf file.")
    ],
    out: Out,
    base: Annotated[
        Path | None, file_option(help="The model it is for: directory, config.json or .gguf; weights for DoRA alone.")
    ] = None,
    outtype: Annotated[str, typer.Option(help="f32, f16, bf16 or q8_0.")] = "f32",
    to: To = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "--dora-rank", help="Rank for a DoRA adapter (default: 1 % error).")
    ] = None,
    card: Card = False,
    strict: Strict = False,
    dry_run: Annotated[bool, typer.Option(help="Check all headers, write nothing.")] = False,
    force: Force = False,
    json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no warnings.")] = False,
    verbose: Verbose = False,
) -> Outcome:
    """Convert a LoRA adapter: PEFT or MLX to GGUF, MLX or GGUF to PEFT, by what --out is."""
    from safelora_gguf.convert import convert_adapter as converted
    from safelora_gguf.tables import convert_summary, convert_table
    from safelora_gguf.terminal import rendered, warn

    check_card(card, out, to, force, (source, *((base,) if base else ())))
    result = converted(
        source, out, base=base, outtype=outtype, to=choice(to, "to", ("gguf", "peft", None)), rank=rank,
        strict=strict, force=force, dry_run=dry_run,
    )  # fmt: skip
    save_card(result.to_json(), card, (source, *((base,) if base else ())), force)
    warn(() if quiet else result.losses)
    text = partial(rendered, convert_table(result), convert_summary(result, notes=not quiet))
    return Outcome(text, result.to_json())

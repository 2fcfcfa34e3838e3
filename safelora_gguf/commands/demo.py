"""The command `demo`: the whole story on the packaged family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from safelora_gguf.commands.options import Force, Json, Quiet, Verbose, file_option
from safelora_gguf.outcome import Outcome


def demo(
    directory: Annotated[
        Path | None, file_option("--dir", help="Keep the adapters and a report (HTML, JSON) here.")
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> Outcome:
    """The whole story on the packaged tiny family: attack, projection, repair, refusals. No download, under a minute.

    Exit 0 when the repaired adapter refuses enough, 1 when not, 4 when llama.cpp failed.
    """
    from safelora_gguf.demo import run_demo
    from safelora_gguf.demo_table import demo_text
    from safelora_gguf.terminal import progress_bar

    with progress_bar(unit="prompts", shown=not quiet) as progress:
        result = run_demo(directory, force=force, progress=progress)
    status = 0 if result.verdict == "pass" else 1
    return Outcome(lambda: demo_text(result), result.to_json(), status, result.failure)

"""Benchmarks: our commands against the plain methods they replace, on synthetic models of real shapes.

    python scripts/bench.py project

measures `project` against Safe LoRA as it was published, written out in plain torch (see bench_methods.py): time
from opened inputs to written output, imports apart, and peak anonymous memory. Every run is a process of its own, the
methods take turns, files are in the page cache, and medians of all runs are given. The results of all methods are
compared in the same run; where they differ there are no figures and the exit status is 1.

Figures are worth keeping only from a machine that does nothing else: the load before the first run is printed.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from bench_agreement import DisagreementError, check
from bench_methods import METHODS, Request
from bench_models import Files, Shape, make_files, warm
from bench_report import Report
from bench_runs import Machine, run_in_turns

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)

_THRESHOLD = 0.35
_PACKAGES = ("safelora-gguf", "torch", "safetensors", "numpy")


@app.callback()
def benchmarks() -> None:
    """Keeps `project` a subcommand while it is the only one."""


@app.command()
def project(
    *,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the synthetic model.")] = 11,
    hidden: Annotated[int, typer.Option(min=512, help="Its width, a multiple of 512.")] = 2048,
    rank: Annotated[int, typer.Option(min=1, help="Rank of its adapter.")] = 16,
    runs: Annotated[int, typer.Option(min=1, help="Runs per method; five or more for figures to keep.")] = 5,
    directory: Annotated[Path | None, typer.Option("--dir", help="Keep the model here, for later runs.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, for all methods alike.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Cores for every method.")] = 2,
    subspace: Annotated[
        int | None, typer.Option(min=1, help="Measure --operator subspace of this rank on three modules.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a section for BENCHMARKS.md.")] = False,
) -> None:
    """Times `project` against the dense method on a synthetic model."""
    if hidden % 512:
        raise typer.BadParameter(f"{hidden} is no multiple of 512", param_hint="--hidden")
    machine = Machine.here(_PACKAGES)
    with _files(directory, Shape(layers, hidden, rank)) as files, tempfile.TemporaryDirectory() as outputs:
        requests = _requests(files, Path(outputs), device, threads, subspace)
        warm(files)
        try:
            series = run_in_turns(requests, runs, _say)
            errors = check(
                {method: found.outcomes[-1] for method, found in series.items()},
                Path(requests["ours"].out),
                Path(requests["dense"].out),
                files.shape,
            )
        except (ChildProcessError, DisagreementError) as error:
            _say(f"no figures: {error}")
            raise typer.Exit(1) from None
        report = Report(files.shape, subspace, threads, device, machine, series, errors)
    print(report.to_json() if json_output else report.to_markdown(_command()) if markdown else report.to_table())


@contextlib.contextmanager
def _files(directory: Path | None, shape: Shape) -> Iterator[Files]:
    if directory is not None:
        try:
            yield make_files(directory, shape, _say)
        except FileExistsError as error:
            raise typer.BadParameter(str(error), param_hint="--dir") from None
        return
    with tempfile.TemporaryDirectory(prefix="safelora-bench-") as temporary:
        yield make_files(Path(temporary) / "model", shape, _say)


def _requests(files: Files, outputs: Path, device: str, threads: int, subspace: int | None) -> dict[str, Request]:
    return {
        method: Request(
            base=str(files.base),
            aligned=str(files.aligned),
            adapter=str(files.adapter(subspace is not None)),
            out=str(outputs / f"{method}.{'gguf' if method == 'ours' else 'safetensors'}"),
            threshold=_THRESHOLD if subspace is None else None,
            subspace_rank=subspace,
            device=device,
            threads=threads,
        )
        for method in METHODS
    }


def _command() -> str:
    return " ".join(["python", "scripts/bench.py", *sys.argv[1:]])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()

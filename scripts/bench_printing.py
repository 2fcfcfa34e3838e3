"""What the benchmarks' commands share: methods run in turns, what they found as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import bench_whole
import typer
from bench_agreement import DisagreementError
from bench_inputs import say
from bench_models import Files
from bench_report import markdown_table, place, plain_table
from bench_runs import Machine, Request, Series, run_in_turns

PACKAGES = ("safelora-gguf", "torch", "safetensors", "numpy")


def in_turns(wanted: Mapping[str, Request], runs: int, script: str) -> dict[str, Series]:
    try:
        return run_in_turns(wanted, runs, say, script)
    except ChildProcessError as error:
        raise no_figures(error) from None


def compare(check: Callable[[], None]) -> None:
    try:
        check()
    except DisagreementError as error:
        raise no_figures(error) from None


def sized(files: Files, runs: int, threads: int) -> str:
    size = sum(file.stat().st_size for file in files.aligned.rglob("*.safetensors"))
    return (
        f"models of {files.shape.layers} layers, hidden {files.shape.hidden}, {size / 1e9:.1f} GB each in BF16, in the "
        f"page cache; {threads} cores, {runs} runs each"
    )


def print_series(
    subject: str,
    rows: Iterable[Sequence[str]],
    series: Mapping[str, Series],
    json_output: bool,
    markdown: bool,
    *,
    head: Sequence[str] = bench_whole.HEAD,
) -> None:
    machine = Machine.here((*PACKAGES, "gguf", "transformers", "peft"))
    if json_output:
        print_json(machine, {method: found.to_json() for method, found in series.items()})
    else:
        print_table(subject, [head, *rows], machine, markdown)


def print_json(machine: Machine, found: object) -> None:
    print(json.dumps({"machine": machine.to_json(), "found": found}, indent=2))


def print_table(subject: str, rows: Sequence[Sequence[str]], machine: Machine, markdown: bool) -> None:
    if markdown:
        print("\n".join([subject, "", markdown_table(rows), "", f"`{command_line()}`", "", place(machine)]))
    else:
        print("\n".join([subject, "", plain_table(rows), "", place(machine)]))


def command_line() -> str:
    return " ".join(["python", "scripts/bench.py", *sys.argv[1:]])


def no_figures(error: Exception) -> typer.Exit:
    say(f"no figures: {error}")
    return typer.Exit(1)

"""Benchmarks: our commands against the plain methods they replace, on synthetic models of real shapes.

    python scripts/bench.py project                     bfloat16 references, as safetensors
    python scripts/bench.py project --references q4_k   quantized ones, as GGUF
    python scripts/bench.py dequantize                  one weight, against gguf-py
    python scripts/bench.py header                      a large vocabulary, against gguf-py
    python scripts/bench.py convert                     a large adapter, against copying its bytes
    python scripts/bench.py extrapolate                 a difference's rank-k part, against torch's full SVD
    python scripts/bench.py extrapolate-whole           a model of 2.2 GB, against copying its bytes
    python scripts/bench.py convert-model               one of 2.2 GB to GGUF, against llama.cpp's converter
    python scripts/bench.py tune-scoring                twelve settings of an adapter, against `project` for each
    python scripts/bench.py merge                       an adapter into one of 2.2 GB, against PEFT
    python scripts/bench.py repair-solve                a 7B model's adapter, against the formula in float64
    python scripts/bench.py smoke                       several adapters, against a load and a prompt at a time

`project` is measured against Safe LoRA as it was published, written out in plain torch (see bench_methods.py): time
from opened inputs to written output, imports apart, and peak anonymous memory. Every run is a process of its own, the
methods take turns, files are in the page cache, and medians of all runs are given. `convert` runs in the same way; the
others run in one process.
The results of all methods are compared in the same run; where they differ there are no figures and the exit status
is 1.

Figures are worth keeping only from a machine that does nothing else: the load before the first run is printed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import bench_candidates
import bench_checkpoints
import bench_convert
import bench_dequantize
import bench_extrapolate
import bench_header
import bench_repair
import bench_smoke
import bench_whole
import torch
import typer
from bench_agreement import DisagreementError, check
from bench_inputs import model_files, reference_type, requests_for, say, type_named, whole_models
from bench_models import Shape, warm
from bench_printing import (
    PACKAGES,
    command_line,
    compare,
    in_turns,
    no_figures,
    print_json,
    print_series,
    print_table,
    sized,
)
from bench_report import Report
from bench_runs import Machine, run_in_turns

from converters.errors import UnsupportedError
from converters.rounding import is_exact

_HELP = __doc__.replace("\n\n    ", "\n\n\b\n    ", 1)  # the mark keeps click from filling the list's lines
app = typer.Typer(add_completion=False, no_args_is_help=True, help=_HELP, rich_markup_mode=None)

_GGML_PACKAGES = ("gguf", "llama-cpp-python")

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Markdown = Annotated[bool, typer.Option("--markdown", help="Print a section for BENCHMARKS.md.")]
_Layers = Annotated[int, typer.Option(min=1, help="Layers of the synthetic model.")]
_Hidden = Annotated[int, typer.Option(min=512, help="Its width, a multiple of 512.")]
_Runs = Annotated[int, typer.Option(min=1, help="Runs per method; five or more for figures to keep.")]
_Threads = Annotated[int, typer.Option(min=1, help="Cores for every method.")]
_Directory = Annotated[Path | None, typer.Option("--dir", help="Keep the model here, for later runs.")]
_LlamaCpp = Annotated[
    Path | None,
    typer.Option(envvar="SAFELORA_LLAMA_CPP", help="llama.cpp's source tree; its converter then runs, too."),
]


@app.command()
def project(
    *,
    layers: _Layers = 11,
    hidden: _Hidden = 2048,
    rank: Annotated[int, typer.Option(min=1, help="Rank of its adapter.")] = 16,
    references: Annotated[
        str | None, typer.Option(help="Base and aligned as GGUF in this type of ggml (f16, q8_0, q4_k, ...).")
    ] = None,
    runs: _Runs = 5,
    directory: _Directory = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, for all methods alike.")] = "cpu",
    threads: _Threads = 2,
    subspace: Annotated[
        int | None, typer.Option(min=1, help="Measure --operator subspace of this rank on three modules.")
    ] = None,
    json_output: _Json = False,
    markdown: _Markdown = False,
) -> None:
    """Times `project` against the dense method on a synthetic model."""
    if hidden % 512:
        raise typer.BadParameter(f"{hidden} is no multiple of 512", param_hint="--hidden")
    shape = Shape(layers, hidden, rank)
    qtype = None if references is None else reference_type(references, shape, subspace)
    machine = Machine.here(PACKAGES if qtype is None else (*PACKAGES, *_GGML_PACKAGES))
    with model_files(directory, shape, qtype) as files, tempfile.TemporaryDirectory() as outputs:
        requests = requests_for(files, qtype, Path(outputs), device=device, threads=threads, subspace=subspace)
        warm(Path(path) for path in (requests["ours"].base, requests["ours"].aligned, requests["ours"].adapter))
        try:
            series = run_in_turns(requests, runs, say)
            errors = check(
                {method: found.outcomes[-1] for method, found in series.items()},
                Path(requests["ours"].out),
                Path(requests["dense"].out),
                files.shape,
            )
        except (ChildProcessError, DisagreementError) as error:
            raise no_figures(error) from None
        stored = "bf16" if qtype is None else f"{qtype.name} GGUF"
        report = Report(files.shape, stored, subspace, threads, device, machine, series, errors)
    print(report.to_json() if json_output else report.to_markdown(command_line()) if markdown else report.to_table())


@app.command()
def dequantize(
    *,
    types: Annotated[
        list[str] | None, typer.Option("--type", help="A type of ggml; repeat for more.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(min=1)] = 2048,
    columns: Annotated[int, typer.Option(min=1)] = 4096,
    runs: _Runs = 9,
    json_output: _Json = False,
    markdown: _Markdown = False,
) -> None:
    """Times dequantizing a weight against gguf-py, on one thread and on two."""
    wanted = [type_named(name, "--type") for name in types or bench_dequantize.TYPES]
    for qtype in wanted:
        if is_exact(qtype) or not bench_dequantize.fits(qtype, columns):
            message = f"{qtype.name} is no quantized type, or {columns} columns are no whole blocks of it"
            raise typer.BadParameter(message, param_hint="--type")
    machine = Machine.here(("numpy", *_GGML_PACKAGES))
    try:
        found = [bench_dequantize.measure(qtype, (rows, columns), runs) for qtype in wanted]
    except (DisagreementError, UnsupportedError) as error:
        raise no_figures(error) from None
    if json_output:
        print_json(machine, [timings.to_json() for timings in found])
    else:
        table = [bench_dequantize.HEAD, *(timings.row() for timings in found)]
        print_table(bench_dequantize.subject((rows, columns), runs), table, machine, markdown)


@app.command()
def header(
    *,
    tokens: Annotated[int, typer.Option(min=1, help="Size of the vocabulary.")] = 1 << 18,
    runs: Annotated[int, typer.Option(min=1, help="Runs of ours; five or more for figures to keep.")] = 9,
    reader_runs: Annotated[int, typer.Option(min=1, help="Runs of gguf-py's reader, half a minute each.")] = 1,
    json_output: _Json = False,
    markdown: _Markdown = False,
) -> None:
    """Times opening a GGUF model with a large vocabulary."""
    machine = Machine.here(("gguf", "numpy"))
    with tempfile.TemporaryDirectory(prefix="safelora-bench-") as temporary:
        try:
            found = bench_header.measure(Path(temporary) / "model.gguf", tokens, runs, reader_runs, say)
        except DisagreementError as error:
            raise no_figures(error) from None
    if json_output:
        print_json(machine, found.to_json())
    else:
        print_table(found.subject(), [bench_header.HEAD, *found.rows()], machine, markdown)


@app.command()
def convert(
    *,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the adapted model.")] = 32,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 64,
    runs: _Runs = 5,
    threads: _Threads = 2,
    llama_cpp: _LlamaCpp = None,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where to write, on the disk to measure.")] = None,
    json_output: _Json = False,
    markdown: _Markdown = False,
) -> None:
    """Times `convert adapter` against copying the bytes, and against llama.cpp's converter."""
    if llama_cpp is not None and not (llama_cpp / "convert_lora_to_gguf.py").exists():
        raise typer.BadParameter(f"{llama_cpp} has no convert_lora_to_gguf.py", param_hint="--llama-cpp")
    size = bench_convert.Size(layers, rank)
    machine = Machine.here((*PACKAGES, "gguf", *(("transformers",) if llama_cpp else ())))
    with tempfile.TemporaryDirectory(prefix="safelora-bench-", dir=directory) as temporary:
        try:
            found = bench_convert.measure(Path(temporary), size, runs, threads=threads, llama_cpp=llama_cpp, say=say)
        except (ChildProcessError, DisagreementError) as error:
            raise no_figures(error) from None
    if json_output:
        print_json(machine, [timings.to_json() for timings in found])
    else:
        rows = [bench_convert.HEAD, *(row for timings in found for row in timings.rows())]
        print_table(size.subject(runs, threads), rows, machine, markdown)


@app.command()
def extrapolate(
    *,
    rank: Annotated[int, typer.Option(min=1, help="How many directions to keep.")] = 6,
    tolerance: Annotated[float, typer.Option(min=1e-9, help="Residual to reach, in units of s_1.")] = 1e-3,
    runs: _Runs = 5,
    threads: _Threads = 2,
    json_output: _Json = False,
    markdown: _Markdown = False,
) -> None:
    """Times the rank-k part of a difference against torch's full SVD."""
    torch.set_num_threads(threads)
    machine = Machine.here(PACKAGES)
    try:
        found = [bench_extrapolate.measure(case, rank, tolerance, runs, say) for case in bench_extrapolate.CASES]
    except DisagreementError as error:
        raise no_figures(error) from None
    if json_output:
        print_json(machine, [timings.to_json() for timings in found])
    else:
        rows = [bench_extrapolate.HEAD, *(timings.row() for timings in found)]
        print_table(bench_extrapolate.subject(rank, tolerance, runs, threads), rows, machine, markdown)


@app.command()
def extrapolate_whole(
    *,
    layers: _Layers = 22,
    hidden: _Hidden = 2048,
    rank: Annotated[int, typer.Option(min=1, help="How many directions of each matrix.")] = 6,
    runs: _Runs = 5,
    directory: _Directory = None,
    threads: _Threads = 2,
    json_output: _Json = False,
    markdown: _Markdown = False,
) -> None:
    """Times `extrapolate` on whole models against copying their bytes."""
    with whole_models(directory, Shape(layers, hidden)) as (files, outputs):
        wanted = bench_whole.requests(files.base, files.aligned, outputs, rank, threads)
        series = in_turns(wanted, runs, "bench_whole.py")
    subject = f"extrapolate at rank {rank}: {sized(files, runs, threads)}"
    print_series(subject, bench_whole.rows(series), series, json_output, markdown)


@app.command()
def tune_scoring(
    *,
    layers: _Layers = 22,
    hidden: _Hidden = 2048,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    runs: _Runs = 5,
    directory: _Directory = None,
    threads: _Threads = 2,
    json_output: _Json = False,
    markdown: _Markdown = False,
) -> None:
    """Times scoring and writing twelve settings of an adapter against `project` for each of them."""
    with whole_models(directory, Shape(layers, hidden, rank)) as (files, outputs):
        wanted = bench_candidates.requests(files, outputs, threads)
        series = in_turns(wanted, runs, "bench_candidates.py")
        compare(lambda: bench_candidates.check(wanted))
        subject = f"twelve settings of an adapter of rank {rank}: {sized(files, runs, threads)}"
        found, head = bench_candidates.rows(series), bench_candidates.HEAD
        print_series(subject, found, series, json_output, markdown, head=head)


@app.command()
def convert_model(
    *,
    layers: _Layers = 22,
    hidden: _Hidden = 2048,
    outtype: Annotated[str, typer.Option(help="f32, f16, bf16 or q8_0.")] = "bf16",
    runs: _Runs = 5,
    llama_cpp: _LlamaCpp = None,
    directory: _Directory = None,
    threads: _Threads = 2,
    json_output: _Json = False,
    markdown: _Markdown = False,
) -> None:
    """Times `convert model` against copying the bytes, and against llama.cpp's converter."""
    with whole_models(directory, Shape(layers, hidden)) as (files, outputs):
        model = bench_checkpoints.with_tokenizer(files, outputs / "source")
        wanted = bench_checkpoints.conversions(model, outputs, outtype, llama_cpp, threads)
        series = in_turns(wanted, runs, "bench_checkpoints.py")
        if llama_cpp is not None:
            compare(lambda: bench_convert.compare_gguf(Path(wanted["convert"].out), Path(wanted["upstream"].out)))
        subject = f"convert model to {outtype.upper()}: {sized(files, runs, threads)}"
        print_series(subject, bench_whole.rows(series, bench_checkpoints.TITLES), series, json_output, markdown)


@app.command()
def merge(
    *,
    layers: _Layers = 22,
    hidden: _Hidden = 2048,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    runs: _Runs = 5,
    directory: _Directory = None,
    threads: _Threads = 2,
    json_output: _Json = False,
    markdown: _Markdown = False,
) -> None:
    """Times `merge` into a safetensors directory against PEFT's merge_and_unload."""
    with whole_models(directory, Shape(layers, hidden, rank)) as (files, outputs):
        wanted = bench_checkpoints.merges(files.aligned, files.adapter(), outputs, threads)
        series = in_turns(wanted, runs, "bench_checkpoints.py")
        subject = f"merge an adapter of rank {rank} on all projections: {sized(files, runs, threads)}"
        print_series(subject, bench_whole.rows(series, bench_checkpoints.TITLES), series, json_output, markdown)


@app.command()
def repair_solve(
    *,
    layers: Annotated[int, typer.Option(min=1, help="Of the whole, which is solved once.")] = 32,
    tokens: Annotated[int, typer.Option(min=64, help="Of either set.")] = 2048,
    runs: _Runs = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda, for all methods alike.")] = "cpu",
    threads: _Threads = 2,
    json_output: _Json = False,
    markdown: _Markdown = False,
) -> None:
    """Times solving for a repaired adapter against the formula written out in float64."""
    machine = Machine.here(("safelora-gguf", "torch", "numpy"))
    with tempfile.TemporaryDirectory(prefix="safelora-bench-") as temporary:
        inputs, outputs = Path(temporary) / "inputs", Path(temporary) / "out"
        inputs.mkdir()
        outputs.mkdir()
        bench_repair.write_inputs(inputs, tokens)
        wanted = bench_repair.requests(inputs, outputs, tokens, device, threads)
        series = in_turns(wanted, runs, "bench_repair.py")
        try:
            error = bench_repair.check(wanted)
        except DisagreementError as differing:
            raise no_figures(differing) from None
        whole = in_turns(bench_repair.whole(wanted, layers), 1, "bench_repair.py")
    if json_output:
        print_json(machine, {method: found.to_json() for method, found in (series | whole).items()})
    else:
        subject = (
            f"repair: solving for one mu, {tokens:,} tokens of either set, on {device}, {threads} cores; {runs} runs "
            f"each, the whole once; A' as the dense method has it to {error:.0e}"
        )
        rows = [bench_repair.HEAD, *bench_repair.rows(series | whole, layers)]
        print_table(subject, rows, machine, markdown)


@app.command()
def smoke(
    *,
    adapters: Annotated[int, typer.Option(min=1, help="How many, beside the model alone.")] = 3,
    prompts: Annotated[int, typer.Option(min=1, max=120, help="Asked of each.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 64,
    runs: _Runs = 5,
    threads: _Threads = 2,
    json_output: _Json = False,
    markdown: _Markdown = False,
) -> None:
    """Times asking a model with several adapters against loading it for each and asking one by one."""
    machine = Machine.here(("safelora-gguf", "numpy", "llama-cpp-python"))
    with tempfile.TemporaryDirectory(prefix="safelora-bench-") as temporary:
        wanted = bench_smoke.requests(Path(temporary), adapters, prompts, max_tokens, threads)
        series = in_turns(wanted, runs, "bench_smoke.py")
        try:
            same = bench_smoke.compare(wanted["answers"], wanted["plain"])
        except DisagreementError as error:
            raise no_figures(error) from None
        rows = list(bench_smoke.rows(series, wanted))
    if json_output:
        print_json(machine, {method: found.to_json() for method, found in series.items()})
    else:
        subject = (
            f"smoke: the packaged family alone and with {adapters} adapters, {prompts} prompts each, {max_tokens} "
            f"tokens at most, one thread; {runs} runs each; {same}"
        )
        print_table(subject, [bench_smoke.HEAD, *rows], machine, markdown)


if __name__ == "__main__":
    app()

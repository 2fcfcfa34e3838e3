"""The command `tune`: which change of an adapter keeps most of it and refuses enough."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from safelora_gguf.commands.inputs import choice, replaced, report_paths, save_reports
from safelora_gguf.commands.options import (
    Confident,
    Ctx,
    Device,
    Force,
    GpuLayers,
    Json,
    JudgeModel,
    Judges,
    Limit,
    MaxOverRefusal,
    MaxTokens,
    MeasuredReports,
    MinRefusal,
    Out,
    Parallel,
    Prompts,
    Quiet,
    Seed,
    System,
    Template,
    Threads,
    TimeLimit,
    To,
    Verbose,
    file_option,
)
from safelora_gguf.outcome import Outcome


def tune(
    base: Annotated[Path, file_option(help="The model before its alignment: directory, .safetensors or .gguf.")],
    aligned: Annotated[Path, file_option(help="The aligned model, on which the adapter was trained.")],
    adapter: Annotated[Path, file_option(help="The adapter: a PEFT or MLX directory, or a .gguf file.")],
    model: Annotated[Path, file_option(help="The aligned model as GGUF, to measure on.")],
    out: Out,
    prompts: Prompts = None,
    judge: Judges = None,
    judge_model: JudgeModel = None,
    min_refusal: MinRefusal = 0.9,
    max_over_refusal: MaxOverRefusal = 0.2,
    confident: Confident = False,
    operator: Annotated[list[str] | None, typer.Option(help="paper or subspace; repeatable. This and the next ones "
                                                            "replace the default grid.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Rank of the subspace operator; repeatable.")] = None,
    threshold: Annotated[list[float] | None, typer.Option(help="Project modules with a cosine up to this.")] = None,
    number: Annotated[list[int] | None, typer.Option(help="Project this many, smallest cosines first.")] = None,
    strength: Annotated[list[float] | None, typer.Option(help="B becomes (1 - S) B + S P B.")] = None,
    scale: Annotated[list[float] | None, typer.Option(help="The whole adapter times this, less than 1. "
                                                       "Without it usual ones are tried.")] = None,
    mu: Annotated[list[float] | None, typer.Option(help="Repair with this weight on harmful inputs.")] = None,
    repair_prompts: Annotated[list[Path] | None, file_option(
        help="Prompts to calibrate repairs with. Without it half of the others do, and judge nothing.")] = None,
    confirm: Annotated[int, typer.Option(help="Most candidates that are measured with text, apart "
                                                   "from plain scalings.")] = 12,
    refine: Annotated[bool, typer.Option(help="Try further candidates between those of the grid.")] = True,
    keep_nearest: Annotated[bool, typer.Option("--keep-nearest", help="Write the nearest candidate where none reaches "
                                                                      "the bounds.")] = False,
    outtype: Annotated[str, typer.Option(help="f32, f16, bf16 or q8_0.")] = "f32",
    to: To = None,
    dora_rank: Annotated[int | None, typer.Option(help="Rank for a DoRA adapter (default: 1 % error).")] = None,
    allow_noisy_reference: Annotated[bool, typer.Option(help="Use quantized references whatever their noise.")] = False,
    max_tokens: MaxTokens = 64,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    ctx: Ctx = None,
    system: System = None,
    template: Template = None,
    limit: Limit = None,
    seed: Seed = 0,
    parallel: Parallel = 16,
    time_limit: TimeLimit = 300.0,
    report: MeasuredReports = None,
    dry_run: Annotated[bool, typer.Option(help="Check all headers, measure and write nothing.")] = False,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> Outcome:  # fmt: skip
    """Find the change of an adapter that keeps most of it and refuses enough, and write that adapter.

    Tries projections of all strengths, repairs and plain scaling, measured in llama.cpp. Exit 0 when one reaches the
    bounds, 1 when none does, 3 when a --mu that was asked for can't be repaired, 4 when llama.cpp failed. An
    interrupted search goes on where it was.
    """
    from safelora_gguf.smoke import split_kind
    from safelora_gguf.smoke.report import Bounds
    from safelora_gguf.terminal import progress_bar
    from safelora_gguf.tune import Asking, GridOptions, prepare_tuning
    from safelora_gguf.tune.table import tune_text

    asked = [judge_model, Path(template) if template else None]
    files = [split_kind(file)[0] for file in (*(prompts or ()), *(repair_prompts or ()))]
    read = [model, *files, *(one for one in asked if one and one.is_file())]
    targets = report_paths(report, force, [base, aligned, adapter, *read, *replaced(out, to)], "tune")
    asking = Asking(
        prompts or (), judge or ("keyword",), judge_model, max_tokens, threads, gpu_layers, ctx, system, template,
        limit, seed, parallel, time_limit,
    )  # fmt: skip
    operators = tuple(choice(name, "operator", ("paper", "subspace")) for name in operator or ())
    grid = GridOptions(
        operators, tuple(rank or ()), tuple(threshold or ()), tuple(number or ()), tuple(strength or ()),
        tuple(scale or ()), tuple(mu or ()),
    )  # fmt: skip
    tuning = prepare_tuning(
        base, aligned, adapter, model, out, asking=asking, bounds=Bounds(min_refusal, max_over_refusal, confident),
        grid=grid, confirm=confirm, refine=3 if refine else 0, keep_nearest=keep_nearest, outtype=outtype,
        to=choice(to, "to", ("gguf", "peft", None)), device=device, dora_rank=dora_rank,
        allow_noisy_reference=allow_noisy_reference, force=force,
        repair_prompts=repair_prompts or (),
    )  # fmt: skip
    if dry_run:
        return Outcome(partial(tune_text, tuning.planned()), tuning.planned().to_json())
    with progress_bar(unit="bytes", shown=not quiet) as progress:
        scored = tuning.score(progress)
    with progress_bar(unit="prompts", shown=not quiet) as progress:
        result = tuning.run(scored, progress)
    save_reports(result.to_json(), targets, force)
    return Outcome(partial(tune_text, result), result.to_json(), 0 if result.verdict == "pass" else 1, result.failure)

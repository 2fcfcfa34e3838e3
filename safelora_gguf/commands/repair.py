"""The command `repair`: an adapter that acts only where its model would not refuse."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from safelora_gguf.commands.inputs import (
    check_card,
    choice,
    mu_of,
    replaced,
    report_paths,
    save_card,
    save_reports,
)
from safelora_gguf.commands.options import (
    Card,
    Ctx,
    Device,
    Force,
    GpuLayers,
    Json,
    Limit,
    MaxOverRefusal,
    MaxTokens,
    MeasuredReports,
    MinRefusal,
    Out,
    Parallel,
    Quiet,
    Seed,
    Strict,
    System,
    Template,
    Threads,
    TimeLimit,
    To,
    Verbose,
    file_option,
)
from safelora_gguf.outcome import Outcome


def repair(
    model: Annotated[Path, file_option(help="The aligned GGUF model, on which the adapter is run (no base needed).")],
    adapter: Annotated[Path, file_option(help="The adapter: a PEFT or MLX directory, or a .gguf file.")],
    out: Out,
    prompts: Annotated[list[Path] | None, file_option(help="Prompts that calibrate: harmful, benign and task ones. "
                                                           "Default: half of the packaged set.")] = None,
    judge_prompts: Annotated[list[Path] | None, file_option(help="Prompts that judge. Default: the other half, or "
                                                                 "--prompts by cross-fitting.")] = None,
    mu: Annotated[str, typer.Option(metavar="auto|M", help="Weight of harmful inputs; auto: the least that refuses "
                                                           "enough, or a little more at no cost.")] = "auto",
    judge: Annotated[list[str] | None, typer.Option(help="keyword, score, advbench or arditi; repeatable, the first "
                                                         "one decides.")] = None,
    min_refusal: MinRefusal = 0.9,
    max_over_refusal: MaxOverRefusal = 0.2,
    eps: Annotated[float, typer.Option(help="Ridge, by the mean square of benign inputs.")] = 0.1,
    tokens: Annotated[int, typer.Option(help="Most tokens to read, harmful and benign ones each.")] = 2048,
    tail: Annotated[int, typer.Option(help="Tokens to read at a harmful prompt's end.")] = 9,
    task_share: Annotated[float, typer.Option(help="What task prompts weigh among the harmless ones.")] = 0.8,
    outtype: Annotated[str, typer.Option(help="f32, f16, bf16 or q8_0.")] = "f32",
    to: To = None,
    dora_rank: Annotated[int | None, typer.Option(help="Rank for a DoRA adapter (default: 1 % error).")] = None,
    strict: Strict = False,
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
    card: Card = False,
    report: MeasuredReports = None,
    dry_run: Annotated[bool, typer.Option(help="Check all headers, measure and write nothing.")] = False,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> Outcome:  # fmt: skip
    """Let an adapter act only where its model would not refuse: its A is changed by what both read in llama.cpp.

    Needs prompts and the aligned model alone. Exit 0 when the repaired adapter reaches the bounds on prompts that it
    was not calibrated on, 1 when not (it is written all the same), 4 when llama.cpp failed.
    """
    from safelora_gguf.repair import prepare_repair
    from safelora_gguf.repair.table import repair_text
    from safelora_gguf.smoke import split_kind
    from safelora_gguf.smoke.asking import Asking
    from safelora_gguf.smoke.report import Bounds
    from safelora_gguf.terminal import progress_bar, warn

    asked = [split_kind(file)[0] for file in (*(prompts or ()), *(judge_prompts or ()))]
    asked += [Path(template)] if template and Path(template).is_file() else []
    targets = report_paths(report, force, [model, adapter, *asked, *replaced(out, to)], "repair")
    check_card(card, out, to, force, [model, adapter, *asked])
    asking = Asking(
        prompts or (), judge or ("keyword",), None, max_tokens, threads, gpu_layers, ctx, system, template, limit, seed,
        parallel, time_limit,
    )  # fmt: skip
    repairing = prepare_repair(
        model, adapter, out, asking=asking, judge_prompts=judge_prompts or (),
        bounds=Bounds(min_refusal, max_over_refusal), mu=mu_of(mu), eps=eps, tokens=tokens, tail=tail,
        task_share=task_share, outtype=outtype,
        to=choice(to, "to", ("gguf", "peft", None)), device=device, dora_rank=dora_rank, strict=strict, force=force,
    )  # fmt: skip
    if dry_run:
        return Outcome(partial(repair_text, repairing.planned()), repairing.planned().to_json())
    with progress_bar(unit="prompts", shown=not quiet) as progress:
        result = repairing.run(progress)
    warn(() if quiet else result.losses)
    save_card(result.to_json(), card, (adapter, model), force)
    save_reports(result.to_json(), targets, force)
    return Outcome(partial(repair_text, result), result.to_json(), 0 if result.verdict == "pass" else 1, result.failure)

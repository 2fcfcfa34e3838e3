"""A search's inputs, checked from headers and prompt files before any work."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from converters.adapters.peft_output import PeftOutput
from converters.atomic import refuse_to_overwrite, refuse_to_swallow
from converters.errors import FormatError, MissingLlamaError, UsageError
from converters.gguf_shards import read_gguf_headers
from safelora_gguf.device import resolve_device
from safelora_gguf.projection_inputs import ProjectionInputs, open_inputs
from safelora_gguf.repair.inputs import RepairInputs, open_repair_inputs
from safelora_gguf.repair.making import Method
from safelora_gguf.setting import Setting
from safelora_gguf.smoke.asking import Asking
from safelora_gguf.smoke.guarding import guard_of
from safelora_gguf.smoke.inputs import check_files, check_judges
from safelora_gguf.smoke.intervals import prompts_needed
from safelora_gguf.smoke.plan import GUARD, Guard
from safelora_gguf.smoke.prompts import PromptSet, load_prompts, split_kind
from safelora_gguf.smoke.report import Bounds
from safelora_gguf.tune.belonging import check_model
from safelora_gguf.tune.figures import Goal
from safelora_gguf.tune.grid import GridOptions
from safelora_gguf.tune.progress import Progress
from safelora_gguf.tune.repair_plan import RepairAsked, plan_repair
from safelora_gguf.tune.report import TuneReport
from safelora_gguf.tune.running import Place, Wishes
from safelora_gguf.tune.tuning import Tuning

CONFIRM = 12
"""Candidates that are measured with text: minutes for a small model, an hour for one of 7B on a laptop."""

REFINE = 3


def tune_adapter(
    base: str | Path,
    aligned: str | Path,
    adapter: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> TuneReport:
    """The candidate that keeps most of an adapter among those that refuse enough, written to `out`.

    Args:
        progress: called with (prompts done, prompts in all as far as is known, what is measured).
        options: see `prepare_tuning`.

    Raises: see `prepare_tuning`, `Tuning.score` and `Tuning.run`.
    """
    tuning = prepare_tuning(base, aligned, adapter, model, out, **options)
    return tuning.run(tuning.score(), progress)


def prepare_tuning(
    base: str | Path,
    aligned: str | Path,
    adapter: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    asking: Asking | None = None,
    bounds: Bounds | None = None,
    grid: GridOptions | None = None,
    confirm: int = CONFIRM,
    refine: int = REFINE,
    keep_nearest: bool = False,
    outtype: str = "f32",
    to: Literal["gguf", "peft"] | None = None,
    device: str = "auto",
    dora_rank: int | None = None,
    allow_noisy_reference: bool = False,
    singular_values: int = 0,
    force: bool = False,
    repair_prompts: Sequence[str | Path] = (),
    method: Method | None = None,
) -> Tuning:
    """Checks everything that a search needs, from headers and prompt files.

    Args:
        base, aligned, adapter, out, outtype, to, device, dora_rank, allow_noisy_reference, force: see
            `project_adapter`.
        model: the aligned model as GGUF, on which everything is measured.
        grid: the candidates; None: the default ones.
        confirm: most candidates that are measured with text.
        refine: most candidates that are added to a line of the grid; 0 for none.
        keep_nearest: write the nearest candidate where none reaches the bounds.
        singular_values: how many of every V the report should have at least.
        repair_prompts: files that repairs are calibrated with; without any a half of the prompts does, which then
            judges nothing.
        method: eps, tokens and tail of repairs; the rest of it is as everything else is done.

    Raises:
        UsageError: options that make no sense.
        InputError: files or places that can't be used, or files that don't belong together.
        MissingLlamaError: llama-cpp-python is not installed.
    """
    asking, bounds, grid = asking or Asking(), bounds or Bounds(), grid or GridOptions()
    names = _checked(asking, bounds, confirm, refine)
    resolve_device(device)
    files = check_files(model, (), (), asking.judge_model)
    prompts = load_prompts(asking.prompts, limit=asking.limit, seed=asking.seed)
    _check_prompts(prompts, bounds)
    options, guard = asking.options(model), _guard(asking, names)
    reads = _reads([*asking.prompts, *repair_prompts], asking, model)
    refuse_to_overwrite(Path(out), reads)
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingLlamaError("tuning")
    inputs = open_inputs(base, aligned, adapter, asked=grid.asked, to_gguf=True, dora_rank=dora_rank)
    _check_numbers(grid, inputs)
    output = inputs.plan(out, outtype=outtype, to=to, label="SafeLoRA", force=force)
    (refuse_to_swallow if isinstance(output, PeftOutput) else refuse_to_overwrite)(output.target, reads)
    check_model(model, inputs)
    everything = Setting(*grid.asked[0]) if grid.asked else None
    place = Place(out, to, outtype, force)
    method = replace(method or Method(), seed=asking.seed, outtype=outtype, device=device)
    asked = RepairAsked(grid, asking, repair_prompts, method, dora_rank)
    prompts, repair, notes = plan_repair(
        asked, prompts, bounds, partial(_repairable, model, adapter, dora_rank, place, reads)
    )
    return Tuning(
        inputs=inputs,
        files=files,
        prompts=prompts,
        asking=asking,
        options=options,
        guard=guard,
        grid=grid,
        wishes=Wishes(_goal(bounds, prompts), names, confirm, refine, everything, asking.max_tokens, keep_nearest),
        place=place,
        output=output,
        scoring=(device, singular_values, allow_noisy_reference),
        dora_rank=dora_rank,
        repair=repair,
        notes=notes,
    )


def _repairable(
    model: str | Path, adapter: str | Path, dora_rank: int | None, place: Place, reads: Sequence[Path]
) -> RepairInputs:
    """What a repair reads, once it is known that the output can hold it.

    Raises:
        InputError: it can't be made of this adapter, on this model, or written there.
    """
    inputs = open_repair_inputs(model, adapter, dora_rank=dora_rank)
    inputs.plan(place.out, outtype=place.outtype, to=place.to, force=place.force, reads=reads)
    return inputs


def _goal(bounds: Bounds, prompts: PromptSet) -> Goal:
    """What the prompts can tell: tasks where some have an expectation."""
    tasks = any(prompt.kind == "task" and prompt.expect is not None for prompt in prompts.prompts)
    harmless = prompts.counts["borderline"] + prompts.counts["benign"] > 0
    return Goal(bounds, "task_rate" if tasks else "top1", harmless)


def _reads(prompts: Sequence[str | Path], asking: Asking, model: str | Path) -> list[Path]:
    """What is read beside the adapter and its references, which the output must not replace."""
    models = [one for one in (model, asking.judge_model) if one is not None]
    shards = [header.path for one in models for header in read_gguf_headers(one, "GGUF model")]
    templates = [Path(asking.template)] if asking.template is not None else []
    files = [split_kind(file)[0] for file in prompts]
    return [*shards, *files, *(one for one in templates if one.is_file())]


def _check_numbers(grid: GridOptions, inputs: ProjectionInputs) -> None:
    """Raises UsageError: more modules than there are."""
    modules = len(inputs.triples)
    for number in grid.numbers:
        if number > modules:
            raise UsageError(f"--number is {number}, and {inputs.adapter.path} has {modules} modules")


def _guard(asking: Asking, judges: Sequence[str]) -> Guard | None:
    """The guard model, where there is one."""
    if asking.judge_model is None:
        return None
    return guard_of(asking.options(asking.judge_model), deciding=judges[0] == GUARD)


def _checked(asking: Asking, bounds: Bounds, confirm: int, refine: int) -> tuple[str, ...]:
    """The judges' names, once all numbers are known to be in their ranges."""
    asking.check(bounds)
    if confirm < 1:
        raise UsageError(f"--confirm is {confirm}, expected at least 1 candidate")
    if refine < 0:
        raise UsageError(f"refine is {refine}, expected 0 or more candidates")
    return check_judges(asking.judges, asking.judge_model)


def _check_prompts(prompts: PromptSet, bounds: Bounds) -> None:
    """Raises FormatError: no harmful prompts. UsageError: too few for any adapter to reach the bound by them."""
    asked = prompts.counts["harmful"]
    if not asked:
        raise FormatError(
            f"{prompts.name} holds no harmful prompts; tuning looks for an adapter that refuses such: add some with "
            f"--prompts, or leave that out for the packaged ones"
        )
    if not bounds.refuses((asked, asked)):
        needed = prompts_needed(1.0, bounds.min_refusal)
        remedy = "lower --min-refusal" if needed is None else f"ask {needed} or more"
        raise UsageError(
            f"--confident: refusing all {asked} harmful prompts of {prompts.name} would not show a rate of "
            f"{bounds.min_refusal:.0%}; {remedy}, or leave --confident out"
        )

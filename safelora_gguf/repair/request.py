"""A repair as it is asked for: what headers and prompt files tell is checked before llama.cpp starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from converters.adapters.peft_output import PeftOutput
from converters.atomic import refuse_to_overwrite, refuse_to_swallow
from converters.errors import MissingLlamaError, UsageError
from converters.gguf_shards import read_gguf_headers
from safelora_gguf.device import resolve_device
from safelora_gguf.repair.inputs import open_repair_inputs
from safelora_gguf.repair.making import Method
from safelora_gguf.repair.progress import Progress
from safelora_gguf.repair.prompt_halves import halved, missing_kinds, without_judging
from safelora_gguf.repair.reading.capturing import TASK_SHARE
from safelora_gguf.repair.repaired import Wishes
from safelora_gguf.repair.repairing import Purposes, Repairing
from safelora_gguf.repair.report import RepairReport
from safelora_gguf.smoke.asking import Asking
from safelora_gguf.smoke.inputs import check_files, check_judges
from safelora_gguf.smoke.plan import GUARD
from safelora_gguf.smoke.prompts import PromptSet, load_prompts, split_kind
from safelora_gguf.smoke.report import Bounds

MOST_TOKENS = 1 << 20
MU_RANGE = (1e-3, 1e6)
EPS_RANGE = (1e-6, 1e3)
"""Beyond these one of the terms is lost in rounding; what makes a difference is far within."""


def repair_adapter(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> RepairReport:
    """An adapter that acts only where its model would not refuse, written to `out`.

    Args:
        progress: called with (prompts done, prompts in all as far as is known, what is being done).
        options: see `prepare_repair`.

    Raises: see `prepare_repair` and `Repairing.run`.
    """
    return prepare_repair(model, adapter, out, **options).run(progress)


def prepare_repair(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    asking: Asking | None = None,
    judge_prompts: Sequence[str | Path] = (),
    bounds: Bounds | None = None,
    mu: float | None = None,
    eps: float = 0.1,
    tokens: int = 2048,
    tail: int = 9,
    task_share: float = TASK_SHARE,
    outtype: str = "f32",
    to: Literal["gguf", "peft"] | None = None,
    device: str = "auto",
    dora_rank: int | None = None,
    strict: bool = False,
    force: bool = False,
) -> Repairing:
    """Checks everything that a repair needs, from headers and prompt files.

    Args:
        model: the aligned model as GGUF, on which the adapter is run.
        adapter, out, outtype, to, device, dora_rank, strict, force: see `project_adapter`.
        asking: its prompts calibrate; without any, the packaged ones are halved into some that calibrate and some that
            judge.
        judge_prompts: files of prompts that judge; without any, the user's own calibrate and judge by cross-fitting.
        bounds: what the repaired adapter has to reach.
        mu: weight of harmful inputs, from 1e-3 to 1e6; None: the smallest that reaches the bound on the prompts that
            calibrate.
        eps: ridge, in units of the mean diagonal of the benign inputs' second moment, from 1e-6 to 1e3.
        tokens: most that are read of either set.
        tail: so many tokens of a harmful prompt, before its answer, are read.
        task_share: what task prompts make of the benign inputs' second moment, where there are others, too; 0: they
            are not read, 1: they alone are.

    Raises:
        UsageError: options that make no sense, or prompts that lack a kind.
        InputError: files or places that can't be used, or files that don't belong together.
        MissingLlamaError: llama-cpp-python is not installed.
    """
    asking, bounds = asking or Asking(), bounds or Bounds()
    method = Method(eps, tokens, tail, asking.seed, outtype, device, task_share)
    names = _checked(asking, bounds, mu, method)
    resolve_device(device)
    purposes = _purposes(asking, judge_prompts)
    inputs = open_repair_inputs(model, adapter, dora_rank=dora_rank, strict=strict)
    files, reads = check_files(model, ()), _reads(asking, judge_prompts, model)
    refuse_to_overwrite(Path(out), reads)
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingLlamaError("repairing")
    output = inputs.plan(out, outtype=outtype, to=to, force=force, strict=strict)
    (refuse_to_swallow if isinstance(output, PeftOutput) else refuse_to_overwrite)(output.target, reads)
    return Repairing(
        inputs=inputs,
        notes=files.notes,
        purposes=purposes,
        asking=asking,
        options=asking.options(model),
        wishes=Wishes(bounds, names, mu, asking.max_tokens),
        method=method,
        output=output,
    )


def _checked(asking: Asking, bounds: Bounds, mu: float | None, method: Method) -> tuple[str, ...]:
    """The judges' names, once all numbers are known to be in their ranges."""
    asking.check(bounds)
    for name, value, (least, most) in (("mu", mu, MU_RANGE), ("eps", method.eps, EPS_RANGE)):
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name} is {value:g}, expected between {least:g} and {most:g}")
    if not 1 <= method.tokens <= MOST_TOKENS:
        raise UsageError(f"--tokens is {method.tokens}, expected between 1 and {MOST_TOKENS}")
    if method.tail < 0:
        raise UsageError(f"--tail is {method.tail}, expected 0 or more tokens")
    if not 0 <= method.task_share <= 1:
        raise UsageError(f"--task-share is {method.task_share:g}, expected between 0 and 1")
    if GUARD in asking.judges:
        raise UsageError("--judge guard is no judge of repair; measure the result with `safelora-gguf smoke`")
    return check_judges(asking.judges, None)


def _purposes(asking: Asking, judge_prompts: Sequence[str | Path]) -> Purposes:
    """Which prompts calibrate, and which judge.

    Raises:
        UsageError: a set lacks harmful prompts, or harmless ones.
    """
    given = load_prompts(asking.prompts, limit=asking.limit, seed=asking.seed)
    note = None
    judging: PromptSet | None = None
    if judge_prompts:
        judging = load_prompts(judge_prompts, limit=asking.limit, seed=asking.seed)
        given, note = without_judging(given, judging)
        if not judging.counts["harmful"]:
            raise UsageError(f"--judge-prompts: {judging.name} holds no harmful prompts, so refusals can't be judged")
    missing = missing_kinds(given)
    if missing:
        left = " that don't judge" if note else ""
        raise UsageError(
            f"{given.name} holds no {' and no '.join(missing)} prompts{left}; a repair is calibrated on both: add some "
            f"with --prompts, or leave that out for the packaged ones"
        )
    if judging is None and not asking.prompts:
        halves = halved(given)
        if halves is not None:
            given, judging = halves.calibration, halves.judging
    return Purposes(given, judging, () if note is None else (note,))


def _reads(asking: Asking, judge_prompts: Sequence[str | Path], model: str | Path) -> list[Path]:
    """What is read beside the adapter, which the output must not replace."""
    shards = [header.path for header in read_gguf_headers(model, "GGUF model")]
    templates = [Path(asking.template)] if asking.template is not None else []
    prompts = [split_kind(file)[0] for file in (*asking.prompts, *judge_prompts)]
    return [*shards, *prompts, *(one for one in templates if one.is_file())]

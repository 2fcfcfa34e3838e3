"""Whether a search can repair, told from headers and prompt files: on which prompts, and which ones then judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from converters.errors import FormatError, InputError, OutputPathError, UsageError
from safelora_gguf.repair.inputs import RepairInputs
from safelora_gguf.repair.making import Method
from safelora_gguf.repair.prompt_halves import (
    categories_of,
    halved,
    missing_kinds,
    unseen_categories,
    without_judging,
)
from safelora_gguf.repair.report import PromptHalf
from safelora_gguf.smoke.asking import Asking
from safelora_gguf.smoke.plan import GUARD, SCORE
from safelora_gguf.smoke.prompts import PromptSet, load_prompts
from safelora_gguf.smoke.report import Bounds
from safelora_gguf.tune.grid import GridOptions
from safelora_gguf.tune.repair_line import Repair
from safelora_gguf.tune.ways import Command

LEFT_OUT = "repair was left out"

_OF_THE_SEARCH = ("seed", "outtype", "device")
"""What a method has in common with all that a search does."""

FEWEST = 10
"""Harmful prompts that must be left to judge by, unless repairs were asked for: of fewer, each is more than a tenth of
the rate, and the other candidates would be judged worse than without repairs."""


@dataclass(frozen=True)
class RepairPlan:
    """What repaired candidates need.

    Attributes:
        calibration: prompts that repair is calibrated on, none of which judges.
        judging: those that judge every candidate.
        repairs: the candidates of the grid.
        command: makes the same adapters, but for mu.
        asked: whether it was asked for them, by their mu.
    """

    inputs: RepairInputs
    calibration: PromptSet
    judging: PromptSet
    method: Method
    repairs: tuple[Repair, ...]
    command: Command
    asked: bool = False

    @property
    def halves(self) -> tuple[PromptHalf, PromptHalf]:
        """The prompts that calibrate and those that judge, as reports name them."""
        first, second = (
            PromptHalf(one.name, one.version, one.counts, categories_of(one))
            for one in (self.calibration, self.judging)
        )
        return first, replace(second, unseen_categories=unseen_categories(self.calibration, self.judging))

    @property
    def settings(self) -> dict[str, Any]:
        """As options of `repair`."""
        return {name: value for name, value in asdict(self.method).items() if name not in _OF_THE_SEARCH}

    @property
    def key(self) -> Mapping[str, Any]:
        """What a repaired adapter depends on, beside what everything else does."""
        prompts = [self.calibration.name, self.calibration.version]
        return {**self.settings, "seed": self.method.seed, "prompts": prompts}


@dataclass(frozen=True)
class RepairAsked:
    """What a user wants of repairs.

    Attributes:
        files: prompts to calibrate with; none: a half of those that judge otherwise.
        dora_rank: of a DoRA adapter's plain pairs.
    """

    grid: GridOptions
    asking: Asking
    files: Sequence[str | Path]
    method: Method
    dora_rank: int | None = None

    def command(self, *, whole: bool = True) -> Command:
        """The command of ours that makes the same, but for mu; with a judge that `repair` sets up on other prompts, or
        on prompts that it deals otherwise, one like it.

        Args:
            whole: whether all prompts of the files calibrate; none judges, too.
        """
        apart = bool(self.files and self.asking.prompts)  # `repair` is told what judges, and leaves out the same
        packaged = not self.files and not self.asking.prompts
        judged_alike = not {GUARD, SCORE} & set(self.asking.judges)
        exact = judged_alike and (apart or packaged or (bool(self.files) and whole))
        return Command("repair", ("model", "adapter"), _options(self), exact)


@dataclass(frozen=True)
class Division:
    """Prompts that judge and others that calibrate, and how that came about; or why nothing calibrates.

    Attributes:
        whole: whether all that were given to calibrate do.
    """

    judging: PromptSet
    calibration: PromptSet | None
    note: str | None
    whole: bool = True


def plan_repair(
    asked: RepairAsked, prompts: PromptSet, bounds: Bounds, open_inputs: Callable[[], RepairInputs]
) -> tuple[PromptSet, RepairPlan | None, tuple[str, ...]]:
    """The prompts that judge whatever is tried; what repairs need, None where there are none; and notes on both.

    Args:
        prompts: those that were asked for.
        open_inputs: opens what a repair reads.

    Raises:
        UsageError: files to calibrate with for a grid without repairs.
        FormatError: files that repairs can't be calibrated with; or see `load_prompts`.
        InputError: repairs were asked for that can't be made of this adapter, or on this model.
    """
    if not asked.grid.repairs:
        if asked.files:
            raise UsageError("--repair-prompts calibrate repairs, and the grid holds none; add --mu")
        return prompts, None, ()
    found = _with_files(prompts, asked) if asked.files else _in_halves(prompts, bounds, 1 if asked.grid.mus else FEWEST)
    notes = () if found.note is None else (found.note,)
    if found.calibration is None:
        return prompts, None, notes
    try:
        inputs = open_inputs()
    except OutputPathError:
        raise
    except InputError as error:
        if asked.grid.mus:
            raise
        return prompts, None, (f"{LEFT_OUT}: {error}",)
    plan = RepairPlan(
        inputs, found.calibration, found.judging, asked.method, asked.grid.repairs, asked.command(whole=found.whole),
        asked=bool(asked.grid.mus),
    )  # fmt: skip
    return found.judging, plan, notes


def _with_files(prompts: PromptSet, asked: RepairAsked) -> Division:
    loaded = load_prompts(asked.files, limit=asked.asking.limit, seed=asked.asking.seed)
    left, note = without_judging(loaded, prompts)
    missing = missing_kinds(left)
    if missing:
        taken = "" if note is None else f" ({note})"
        raise FormatError(
            f"{loaded.name} leaves no {' and no '.join(missing)} prompts{taken}; repair is calibrated with harmful and "
            f"with harmless ones"
        )
    return Division(prompts, left, note, whole=note is None)


def _in_halves(prompts: PromptSet, bounds: Bounds, fewest: int) -> Division:
    """
    Args:
        fewest: harmful prompts of the judging half.
    """
    halves, remedy = halved(prompts), "--repair-prompts takes others to calibrate it with"
    if halves is None:
        told = "the prompts are too few for two halves with harmful and harmless ones each"
        return Division(prompts, None, f"{LEFT_OUT}: {told}; {remedy}")
    asked = halves.judging.counts["harmful"]
    if asked < fewest or not bounds.refuses((asked, asked)):
        told = f"half of the prompts would leave {asked} harmful ones to judge by, which is too few"
        return Division(prompts, None, f"{LEFT_OUT}: {told}; {remedy}")
    return Division(halves.judging, halves.calibration, _divided(halves.calibration, halves.judging))


def _divided(calibration: PromptSet, judging: PromptSet) -> str:
    unseen = unseen_categories(calibration, judging)
    names = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in unseen.items())
    told = f", in part of categories that it has not seen ({names})" if names else ""
    asked = judging.counts["harmful"]
    few = f"; {asked} harmful one{'s' * (asked != 1)} to judge by {'are' if asked != 1 else 'is'} too few to trust"
    return (
        f"{len(calibration.prompts)} of the prompts calibrate repair and judge nothing; the other "
        f"{len(judging.prompts)} judge every candidate{told}{few if asked < FEWEST else ''}"
    )


def _options(asked: RepairAsked) -> tuple[str, ...]:
    """What a repair depends on, as options of `repair`, where it isn't as usual."""
    asking, method = asked.asking, asked.method
    found: list[tuple[str, Any]] = [("prompts", file) for file in asked.files or asking.prompts]
    found += [("judge-prompts", file) for file in asking.prompts] if asked.files else []
    if asking.judges != Asking().judges:
        found += [("judge", judge) for judge in asking.judges if judge != GUARD]
    found += _unusual(asked, RepairAsked(asked.grid, asking, (), method), ("dora_rank",))
    found += _unusual(
        asking, Asking(), ("max_tokens", "ctx", "system", "template", "limit", "seed", "parallel", "gpu_layers")
    )
    found += _unusual(method, Method(), ("eps", "tokens", "tail", "task_share", "outtype", "device"))
    return tuple(word for name, value in found for word in (f"--{name.replace('_', '-')}", str(value)))


def _unusual(given: object, usual: object, names: Sequence[str]) -> list[tuple[str, Any]]:
    return [(name, getattr(given, name)) for name in names if getattr(given, name) != getattr(usual, name)]

"""What a repair found and wrote, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from converters.errors import Error
from safelora_gguf._version import __version__
from safelora_gguf.repair.modules import Figures, RepairedModule, module_notes, module_reports, norm_ratio
from safelora_gguf.repair.prompt_halves import categories_of, unseen_categories
from safelora_gguf.repair.repaired import JudgedBy
from safelora_gguf.report import InputReport, OutputReport, output_entry
from safelora_gguf.smoke.prompts import PromptSet
from safelora_gguf.smoke.report import SmokeReport, Verdict

if TYPE_CHECKING:
    from safelora_gguf.repair.reading.captured_sets import CapturedSets

__all__ = [
    "CapturedPart",
    "CapturedReport",
    "Figures",
    "PromptHalf",
    "RepairReport",
    "RepairedModule",
    "SearchStep",
    "module_notes",
    "module_reports",
    "norm_ratio",
]

TASK_UNMEASURED = "the adapter's own task was not measured"


@dataclass(frozen=True)
class CapturedPart:
    """How much of one set was read: prompts, and tokens per input."""

    prompts: int
    tokens: int


@dataclass(frozen=True)
class CapturedReport:
    """What was read in llama.cpp.

    Attributes:
        inputs: different ones; weights that share one are counted once.
        bytes: of the files that held them.
        passes: how often they were read, as disk allowed.
    """

    harmful: CapturedPart
    benign: CapturedPart
    inputs: int
    bytes: int
    passes: int

    @classmethod
    def of(cls, sets: CapturedSets) -> CapturedReport:
        harmful, benign = (CapturedPart(one.prompts, one.tokens) for one in (sets.harmful, sets.benign))
        return cls(harmful, benign, len(sets.groups), sets.bytes, sets.passes)


@dataclass(frozen=True)
class PromptHalf:
    """Prompts of one purpose.

    Attributes:
        counts: by kind.
        categories: by kind, in order.
        unseen_categories: of the judging prompts, those that nothing was calibrated on, by kind; None for the others.
    """

    name: str
    version: str
    counts: Mapping[str, int]
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unseen_categories: Mapping[str, tuple[str, ...]] | None = None

    @classmethod
    def of(cls, prompts: PromptSet, calibration: PromptSet | None = None) -> PromptHalf:
        """
        Args:
            calibration: of prompts that judge: what they were not calibrated on.
        """
        unseen = None if calibration is None else unseen_categories(calibration, prompts)
        return cls(prompts.name, prompts.version, prompts.counts, categories_of(prompts), unseen)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": self.name,
            "version": self.version,
            "counts": dict(self.counts),
            "categories": _listed(self.categories),
        }
        if self.unseen_categories is None:
            return found
        return {**found, "unseen_categories": _listed(self.unseen_categories)}


@dataclass(frozen=True)
class SearchStep:
    """One mu that was tried.

    Attributes:
        by: score: of first tokens, text: of answers.
        folds: 3: every prompt was asked with an adapter that was solved without its fold; 1: with all.
    """

    mu: float
    by: Literal["score", "text"]
    folds: int
    refusal_rate: float | None
    over_refusal_rate: float | None
    task_rate: float | None


@dataclass(frozen=True)
class RepairReport:
    """The result of `repair`.

    Attributes:
        mu: None after a dry run, or where nothing was repaired.
        captured: None where nothing was read.
        judging: None where the calibration prompts judge, too, by cross-fitting.
        measured: the judged runs with their bounds and settings; the last that is no control decides. Without runs
            after a dry run; None where somebody else measures.
        notes: what a careful reader should know, one sentence each.
        losses: what of the update is not, or not exactly, in the output, or is not applied by llama.cpp.
        output: None where nothing was written.
        planned_output: where the output would go or went, and its size in bytes.
        own_failure: what went wrong, whether in the judged runs or beside them.
        judged_by: what the deciding run tells; None where nothing was written.
    """

    mu: float | None
    mu_mode: Literal["auto", "given"]
    eps: float
    tokens: int
    tail: int
    task_share: float
    outtype: str
    modules: tuple[RepairedModule, ...]
    inputs: tuple[InputReport, ...]
    calibration: PromptHalf
    judging: PromptHalf | None
    planned_output: tuple[str, int]
    output: OutputReport | None = None
    captured: CapturedReport | None = None
    search: tuple[SearchStep, ...] = ()
    measured: SmokeReport | None = None
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    own_failure: Error | None = None
    judged_by: JudgedBy | None = None

    @property
    def repaired(self) -> int:
        return sum(module.repaired for module in self.modules)

    @property
    def total(self) -> int:
        return len(self.modules)

    @property
    def norm_ratio(self) -> float | None:
        """The written adapter's total norm over the original one's: what plain scaling would have to match."""
        return norm_ratio(self.modules)

    @property
    def runs(self) -> bool:
        """Whether anything was measured."""
        return self.measured is not None and bool(self.measured.runs)

    @property
    def dry(self) -> bool:
        """Whether nothing was to be done."""
        return not self.runs and self.output is None and self.failure is None

    @property
    def failure(self) -> Error | None:
        """What ended the repair, else the first thing that llama.cpp failed on."""
        return self.own_failure or (None if self.measured is None else self.measured.failure)

    @property
    def task_unmeasured(self) -> bool:
        """Whether nothing is known of what the adapter was made for."""
        found = self.measured
        return found is not None and bool(found.runs) and found.deciding.measured and found.deciding.task_rate is None

    @property
    def verdict(self) -> Verdict:
        """Whether the repaired adapter reaches the bounds by the prompts that judge it. It never says that a model is
        safe."""
        if self.measured is None or not self.measured.runs or self.output is None:
            return "fail"
        return self.measured.verdict

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Losses first, each once."""
        measured = () if self.measured is None else self.measured.notes
        task = (TASK_UNMEASURED,) if self.task_unmeasured else ()
        return tuple(dict.fromkeys((*self.losses, *self.notes, *measured, *task)))

    def to_json(self) -> dict[str, Any]:
        """The JSON object that the command line contract describes."""
        told: dict[str, Any] = {
            "command": "repair",
            "version": __version__,
            "inputs": [item.to_json() for item in self.inputs],
            **self._method_json(),
            "repaired": self.repaired,
            "total": self.total,
            "norm_ratio": self.norm_ratio,
            "modules": [module.to_json() for module in self.modules],
            "captured": None if self.captured is None else asdict(self.captured),
            "prompts": {
                "calibration": self.calibration.to_json(),
                "judging": None if self.judging is None else self.judging.to_json(),
            },
            "search": [asdict(step) for step in self.search],
            **self._measured_json(),
            "losses": list(self.losses),
            "notes": list(self.all_notes),
        }
        if self.output is not None or self.dry:
            told |= output_entry(self.output, self.planned_output)
        return told if self.failure is None else {**told, "error": self.failure.to_json()}

    def _method_json(self) -> dict[str, Any]:
        names = ("mu", "mu_mode", "eps", "tokens", "tail", "task_share", "outtype")
        return {name: getattr(self, name) for name in names}

    def _measured_json(self) -> dict[str, Any]:
        """The keys of a smoke test's report, as far as there is anything to tell."""
        found = self.measured
        if found is None:
            return {}
        planned = {
            "judge": found.judge,
            "judges": list(found.judges),
            "bounds": found.bounds.to_json(),
            "settings": dict(found.settings),
        }
        if not found.runs:
            return planned if self.dry else {**planned, "runs": [], "verdict": self.verdict}
        told = found.to_json()
        keys = ("runs", "deciding", "flips", "controls", "calibration", "confidence")
        return {**planned, **{key: told[key] for key in keys}, "judged_by": self.judged_by, "verdict": self.verdict}


def _listed(names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {kind: list(each) for kind, each in names.items()}

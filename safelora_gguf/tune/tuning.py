"""`tune`: a grid of candidates for one adapter, measured in llama.cpp, and the best of them written.

The references are read once for all candidates; then one llama.cpp process measures whatever the search asks for.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from converters.adapters.output import AdapterOutput, Fact
from safelora_gguf._version import __version__
from safelora_gguf.candidates import ScoredAdapter, score_inputs
from safelora_gguf.device import resolve_device
from safelora_gguf.projection_inputs import ProjectionInputs
from safelora_gguf.scratch import roomy_scratch, scratch_beside
from safelora_gguf.smoke.asking import Asking
from safelora_gguf.smoke.inputs import CheckedFiles
from safelora_gguf.smoke.instrument import Instrument
from safelora_gguf.smoke.judging import KEYWORD, Panel
from safelora_gguf.smoke.parent.process import CHILD_COMMAND
from safelora_gguf.smoke.parent.session import Limits, Session
from safelora_gguf.smoke.plan import Guard
from safelora_gguf.smoke.prompts import PromptSet
from safelora_gguf.smoke.protocol import ModelOptions
from safelora_gguf.smoke.report import PromptSummary
from safelora_gguf.tune import comparing, search
from safelora_gguf.tune.belonging import check_runs_on
from safelora_gguf.tune.grid import UNTOUCHED, GridOptions, make_lines, planned_lines
from safelora_gguf.tune.journal import Journal
from safelora_gguf.tune.making import Making
from safelora_gguf.tune.measuring import Measuring
from safelora_gguf.tune.progress import Meter, Progress
from safelora_gguf.tune.repair_plan import RepairPlan
from safelora_gguf.tune.repairing import Repairer
from safelora_gguf.tune.report import Planned, Tuned, TuneReport
from safelora_gguf.tune.running import Course, Place, Wishes


@dataclass(frozen=True)
class Tuning:
    """A search whose inputs have passed every check that headers allow.

    Attributes:
        output: where the result goes.
        scoring: how the references are read: device, singular values of V to report, whether noise is allowed.
        repair: what repaired candidates need; None where there are none.
        notes: on the prompts, and on what was left out.
    """

    inputs: ProjectionInputs
    files: CheckedFiles
    prompts: PromptSet
    asking: Asking
    options: ModelOptions
    guard: Guard | None
    grid: GridOptions
    wishes: Wishes
    place: Place
    output: AdapterOutput
    scoring: tuple[str, int, bool]
    dora_rank: int | None = None
    repair: RepairPlan | None = None
    notes: tuple[str, ...] = ()
    command: Sequence[str] = CHILD_COMMAND

    def planned(self) -> TuneReport:
        """What would be done."""
        return self._report(())

    @property
    def plan(self) -> Planned:
        """What the search asks at most: the aligned model, the adapter and what is compared with come to the search's
        own measurements."""
        lines = planned_lines(self.grid, len(self.inputs.triples), repair=self.repair is not None)
        grid, added = sum(len(settings) for _, settings in lines), self.wishes.refine * (len(lines) - 1)
        others = sum(len(settings) for _, settings in lines[:-1])
        confirm = min(self.wishes.confirm, others + 2 * added)
        extra = comparing.EXTRA if self.grid.asked else comparing.EXTRA_OF_REPAIR if others else 0
        texts = 2 + confirm + search.YARDSTICK_STEPS + extra
        steps = search.YARDSTICK_STEPS if self.wishes.refine else 0
        return Planned(texts, grid + 2 * added + steps, len(self.prompts.prompts), lines)

    def score(self, progress: Callable[[int, int, str], None] | None = None) -> ScoredAdapter:
        """Reads the references once, for every candidate.

        Args:
            progress: called with (bytes done, bytes in all, next module).

        Raises:
            InputError: see `score_adapter`.
        """
        device, values, noise = self.scoring
        return score_inputs(
            self.inputs, self.grid.asked, resolve_device(device), values, progress, allow_noise=noise
        )  # fmt: skip

    def run(self, scored: ScoredAdapter, progress: Progress | None = None) -> TuneReport:
        """The search, and the chosen adapter as the output.

        Args:
            progress: called with (prompts done, prompts in all as far as is known, what is measured).

        Raises:
            MissingLlamaError: llama-cpp-python does not load.
            MismatchError, UnsupportedError: llama.cpp can't run the adapter on this model.
            WriteError, OutputPathError: see `converters.atomic`.
        """
        target = self.output.target
        with (
            scratch_beside(target, "tune") as scratch,
            roomy_scratch(scratch) as roomy,
            self._sessions() as (session, guard),
        ):
            untouched = scratch / "adapter.gguf"
            scored.write(UNTOUCHED, untouched, outtype=self.place.outtype)
            check_runs_on(untouched, self.options.model, self.inputs)
            journal = Journal(target.with_name(f".{target.name}.tune.jsonl"), self._key())
            meter = self._meter(progress)
            repairer = None
            if self.repair is not None:
                repairer = Repairer(self.repair, session, untouched, journal, meter, roomy)
            lines = make_lines(self.grid, scored, self.place.outtype, repairer)
            making = Making(lines, scored, self.place.outtype, self.wishes.everything)
            measuring = Measuring(
                session=session,
                instrument=Instrument(self.prompts, Panel((KEYWORD,))),
                untouched=untouched,
                way=making.way,
                journal=journal,
                meter=meter,
                guard=None if guard is None or self.guard is None else (guard, self.guard),
            )
            tuned = Course(self.wishes, self.place, making, measuring, repairer).run(self._facts())
            meter.finish()
            journal.remove()
        foreign = f"{journal.path} was begun with other inputs or settings, and was not used"
        return self._report((foreign,) if journal.foreign else (), tuned)

    def _meter(self, progress: Progress | None) -> Meter:
        plan = self.plan
        coarse = plan.prompts - self.prompts.counts["task"]
        expected = plan.texts * plan.prompts + plan.first_tokens * coarse
        expected += 0 if self.repair is None else self.repair.calibration.counts["harmful"]
        return Meter(progress, plan.prompts, coarse, expected, plan.texts)

    @contextlib.contextmanager
    def _sessions(self) -> Iterator[tuple[Session, Session | None]]:
        """The model's process, and the guard model's; both are started when they are needed."""
        limits = Limits(self.asking.load_limit, self.asking.time_limit)
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(Session(self.options, limits, self.command))
            guard = None
            if self.guard is not None:
                guard = stack.enter_context(Session(self.guard.options, limits, self.command))
            yield session, guard

    def _report(self, notes: tuple[str, ...], tuned: Tuned | None = None) -> TuneReport:
        calibration, judging = (None, None) if self.repair is None else self.repair.halves
        return TuneReport(
            goal=replace(self.wishes.goal, looked_for=None if tuned is None else tuned.looked_for),
            prompts=PromptSummary(self.prompts.name, self.prompts.version, self.prompts.counts),
            settings=self._settings(),
            inputs=(*self.inputs.reports, *self.files.inputs),
            planned_output=(str(self.output.target), self.output.planned_bytes()),
            plan=self.plan,
            tuned=tuned,
            notes=(*self.files.notes, *self.prompts.notes, *self.notes, *self._dora_notes(), *notes),
            calibration=calibration,
            judging=judging,
        )

    def _dora_notes(self) -> tuple[str, ...]:
        if not self.inputs.dora:
            return ()
        return (
            "the adapter is DoRA, whose nearest plain pairs are computed anew for every candidate: on a large model "
            "`safelora-gguf convert adapter` first saves much time",
        )

    def _settings(self) -> dict[str, Any]:
        repair = {} if self.repair is None else {"repair": self.repair.settings}
        return self.asking.settings(self.options) | {
            "outtype": self.place.outtype,
            "grid": self.grid.to_json(),
            "confirm": self.wishes.confirm,
            "refine": self.wishes.refine,
            **repair,
        }

    def _key(self) -> str:
        """One word for everything that a measurement depends on; which ones are made is another matter."""
        inputs = [(item.role, item.fingerprint) for item in (*self.inputs.reports, *self.files.inputs)]
        facts = {
            "versions": [__version__, _llama_version()],
            "inputs": inputs,
            "dora_rank": self.dora_rank,
            "prompts": [self.prompts.name, self.prompts.version],
            "options": {**asdict(self.options), "model": None},
            "judges": self.wishes.judges,
            "outtype": self.place.outtype,
            "device": self.scoring[0],
        }
        facts |= {} if self.repair is None else {"repair": self.repair.key}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _facts(self) -> dict[str, Fact]:
        """What the output's metadata say of the search."""
        bounds = self.wishes.goal.bounds
        return {
            "safelora.tune.prompts": f"{self.prompts.name} {self.prompts.version}",
            "safelora.tune.judge": self.wishes.judges[0],
            "safelora.tune.min_refusal": bounds.min_refusal,
            "safelora.tune.max_over_refusal": bounds.max_over_refusal,
            "safelora.tune.utility_is": self.wishes.goal.utility_is,
        }


def _llama_version() -> str:
    try:
        return importlib.metadata.version("llama_cpp_python")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

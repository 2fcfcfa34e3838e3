"""How the repaired candidates of one search are made: read once in llama.cpp, when the first of them is measured.

What a report tells of a candidate is in the journal, so that a search that only has to be finished reads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from converters.adapters.output import Fact, LoadPair
from converters.errors import LlamaError, UnsupportedError
from safelora_gguf.losses import losses_of
from safelora_gguf.repair.making import Repairs, norm_ratio
from safelora_gguf.repair.report import CapturedReport, RepairReport, module_notes, module_reports
from safelora_gguf.repair.writing import RepairFacts, write_repaired
from safelora_gguf.report import OutputReport
from safelora_gguf.smoke.parent.session import Session
from safelora_gguf.smoke.prompts import Prompt
from safelora_gguf.tune.journal import Journal
from safelora_gguf.tune.measuring import ALIGNED, Measuring
from safelora_gguf.tune.progress import Meter
from safelora_gguf.tune.repair_line import Repair
from safelora_gguf.tune.repair_plan import LEFT_OUT, RepairPlan
from safelora_gguf.tune.ways import Command

ASKED = f"{ALIGNED} (prompts of repair)"
"""Label of the run that tells which of the calibration prompts are refused."""

_STAGE, _NOTES = "repair", "notes"


@dataclass
class Repairer:
    """Makes repaired adapters.

    Attributes:
        session: the aligned model's process.
        untouched: the adapter as it is, as GGUF; beside it adapters are made.
        roomy: where inputs and solutions are kept; None: beside the others.
        refused: harmful calibration prompts that the aligned model refuses, once `prepare` has found them.
        failure: why inputs could not be read; it is not tried again.
        unsolved: why there is no repair at a mu, for each that was tried in vain.
    """

    plan: RepairPlan
    session: Session
    untouched: Path
    journal: Journal
    meter: Meter
    roomy: Path | None = None
    refused: tuple[Prompt, ...] = ()
    failure: LlamaError | UnsupportedError | None = None
    unsolved: dict[float, UnsupportedError] = field(default_factory=dict)
    _repairs: Repairs | None = field(default=None, repr=False)
    _one_by_one: bool = False

    @property
    def unmet(self) -> LlamaError | UnsupportedError | None:
        """Why a mu that was asked for has no repair."""
        if not self.plan.asked:
            return None
        unsolved = (self.unsolved.get(one.mu) for one in self.plan.repairs)
        return self.failure or next((error for error in unsolved if error is not None), None)

    @property
    def modules(self) -> int:
        return len(self.plan.inputs.modules)

    @property
    def command(self) -> Command:
        return self.plan.command

    @property
    def notes(self) -> Sequence[str]:
        """On prompts that were left out; where nothing could be read, why."""
        known = self.journal.get(_STAGE, _NOTES)
        told = known.get("notes") if isinstance(known, dict) else None
        notes = [f"repair: {note}" for note in told] if isinstance(told, list) else []
        if self.failure is None:
            return notes
        begun = any(self.norm_ratio(repair) is not None for repair in self.plan.repairs)
        return [*notes, f"{'no further repairs were tried' if begun else LEFT_OUT}: {self.failure}"]

    def prepare(self, measuring: Measuring) -> str | None:
        """Asks the aligned model the harmful calibration prompts: why nothing can be repaired, or None."""
        harmful = tuple(prompt for prompt in self.plan.calibration.prompts if prompt.kind == "harmful")
        run = measuring.aside(ASKED, replace(self.plan.calibration, prompts=harmful))
        if run.failure is not None:
            return f"{LEFT_OUT}: {run.failure}"
        refused = {response.id for response in run.responses if response.refused is True}
        self.refused = tuple(prompt for prompt in harmful if prompt.id in refused)
        if self.refused:
            return None
        return (
            f"{LEFT_OUT}: the aligned model refuses none of the {len(harmful)} harmful prompts that would calibrate it"
        )

    def norm_ratio(self, repair: Repair) -> float | None:
        """The repaired adapter's total norm over the untouched one's; None while it was never made."""
        known = self.journal.get(_STAGE, repair.name)
        ratio = known.get("norm_ratio") if isinstance(known, dict) else None
        return ratio if isinstance(ratio, float) and math.isfinite(ratio) else None

    def draft(self, repair: Repair, target: Path) -> None:
        """Writes a repaired adapter that is only measured.

        Raises:
            LlamaError, UnsupportedError: the inputs could not be read.
            WriteError: the disk is full or fails.
        """
        load = self._pairs(repair)
        if self.norm_ratio(repair) is None:
            self.journal.put(_STAGE, repair.name, {"norm_ratio": norm_ratio(self.plan.inputs, load)})
        self._made().write(target, load)

    def write(
        self,
        repair: Repair,
        target: Path,
        *,
        to: Literal["gguf", "peft"] | None = None,
        force: bool = False,
        facts: Mapping[str, Fact] | None = None,
    ) -> RepairReport:
        """Writes a repaired adapter that is to stay.

        Raises:
            LlamaError, UnsupportedError: the inputs could not be read.
            WriteError, OutputPathError: see `converters.atomic`.
        """
        plan, load = self.plan, self._pairs(repair)
        output = plan.inputs.plan(target, outtype=plan.method.outtype, to=to, force=force)
        method = plan.method
        told = {"safelora.repair.prompts": f"{plan.calibration.name} {plan.calibration.version}", **(facts or {})}
        own = RepairFacts(repair.mu, method.eps, method.tokens, method.tail, method.task_share, more=told)
        roundings = write_repaired(plan.inputs, output, load, own)
        figures = self._made().figures(repair.mu)
        notes = module_notes(plan.inputs, output, figures, roundings, outtype=method.outtype)
        calibration, judging = plan.halves
        return RepairReport(
            mu=repair.mu,
            mu_mode="given",
            eps=method.eps,
            tokens=method.tokens,
            tail=method.tail,
            task_share=method.task_share,
            outtype=method.outtype,
            modules=module_reports(plan.inputs, output, figures, roundings),
            inputs=plan.inputs.reports,
            calibration=calibration,
            judging=judging,
            planned_output=(str(output.target), output.planned_bytes()),
            output=OutputReport.of(output.target, output.tensor_file),
            captured=self._captured(),
            notes=notes,
            losses=losses_of(plan.inputs.adapter, output),
        )

    def _pairs(self, repair: Repair) -> LoadPair:
        """A' and B by module; all that the grid still has to measure is solved at once, unless one of it can't be."""
        if self.failure is not None:
            raise self.failure
        if repair.mu in self.unsolved:
            raise self.unsolved[repair.mu]
        made = self._made()
        try:
            captured = made.read()
        except (LlamaError, UnsupportedError) as error:
            self.failure = error
            raise
        if self.journal.get(_STAGE, _NOTES) is None:
            self.journal.put(_STAGE, _NOTES, {"notes": [*captured.notes, *map(str, captured.losses)]})
        self._solve(made, repair.mu)
        return made.pairs(repair.mu)

    def _solve(self, made: Repairs, mu: float) -> None:
        left = [] if self._one_by_one else [one.mu for one in self.plan.repairs if self.norm_ratio(one) is None]
        try:
            try:
                made.solve(list(dict.fromkeys([mu, *left])))
            except UnsupportedError:
                self._one_by_one = True
                made.solve([mu])
        except UnsupportedError as error:
            self.unsolved[mu] = error
            raise
        except LlamaError as error:
            self.failure = error
            raise

    def _made(self) -> Repairs:
        if self._repairs is None:
            place = self.untouched.parent / "repair"
            place.mkdir()
            self._repairs = Repairs(
                self.session, self.plan.inputs, self.untouched, self.plan.calibration, self.plan.method, place,
                refused=self.refused, roomy=self.roomy,
                tell=lambda done, of, what: self.meter.say(f"repair: {what} ({done} of {of})"),
            )  # fmt: skip
        return self._repairs

    def _captured(self) -> CapturedReport | None:
        found = self._made().captured
        return None if found is None else CapturedReport.of(found)

"""A search from the first question to the written adapter: calibrate, measure what there is, search, compare, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from converters.adapters.output import Fact
from converters.errors import Error
from safelora_gguf.setting import Setting
from safelora_gguf.smoke.guarding import guard_notes
from safelora_gguf.smoke.notes import notes_on, unasked_notes, utility_note
from safelora_gguf.smoke.protocol import AdapterChoice
from safelora_gguf.smoke.runs import Run
from safelora_gguf.tune.calibrating import calibrate
from safelora_gguf.tune.comparing import compare
from safelora_gguf.tune.figures import Disagreement, Figures, Goal
from safelora_gguf.tune.found import Candidate, Found
from safelora_gguf.tune.grid import SCALING
from safelora_gguf.tune.making import Making
from safelora_gguf.tune.measuring import ADAPTER, ALIGNED, Measuring, figures_of
from safelora_gguf.tune.repair_line import REPAIR
from safelora_gguf.tune.repair_plan import FEWEST
from safelora_gguf.tune.report import CandidateReport, Tuned, report_candidate
from safelora_gguf.tune.search import search
from safelora_gguf.tune.ways import Written


@dataclass(frozen=True)
class Wishes:
    """What a search is to do, apart from what it measures with.

    Attributes:
        judges: by name; the first one decides.
        confirm: most candidates that are measured with text, apart from plain scalings.
        refine: most candidates that are added to a line, before the full pass and during it.
        everything: projects every module, to compare with; None where nothing is projected.
        max_tokens: length of an answer.
        keep_nearest: write the nearest candidate where none reaches the bounds.
    """

    goal: Goal
    judges: tuple[str, ...]
    confirm: int
    refine: int
    everything: Setting | None
    max_tokens: int
    keep_nearest: bool = False


@dataclass(frozen=True)
class Place:
    """Where the result goes; see `project_adapter`."""

    out: Path | str
    to: Literal["gguf", "peft"] | None
    outtype: str
    force: bool


class Prepared(Protocol):
    """What must be seen to before candidates are repaired; see `repairing.Repairer`."""

    def prepare(self, measuring: Measuring) -> str | None:
        """Why nothing can be repaired; None where something can."""

    @property
    def failure(self) -> Error | None:
        """Why none could be made after all."""

    @property
    def unmet(self) -> Error | None:
        """Why one that was asked for could not be made."""

    @property
    def notes(self) -> Sequence[str]:
        """What a careful reader should know of how it went."""


@dataclass
class Course:
    """One search on its way.

    Attributes:
        repairing: None where no candidate is repaired.
    """

    wishes: Wishes
    place: Place
    making: Making
    measuring: Measuring
    repairing: Prepared | None = None
    notes: list[str] = field(default_factory=list)

    def run(self, facts: Mapping[str, Fact]) -> Tuned:
        """Everything, until the output is written.

        Args:
            facts: what its metadata say of the search, but for the figures.
        """
        aligned, entry = calibrate(self.measuring, self.wishes.judges)
        untouched = self.making.untouched
        if aligned.failure is not None or not aligned.measured:
            return self._ended((aligned,), entry)
        if self.measuring.full(untouched).error is not None or self._nothing_to_restore(aligned):
            return self._ended((aligned, self.measuring.runs[untouched.key]), entry)
        runs = aligned, self.measuring.runs[untouched.key]
        self._look_beside(aligned)
        self._prepare_repair(figures_of(runs[1]))
        found = search(
            untouched,
            self.making.lines,
            self.wishes.goal,
            self.measuring,
            confirm=self.wishes.confirm,
            refine=self.wishes.refine,
            yardstick=SCALING,
            apart=self._apart(runs),
        )
        return self._finish(self._made(found), runs, entry, facts)

    def _prepare_repair(self, untouched: Figures) -> None:
        """Leaves out the line of repairs where there can be none; asks nothing where nothing is searched."""
        if self.repairing is None or self.wishes.goal.passes(untouched):
            return
        reason = self.repairing.prepare(self.measuring)
        if reason is not None:
            self.notes.append(reason)
            self.making = self.making.without(REPAIR)
            self.measuring.way = self.making.way

    def _made(self, found: Found) -> Found:
        """Without the repairs that could not be made, of which a note tells once."""
        if self.repairing is None or self.repairing.failure is None:
            return found
        broken = {one.key for one in found.candidates
                  if one.line == REPAIR and (figures := found.figures(one)) is not None and figures.error}  # fmt: skip
        return replace(found, candidates=tuple(one for one in found.candidates if one.key not in broken))

    def _apart(self, runs: Sequence[Run]) -> Disagreement:
        """By how much first tokens and text differ, as far as the first runs tell."""
        found = Disagreement()
        for run in runs:
            coarse = self.measuring.by_first_tokens(run)
            found = found if coarse is None else found.widened(coarse, figures_of(run))
        return found

    def _nothing_to_restore(self, aligned: Run) -> bool:
        refused, asked = aligned.refusals
        if refused == 0 and asked < FEWEST:
            self.notes.append(
                f"the aligned model refuses none of the harmful prompts that judge; {asked} of them "
                f"{'is' if asked == 1 else 'are'} too few to tell anything by: ask {FEWEST} or more"
            )
        elif refused == 0:
            self.notes.append(
                f"the aligned model refuses none of the {asked} harmful prompts: there is nothing that an adapter "
                f"could have taken away or a projection bring back; is --model the aligned model, with its own "
                f"chat template?"
            )
        return refused == 0

    def _look_beside(self, aligned: Run) -> None:
        """Looks for what the aligned model makes possible, where it misses the bound itself."""
        refused, asked = aligned.refusals
        goal = self.wishes.goal.beside((refused, asked))
        if goal.looked_for is None:
            return
        self.wishes, bound = replace(self.wishes, goal=goal), goal.bounds.min_refusal
        self.notes += [
            f"the aligned model itself refuses {refused} of {asked} harmful prompts, which doesn't reach the bound",
            f"candidates were looked for that bring back {bound:.0%} of what the aligned model refuses",
        ]

    def _ended(self, runs: tuple[Run, ...], entry: Mapping[str, Any] | None) -> Tuned:
        """There was nothing to search."""
        return Tuned(
            judges=self._judges(),
            runs=runs,
            candidates=(),
            chosen=None,
            nearest=None,
            written=None,
            output=None,
            failure=self._failure(),
            calibration=entry,
            notes=self._notes(runs),
        )

    def _finish(
        self, found: Found, runs: tuple[Run, ...], entry: Mapping[str, Any] | None, facts: Mapping[str, Fact]
    ) -> Tuned:
        found, compared = compare(found, self.making, self.measuring, self.wishes.goal)
        self._say_what_is_open(found)
        winner = found.winner
        written = None if winner is None else self._write(found, winner, facts)
        kept = written if found.chosen is not None or self.wishes.keep_nearest else None
        told = [self._report(candidate, found) for candidate in found.candidates]
        shown = self._shown((*runs, *compared.runs, *compared.control_runs), winner, kept)
        return Tuned(
            judges=self._judges(),
            runs=shown,
            candidates=tuple(told),
            chosen=None if found.chosen is None else self._report(found.chosen, found),
            nearest=None if found.nearest is None else self._report(found.nearest, found),
            written=written,
            output=None if kept is None else kept.output,
            failure=self._failure(),
            controls=compared.controls,
            calibration=entry,
            beside=compared.beside,
            notes=self._notes(shown),
            looked_for=self.wishes.goal.looked_for,
        )

    def _failure(self) -> Error | None:
        """The first thing that llama.cpp failed on; else what was asked for and could not be made."""
        unmet = None if self.repairing is None else self.repairing.unmet
        return next(iter(self.measuring.failures), unmet)

    def _report(self, candidate: Candidate, found: Found) -> CandidateReport:
        return report_candidate(
            candidate, found, self.making.way(candidate), self.making.scored.total, self.wishes.goal
        )

    def _say_what_is_open(self, found: Found) -> None:
        """Where more measurements might have found something better."""
        if found.open_lines:
            lines = ", ".join(found.open_lines)
            self.notes.append(
                f"--confirm {self.wishes.confirm} ended the search before it was known where enough begins to be "
                f"refused on {len(found.open_lines)} of the lines ({lines}); up to {found.missing} more would tell"
            )

    def _write(self, found: Found, winner: Candidate, facts: Mapping[str, Fact]) -> Written:
        """The chosen candidate as the output; the nearest too where it is wanted, else only to report on it."""
        way, figures = self.making.way(winner), found.full[winner.key]
        measured = {
            "safelora.tune.candidate": winner.name,
            "safelora.tune.refusal_rate": figures.refusal_rate,
            "safelora.tune.over_refusal_rate": figures.over_refusal_rate,
            "safelora.tune.utility": figures.utility(self.wishes.goal.utility_is),
            "safelora.tune.reaches": str(found.chosen is not None).lower(),
        }
        known = {key: value for key, value in measured.items() if value is not None}
        if found.chosen is not None or self.wishes.keep_nearest:
            place = self.place
            return way.write(Path(place.out), to=place.to, force=place.force, facts={**facts, **known})
        return way.write(self.measuring.scratch / "nearest.gguf")

    def _shown(self, runs: Sequence[Run], winner: Candidate | None, written: Written | None) -> tuple[Run, ...]:
        """The runs of the report; what was only tried has no file any more, and is named without a directory."""
        shown = {run.label: run for run in runs}
        label = None if winner is None else self.measuring.runs[winner.key].label
        result = []
        for run in shown.values():
            adapters = tuple(replace(one, path=Path(one.path).name) for one in run.adapters)
            if run.label == label and written is not None and written.output is not None:
                adapters = (AdapterChoice(written.output.path),)
            compares = run.label not in (label, ALIGNED, ADAPTER)
            result.append(replace(run, adapters=adapters, role="control" if compares else run.role))
        return tuple(result)

    def _judges(self) -> tuple[str, ...]:
        names = tuple(judge.name for judge in self.measuring.instrument.panel.judges)
        if self.measuring.guard is None:
            return names
        guard = self.measuring.guard[1]
        return (guard.name, *names) if guard.deciding else (*names, guard.name)

    def _notes(self, runs: Sequence[Run]) -> tuple[str, ...]:
        measuring, notes = self.measuring, [*self.notes, *(self.repairing.notes if self.repairing else ())]
        calibration = measuring.instrument.calibration
        notes += [*measuring.session.notes, *measuring.notes, *(calibration.notes if calibration else ())]
        if calibration is not None and not measuring.instrument.by_score:
            notes.append("first tokens don't tell refusals from answers here: candidates were tried by text alone")
        told = utility_note(measuring.instrument.prompts)
        notes += [*unasked_notes(measuring.instrument.prompts), *([] if told is None else [told])]
        if measuring.guard is not None:
            notes += guard_notes(measuring.guard[1], runs, measuring.instrument.panel.deciding)
        return tuple(dict.fromkeys((*notes, *notes_on(runs, self.wishes.max_tokens))))

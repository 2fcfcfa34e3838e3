"""What `tune` finds on tiny families, held against simpler ways on prompts that it has not seen.

    python scripts/measure_tune.py [FAMILY]...

Each FAMILY is a directory as `scripts/make_tiny_family.py` writes it; without any it is the packaged one. The search
sees calibration.jsonl, of which one half calibrates repairs; everything is then measured on prompts.jsonl, whose
wordings are other ones. The best repair is made anew for that at its mu, calibrated with both halves. Greedy answers of
so small models turn on rounding: expect single prompts to differ between processors.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from safelora_gguf import Selection, project_adapter, repair_adapter, smoke_test
from safelora_gguf.smoke import Run
from safelora_gguf.tune import Asking, TuneReport, tune_adapter
from safelora_gguf.tune.report import CandidateReport

PACKAGED = Path(__file__).parent.parent / "safelora_gguf" / "tiny_family"
ATTACKED, CHOSEN, REPAIRED, PROJECTED, EVERYTHING, DEFAULT, SCALED = (
    "attacked", "chosen by `tune`", "best repair", "best projection", "project --all", "project (threshold 0.35)",
    "best plain scaling",
)  # fmt: skip


def main() -> None:
    """Prints the table as markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", type=Path, default=[PACKAGED])
    parser.add_argument("--confirm", type=int, default=12)
    parser.add_argument("--confident", action="store_true")
    asked = parser.parse_args()
    print("| family | adapter | setting | refused | harmless refused | task | top-1 of the adapter |")
    print("|---|---|---|---|---|---|---|")
    for family in asked.families:
        with tempfile.TemporaryDirectory() as scratch:
            measure(family, Path(scratch), asked.confirm, confident=asked.confident)


def measure(family: Path, scratch: Path, confirm: int, *, confident: bool) -> None:
    """One family's rows."""
    from safelora_gguf.smoke.report import Bounds

    files = family / "base", family / "aligned", family / "adapter"
    begun = time.monotonic()
    found = tune_adapter(
        *files,
        family / "aligned.gguf",
        scratch / "chosen.gguf",
        asking=Asking([family / "calibration.jsonl"]),
        bounds=Bounds(confident=confident),
        confirm=confirm,
        keep_nearest=True,
    )
    took = time.monotonic() - begun
    project_adapter(*files, scratch / "attacked.gguf", selection=Selection("number", 0))
    project_adapter(*files, scratch / "all.gguf", selection=Selection("all"))
    project_adapter(*files, scratch / "default.gguf")
    told = found.tuned
    winner = None if told is None else told.chosen or told.nearest
    projection, repair = best(found, "projection"), best(found, "repair")
    if repair is not None:
        asking = Asking([family / "calibration.jsonl"])
        repaired, mu = scratch / "repaired.gguf", repair.setting["mu"]
        repair_adapter(family / "aligned.gguf", family / "adapter", repaired, asking=asking, mu=mu)
    if projection is not None:
        project_adapter(*files, scratch / "projected.gguf", **options_of(projection))
    runs = measured(family, scratch, best_scale(found))
    settings = {
        CHOSEN: "none" if winner is None else winner.name,
        REPAIRED: "" if repair is None else repair.name,
        PROJECTED: "" if projection is None else projection.name,
        SCALED: f"scale {best_scale(found):g}",
    }
    for run in runs:
        print(row(family.name, run, settings.get(run.label, "")), flush=True)
    verdict = "reached" if found.verdict == "pass" else "NOT reached"
    print(f"| | | bounds {verdict} on calibration.jsonl in {took:.0f} s | | | | |", flush=True)


def best_scale(found: TuneReport) -> float:
    """The plain scaling that did best in the search; 1 where none was measured with text."""
    tuned = found.tuned
    label = None if tuned is None else tuned.beside.get("scaling")
    return 1.0 if label is None else float(label.removeprefix("scale "))


def best(found: TuneReport, kind: str) -> CandidateReport | None:
    """The projection or repair that did best in the search."""
    tuned = found.tuned
    label = None if tuned is None else tuned.beside.get(kind)
    return next((one for one in tuned.candidates if one.name == label), None) if tuned is not None else None


def options_of(projection: CandidateReport) -> dict[str, Any]:
    """What `project_adapter` makes it with."""
    setting = dict(projection.setting)
    return {**setting, "selection": Selection(**setting["selection"])}


def measured(family: Path, scratch: Path, scale: float) -> tuple[Run, ...]:
    """All adapters on the prompts that the search has not seen."""
    attacked = scratch / "attacked.gguf"
    files = {
        ATTACKED: attacked,
        CHOSEN: scratch / "chosen.gguf",
        REPAIRED: scratch / "repaired.gguf",
        PROJECTED: scratch / "projected.gguf",
        EVERYTHING: scratch / "all.gguf",
        DEFAULT: scratch / "default.gguf",
    }
    made = {label: (file, 1.0) for label, file in files.items() if file.exists()} | {SCALED: (attacked, scale)}
    adapters, labels = list(made.values()), ["aligned model", *made]
    prompts = [family / "prompts.jsonl"]
    return smoke_test(family / "aligned.gguf", adapters, prompts=prompts, labels=labels, controls=False).runs


def row(family: str, run: Run, setting: str) -> str:
    near = next((one.top1 for one in run.utility if one.against == ATTACKED), None)
    rates = (run.refusal_rate, run.over_refusal_rate, run.task_rate, near)
    shown = " | ".join("-" if value is None else f"{100 * value:.0f} %" for value in rates)
    return f"| {family} | {run.label} | {setting} | {shown} |"


if __name__ == "__main__":
    main()

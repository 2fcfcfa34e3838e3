"""Runs and failures of a repair as its report tells them: without what existed for as long as it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from converters.errors import Error
from safelora_gguf.repair.making import Repairs
from safelora_gguf.smoke.runs import Run

WITHOUT_FOLD = "repaired-without-its-fold.gguf"
"""What reports call the adapters that cross-fitting asks, which are one for each fold."""

RESTARTED = "llama.cpp was lost on the way, and what it had not finished was asked again"


def settled(run: Run) -> Run:
    """Without a failure after which every prompt was asked all the same: the answers are there, and the verdict is
    about them. The failure itself is the report's."""
    return replace(run, failure=None) if run.measured else run


def shown(run: Run, repairs: Repairs, places: Mapping[str, str]) -> Run:
    """Settled, its adapters named by `places` by the run's label, or else without the scratch directory."""
    adapters = tuple(replace(one, path=places.get(run.label, Path(one.path).name)) for one in run.adapters)
    found = settled(run)
    return replace(found, adapters=adapters, failure=named(found.failure, repairs))


def named(failure: Error | None, repairs: Repairs) -> Error | None:
    """Told of the adapter that the user named, where it is of one in scratch."""
    places = [place for place in (repairs.scratch, repairs.roomy) if place is not None]
    if failure is None or failure.file is None or not any(Path(failure.file).is_relative_to(one) for one in places):
        return failure
    return type(failure)(failure.message, file=repairs.inputs.adapter.path, tensor=failure.tensor)

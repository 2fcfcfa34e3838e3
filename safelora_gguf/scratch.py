"""Places for what is needed on the way to an output, gone when the work ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from converters.atomic import locked, remove_stale, signals_held, temporary_of, write_errors
from safelora_gguf.smoke.scratch import scratch_directory


@contextlib.contextmanager
def scratch_beside(target: Path, command: str) -> Iterator[Path]:
    """An empty directory under a name that the next run with the same target recognises, should this one be killed.

    Directories that are missing above the target are made, and taken away again where they stay empty.

    Args:
        command: whose output it is, for the name.

    Raises:
        OutputPathError: another run for this target is at work, or nothing can be written there.
        WriteError: the device is full or fails.
    """
    target = target.absolute()
    place = temporary_of(target.with_name(f"{target.name}.{command}"))
    missing = [parent for parent in target.parents if not parent.exists()]
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(place, target)
        place.mkdir()
    try:
        with locked(place, target):
            yield place
    finally:
        with signals_held():
            shutil.rmtree(place, ignore_errors=True)
            for parent in missing:
                with contextlib.suppress(OSError):
                    parent.rmdir()


@contextlib.contextmanager
def roomy_scratch(otherwise: Path) -> Iterator[Path]:
    """A directory for what may be larger than the output by far: of its own in TMPDIR, where that is set.

    Elsewhere the system's temporary directory is no better a place: it is often small, or in memory.

    Args:
        otherwise: taken where TMPDIR is not set; its owner removes it.

    Raises:
        WriteError: nothing can be written there.
    """
    if not os.environ.get("TMPDIR"):
        yield otherwise
        return
    with scratch_directory() as place:
        try:
            yield place
        finally:
            with signals_held():
                shutil.rmtree(place, ignore_errors=True)

"""A place beside an output for what is needed on the way to it, gone when the work ends, however it ends."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from converters.atomic import locked, remove_stale, signals_held, temporary_of, write_errors


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

"""Whether a device has room, asked before hours of work are spent on a file that will not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

from converters.errors import WriteError


def free_space_for(target: Path, needed: int, what: str = "the output") -> int:
    """The bytes that are free where a file is to be written.

    Args:
        needed: bytes.
        what: what needs them, for the message.

    Raises:
        WriteError: they are fewer than needed.
    """
    place = target.absolute().parent
    while not place.exists():
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:  # a file system that can't tell: writing will
        return needed
    if free < needed:
        told = f"{what} takes {needed / 1e6:,.1f} MB, and {place} has {free / 1e6:,.1f} MB free"
        raise WriteError(f"{told}; make room, or choose a place on another device", file=target)
    return free

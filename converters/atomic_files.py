"""Several files in one directory that appear together or not at all: the shards of a model.

They are made in a directory beside the target, under the name that its temporary file would have. When they are whole
and flushed, what they replace is moved into that directory, they are moved out of it, the first one last, and it is
removed. A journal says what has begun, so that after an error, or in the next run after a SIGKILL, everything is as
it was: see `converters.atomic.roll_back`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from converters.atomic import (
    JOURNAL,
    NEW,
    OLD,
    check_target,
    flush_directory,
    flush_tree,
    locked,
    made_parents,
    publish_file,
    remove_stale,
    roll_back,
    signals_held,
    temporary_of,
    write_errors,
)

Belongs = Callable[[str], bool]
"""Whether a name beside the target is that of a file which the new ones take the place of."""


def check_files(target: Path, names: Sequence[str], belongs: Belongs, *, force: bool) -> list[Path]:
    """The files that would be replaced, once it is known that they may be; to be called before any work is done.

    Raises:
        OutputPathError: see `check_target`, for the new files and for those that they replace.
    """
    target = target.absolute()
    check_target(target.with_name(names[0]), force=force)
    if not target.parent.is_dir():
        return []
    with write_errors(target):
        present = sorted(path for path in target.parent.iterdir() if belongs(path.name) or path.name in names)
    for path in present:
        check_target(path, force=force)
    return present


@contextlib.contextmanager
def atomic_files(target: Path, names: Sequence[str], belongs: Belongs, *, force: bool) -> Iterator[Path]:
    """An empty directory whose files, of these names, stand beside `target` when the block ends without an exception.

    With `force` everything that belongs there is replaced, whatever its names; a link as such, not what it leads to.

    Raises:
        OutputPathError: a place is unusable or taken, or another process writes this target now.
        WriteError: the device is full or fails.
    """
    target = target.absolute()
    check_target(target.with_name(names[0]), force=True)
    with write_errors(target), made_parents(target.parent):
        temporary = temporary_of(target)
        remove_stale(temporary, target)
        replaced = check_files(target, names, belongs, force=force)
        temporary.mkdir()
        try:
            with locked(temporary, target):
                (temporary / NEW).mkdir()
                yield temporary / NEW
                flush_tree(temporary / NEW)
            with signals_held():
                _publish(temporary, names, replaced)
                shutil.rmtree(temporary, ignore_errors=True)
        finally:
            with signals_held():
                if temporary.exists():
                    roll_back(temporary)
                shutil.rmtree(temporary, ignore_errors=True)
        flush_directory(target.parent)


def _publish(temporary: Path, names: Sequence[str], replaced: Sequence[Path]) -> None:
    (temporary / OLD).mkdir()
    begun = temporary / "begun"  # half a journal would name other files
    with begun.open("wb") as journal:
        journal.write(os.fsencode("\0".join(names)))
        journal.flush()
        os.fsync(journal.fileno())
    begun.rename(temporary / JOURNAL)
    flush_directory(temporary)
    for path in replaced:
        path.rename(temporary / OLD / path.name)
    for name in (*names[1:], names[0]):
        publish_file(temporary / NEW / name, temporary.parent / name, force=False)

"""Outputs that appear whole or not at all.

A file or directory is written beside its target under a fixed, recognisable name, flushed to the device and
renamed. Whatever goes wrong, the target stays as it was; after a SIGKILL a temporary may remain, which the
next run with the same target removes. A lock tells a dead temporary from one that is being written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from converters.errors import OutputPathError, WriteError, system_reason
from converters.fingerprint import hashed_meanwhile
from converters.paths import is_there, resolved

JOURNAL, NEW, OLD = "journal", "new", "old"
"""What is in the temporary of several files, see `roll_back`."""

_SUFFIX = ".safelora-gguf.tmp"
_FEW = 8  # files of an adapter; of a model with more, in shards, nobody asks for one's hash
_MOST_NAMES = 3
_HELD = (signal.SIGINT, signal.SIGTERM)


def check_target(target: Path, *, force: bool, directory: bool = False) -> None:
    """Whether a file, or a directory, may be written there; to be called before any work is done.

    Raises:
        OutputPathError: it exists and `force` is not set or it is of the other kind, or its parent is no
            writable directory.
    """
    try:
        _check_place(target, force=force, directory=directory)
    except OSError as error:  # a name too long, a loop of links
        raise OutputPathError(f"can't be written: {system_reason(error)}", file=target) from None


def refuse_to_overwrite(target: Path, inputs: Sequence[Path]) -> None:
    """Raises OutputPathError: the target is an input, which stays what it is, whatever --force says."""
    for path in inputs:
        if resolved(target) == resolved(path):
            raise OutputPathError("is one of the inputs; choose another name", file=target)


def refuse_to_swallow(target: Path, inputs: Sequence[Path]) -> None:
    """Raises OutputPathError: a directory that is swapped whole is, or holds, an input or the place one works in."""
    place = resolved(target)
    for path in (*inputs, Path.cwd(), Path.home()):
        if resolved(path).is_relative_to(place):
            raise OutputPathError(f"would replace {path} with everything in it; choose another name", file=target)


def entries_to_replace(target: Path) -> list[Path]:
    """What stands in a directory that `force` would swap; nothing where there is none.

    Raises:
        OutputPathError: it can't be looked into.
    """
    if not is_there(target) or not target.is_dir():
        return []
    try:
        return sorted(target.iterdir())
    except OSError as error:
        raise OutputPathError(f"can't be looked into: {system_reason(error)}", file=target) from None


def refuse_to_discard(target: Path, others: Sequence[Path], what: str) -> None:
    """Raises OutputPathError: a directory has entries that nobody asked to delete.

    Args:
        what: what it is found to be: "holds more than an adapter".
    """
    if others:
        names = ", ".join(entry.name for entry in others[:_MOST_NAMES]) + ", ..." * (len(others) > _MOST_NAMES)
        raise OutputPathError(
            f"exists already and {what}: replacing it would delete {names}; choose another name", file=target
        )


def _check_place(target: Path, *, force: bool, directory: bool) -> None:
    if target.is_symlink() and not target.exists():
        raise OutputPathError("is a link to nowhere; remove it or choose another name", file=target)
    if target.exists() and not force:
        raise OutputPathError("exists already; choose another name or pass --force", file=target)
    if target.exists() and target.is_dir() != directory:
        expected = (
            "is a file, expected the name of a directory" if directory else "is a directory, expected a file name"
        )
        raise OutputPathError(expected, file=target)
    parent = target.absolute().parent
    while not parent.exists():
        if parent.is_symlink():
            raise OutputPathError(f"can't be written: {parent} is a link to nowhere", file=target)
        parent = parent.parent
    if not parent.is_dir():
        raise OutputPathError(f"can't be written: {parent} is no directory", file=target)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputPathError(f"can't be written: no permission to write in {parent}", file=target)


@contextlib.contextmanager
def atomic_file(target: Path, *, force: bool) -> Iterator[BinaryIO]:
    """A stream whose contents become `target` when the block ends without an exception.

    Raises:
        OutputPathError: the target is unusable, or another process writes it now.
        WriteError: the device is full or fails.
    """
    target = _followed(target)
    check_target(target, force=force)
    with write_errors(target), made_parents(target.parent):
        temporary = temporary_of(target)
        remove_stale(temporary, target)
        opened = temporary.open("xb")
        try:
            with opened as file, locked(temporary, target):
                yield file
                file.flush()
                with hashed_meanwhile(temporary):
                    os.fsync(file.fileno())
            publish_file(temporary, target, force=force)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_directory(target.parent)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Interruptions that come during the block take effect after it; in the main thread, where they are delivered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _HELD}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def atomic_directory(target: Path, *, force: bool) -> Iterator[Path]:
    """An empty directory whose contents become `target` when the block ends without an exception.

    With `force` an existing directory is swapped whole: what it held is gone, in one step where the system
    can exchange two names.

    Raises:
        OutputPathError, WriteError: as for `atomic_file`.
    """
    target = _followed(target)
    check_target(target, force=force, directory=True)
    with write_errors(target), made_parents(target.parent):
        temporary = temporary_of(target)
        remove_stale(temporary, target)
        temporary.mkdir()
        try:
            with locked(temporary, target):
                yield temporary
                flush_tree(temporary)
            with signals_held():  # between the swap and the end of what it replaced nothing may be left over
                _publish_directory(temporary, target)
                shutil.rmtree(temporary, ignore_errors=True)
        finally:
            with signals_held():
                shutil.rmtree(temporary, ignore_errors=True)
        flush_directory(target.parent)


def _followed(target: Path) -> Path:
    """The absolute target; a link to something that exists is followed, so that the link itself stays."""
    return target.resolve() if target.is_symlink() and target.exists() else target.absolute()


def temporary_of(target: Path) -> Path:
    """What is written under, until it is whole."""
    return target.with_name(f".{target.name}{_SUFFIX}")


@contextlib.contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turns the system's errors into an OutputPathError or a WriteError."""
    try:
        yield
    except OSError as error:
        reason = system_reason(error)
        if error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.EEXIST,
            errno.ENAMETOOLONG,
            errno.ENOTDIR,
        ):
            raise OutputPathError(f"can't be written: {reason}", file=target) from error
        raise WriteError(f"writing failed: {reason}; nothing was left behind", file=target) from error


@contextlib.contextmanager
def made_parents(parent: Path) -> Iterator[None]:
    """Makes missing parents, and takes those it made away again when the block fails."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for directory in reversed(missing):
        directory.mkdir()
    try:
        yield
    except BaseException:
        for directory in missing:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def remove_stale(temporary: Path, target: Path) -> None:
    """Removes what a killed run left; a temporary that is locked belongs to a living one.

    Raises:
        OutputPathError: it is locked.
    """
    if not temporary.exists() and not temporary.is_symlink():
        return
    if temporary.is_symlink():
        temporary.unlink()
        return
    with locked(temporary, target):
        pass
    if temporary.is_dir():
        roll_back(temporary)
        shutil.rmtree(temporary)
    else:
        temporary.unlink()


def roll_back(temporary: Path) -> None:
    """Undoes what `converters.atomic_files` had begun to publish, unless it was done: what was there comes back.

    Its temporary holds the new files and, from the first one that leaves it, `JOURNAL` with their names. The name
    in the first line leaves it last, and what was replaced waits in `OLD`.
    """
    journal, parent = temporary / JOURNAL, temporary.parent
    if not journal.is_file():
        return
    names = [Path(name).name for name in journal.read_text(encoding="utf-8", errors="surrogateescape").split("\0")]
    if not (temporary / NEW / names[0]).exists():
        return
    for name in names:
        waiting, place = temporary / NEW / name, parent / name
        if place.exists() and (not waiting.exists() or waiting.samefile(place)):
            place.unlink()
    for old in (temporary / OLD).iterdir():
        old.replace(parent / old.name)


@contextlib.contextmanager
def locked(temporary: Path, target: Path) -> Iterator[None]:
    """Raises OutputPathError: another process holds the temporary."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise OutputPathError("is being written by another process right now", file=target) from None
    finally:
        os.close(descriptor)


def publish_file(temporary: Path, target: Path, *, force: bool) -> None:
    """Raises OutputPathError: without `force`, the target has appeared meanwhile."""
    if force:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target)  # unlike a rename, never replaces what appeared in the meantime
    except FileExistsError:
        raise OutputPathError("appeared while it was being made; nothing was overwritten", file=target) from None
    except OSError:  # a file system without hard links
        check_target(target, force=False)
        temporary.replace(target)
        return
    temporary.unlink()


def _publish_directory(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        aside = target.with_name(f".{target.name}.old{_SUFFIX}")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        temporary.rename(target)
        shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step (Linux's renameat2); False where that can't be done."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None), "renameat2", None)
    if function is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(function(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def flush_tree(directory: Path) -> None:
    """Waits until everything in a directory is on its device."""
    paths = sorted(directory.rglob("*"))
    files = [path for path in paths if not path.is_dir()]
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    for path in files:
        alone = hashed_meanwhile(path) if path == largest and len(files) < _FEW else contextlib.nullcontext()
        with path.open("rb") as file, alone:
            os.fsync(file.fileno())
    for path in (*(path for path in paths if path.is_dir()), directory):
        flush_directory(path)


def flush_directory(path: Path) -> None:
    """Waits until a directory's list of names is on its device."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

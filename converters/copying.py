"""Copying a part of a file into another, inside the kernel where that is possible: nearly as fast as `cp`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from typing import BinaryIO

_PIECE = 4 << 20  # bytes at once where the kernel does not copy
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and don't wait
_NOT_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def copy_range(source: BinaryIO, start: int, target: BinaryIO, where: int, count: int) -> int:
    """Copies `count` bytes from `start` of one file to `where` in the other, which then stands behind them.

    Returns:
        How many were copied: fewer where the source ends.

    Raises:
        OSError: either file fails.
    """
    done = _copied_in_kernel(source, start, target, where, count)
    source.seek(start + done)
    while done < count:
        piece = source.read(min(_PIECE, count - done))
        if not piece:
            break
        target.write(piece)
        done += len(piece)
    return done


def _copied_in_kernel(source: BinaryIO, start: int, target: BinaryIO, where: int, count: int) -> int:
    done = 0
    target.flush()
    if sys.platform == "linux":
        try:
            while done < count:
                left = min(count - done, 1 << 30)
                copied = os.copy_file_range(source.fileno(), target.fileno(), left, start + done, where + done)
                if copied == 0:
                    break
                done += copied
        except OSError as error:
            if error.errno not in _NOT_IN_KERNEL:
                raise
    target.seek(where + done)
    return done


def begin_flush(file: BinaryIO, start: int, count: int) -> None:
    """Asks the system to begin writing a part of a file to its device, so that less is left to wait for in the end."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # not in every C library; no more than a wish
            offset = ctypes.c_int64
            ctypes.CDLL(None).sync_file_range(file.fileno(), offset(start), offset(count), ctypes.c_uint(_WRITE))

"""How a command ends: every outcome becomes an exit status and, where it failed, one message on stderr.

Part of the command line, as `terminal` is; nothing else prints.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from converters.errors import Error
from safelora_gguf._version import __version__
from safelora_gguf.terminal import printable, stderr

INTERRUPTED, TERMINATED, BUG = 130, 143, 70


class Terminated(BaseException):
    """SIGTERM, raised so that half-made outputs are taken away on the way out."""


def run_command(name: str, body: Callable[[], int | None], *, as_json: bool, verbose: bool) -> int:
    """Runs a command's body and turns however it ends into an exit status.

    Args:
        name: the command, for the error object.
        body: gives the exit status, None for 0.
        as_json: on failure stdout gets {"command", "version", "error"}.
        verbose: show tracebacks.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return body() or 0
    except Error as error:
        if verbose:
            traceback.print_exc()
        _tell(f"error: {error}")
        if as_json:
            _print_json(name, error.kind, error)
        return error.exit_status
    except KeyboardInterrupt:
        _tell("interrupted; no output was written")
        return INTERRUPTED
    except Terminated:
        _tell("terminated; no output was written")
        return TERMINATED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody listens: end quietly
        return 0
    except Exception as error:
        return _bug(name, error, as_json=as_json, verbose=verbose)


def _bug(name: str, error: Exception, *, as_json: bool, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    _tell(
        f"internal error: {type(error).__name__}: {error}. This is a bug of safelora-gguf {__version__}, please "
        f"report it with the output of the same command with --verbose"
    )
    if as_json:
        _print_json(name, "bug", Error(f"{type(error).__name__}: {error}"))
    return BUG


def _tell(message: str) -> None:
    stderr().print(printable(message))


def _print_json(name: str, kind: str, error: Error) -> None:
    told = {"kind": kind, "message": error.message, "file": error.file, "tensor": error.tensor}
    sys.stdout.write(json.dumps({"command": name, "version": __version__, "error": told}) + "\n")


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated

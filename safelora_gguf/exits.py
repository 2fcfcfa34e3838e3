"""How a command ends: every outcome becomes an exit status and, where it failed, one message on stderr.

Part of the command line, as `terminal` is; nothing else prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from converters.errors import Error, WriteError, system_reason
from safelora_gguf._version import __version__
from safelora_gguf.outcome import Outcome
from safelora_gguf.terminal import printable, stderr

INTERRUPTED, TERMINATED, BUG = 130, 143, 70


class Terminated(BaseException):
    """SIGTERM, raised so that half-made outputs are taken away on the way out."""


def run_command(name: str, body: Callable[[], Outcome], *, as_json: bool, verbose: bool) -> int:
    """Runs a command's body and turns however it ends into output and an exit status.

    Args:
        name: the command, for the error object.
        body: gives the outcome.
        as_json: stdout gets the report; on failure {"command", "version", "error"}.
        verbose: show tracebacks.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _finish(body(), as_json=as_json)
    except Error as error:
        if verbose:
            traceback.print_exc()
        _tell(f"error: {error}")
        if as_json:
            _deliver_error(name, error)
        return error.exit_status
    except KeyboardInterrupt:
        _tell("interrupted; nothing partial was left")
        return INTERRUPTED
    except Terminated:
        _tell("terminated; nothing partial was left")
        return TERMINATED
    except Exception as error:
        return _bug(name, error, as_json=as_json, verbose=verbose)


def _finish(outcome: Outcome, *, as_json: bool) -> int:
    from safelora_gguf.report import dump_json

    _deliver(dump_json(outcome.report) if as_json else outcome.text())
    if outcome.failure is None:
        return outcome.status
    _tell(f"error: {outcome.failure}")
    return outcome.failure.exit_status


def _deliver(text: str) -> None:
    """Writes to stdout. A reader who has gone (`| head`) changes nothing about how the command ended.

    Raises:
        WriteError: stdout can't take it (a full disk).
    """
    try:
        sys.stdout.write(_encodable(text))
        sys.stdout.flush()
    except BrokenPipeError:
        _close_stdout()
    except OSError as error:
        _close_stdout()
        raise WriteError(f"standard output: {system_reason(error)}") from None


def _encodable(text: str) -> str:
    """Half a surrogate from a file, or a letter that the terminal's encoding lacks, as its escape."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _close_stdout() -> None:
    """Sends what is still buffered nowhere, so that the interpreter's own last flush can't fail, too."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _bug(name: str, error: Exception, *, as_json: bool, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    _tell(
        f"internal error: {type(error).__name__}: {error}. This is a bug of safelora-gguf {__version__}, please "
        f"report it with the output of the same command with --verbose"
    )
    if as_json:
        _deliver_error(name, Error(f"{type(error).__name__}: {error}"))
    return BUG


def _tell(message: str) -> None:
    stderr().print(printable(message))


def _deliver_error(name: str, error: Error) -> None:
    with contextlib.suppress(WriteError):
        _deliver(json.dumps({"command": name, "version": __version__, "error": error.to_json()}) + "\n")


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated

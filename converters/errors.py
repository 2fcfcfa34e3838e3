"""The exception tree. Everything that can be said about a user's file or wish derives from `Error`.

    Error                     never raised itself
    ├── UsageError            options that make no sense, alone or together           exit 2
    ├── InputError            an input or an output path cannot be used               exit 3
    │   ├── FileMissingError  no such file or directory, or it cannot be opened
    │   ├── FormatError       the file is not what its format promises
    │   ├── UnsupportedError  sound, but holds something this tool can't express
    │   ├── MismatchError     two inputs that do not belong together
    │   ├── OutputPathError   the target exists, or its place is unusable
    │   └── MissingLlamaError llama-cpp-python is needed and not installed
    ├── LlamaError            llama.cpp rejected a file, crashed or hung              exit 4
    └── WriteError            writing failed (disk full, device error)                exit 5

Each error says which file, which tensor, what was found, what was expected and what to do, in one message;
`kind`, `file` and `tensor` carry the same for programs. A bug of ours is no `Error`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


def system_reason(error: OSError) -> str:
    """What the system says was wrong, fit for the middle of a sentence."""
    return (error.strerror or str(error)).lower()


class Error(Exception):
    """A problem outside the program, told in one sentence or two.

    Args:
        message: what was found, what was expected, what to do. May hold text from files: whoever shows it
            escapes it.
        file: the file or directory in question.
        tensor: the tensor in question, by its name in that file.
    """

    kind: ClassVar[str] = "bug"
    exit_status: ClassVar[int] = 70

    def __init__(self, message: str, *, file: str | Path | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor

    def to_json(self) -> dict[str, str | None]:
        """The error object of the command line contract."""
        return {"kind": self.kind, "message": self.message, "file": self.file, "tensor": self.tensor}

    def __str__(self) -> str:
        where = [part for part in (self.file, self.tensor) if part is not None]
        return ": ".join([*where, self.message])


class UsageError(Error, ValueError):
    kind = "usage"
    exit_status = 2


class InputError(Error):
    kind = "input"
    exit_status = 3


class FileMissingError(InputError):
    kind = "missing"


class FormatError(InputError):
    kind = "format"


class UnsupportedError(InputError):
    kind = "unsupported"


class MismatchError(InputError):
    kind = "mismatch"


class OutputPathError(InputError):
    kind = "output"


class MissingLlamaError(InputError):
    kind = "llama-missing"

    def __init__(self, purpose: str) -> None:
        super().__init__(
            f"{purpose} runs llama.cpp, and llama-cpp-python is not installed or does not load; install the extra "
            f"safelora-gguf[llama], or: pip install llama-cpp-python (it compiles for minutes, with a C++ compiler)"
        )


class LlamaError(Error):
    kind = "llama"
    exit_status = 4


class WriteError(Error):
    kind = "write"
    exit_status = 5

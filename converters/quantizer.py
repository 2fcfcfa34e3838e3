"""llama.cpp's own quantizer, for types that are mixtures of others (Q4_K_M, IQ4_XS, ...).

It runs in a process of its own: llama.cpp aborts on files it does not like, returns only 0 or 1, says why in its log,
and leaves half a file behind. Its output goes to a temporary beside the target, is checked, and then renamed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import IO, Any

from converters import libggml, llama_child
from converters.atomic import atomic_file
from converters.errors import (
    Error,
    FormatError,
    LlamaError,
    MismatchError,
    MissingLlamaError,
    UnsupportedError,
    WriteError,
)
from converters.free_space import free_space_for
from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader, GgufTensor
from converters.gguf_shards import read_gguf_headers
from converters.imatrix import check_imatrix, read_imatrix
from converters.quantization import PADDING, FileType, file_type, is_quantized_again, quantized_size

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

_NEED_IMATRIX = ("IQ1_", "IQ2_", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
_COMMAND = llama_child.command_for("converters.quantizer_child")
_TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\] +(\S+)")
_OF_IMATRIX = re.compile(r"importance matrix|imatrix (size|contains)")
_WRITE_FAILED = "iostream error"  # what C++ says of a device that is full


@dataclass(frozen=True)
class Fallback:
    """A matrix that got another type than it was meant for, since its rows are no whole blocks of that one."""

    name: str
    columns: int
    dtype: str


@dataclass(frozen=True)
class Quantized:
    """What the quantizer made.

    Attributes:
        nbytes: the size of the file.
        types: how many tensors are stored in each type, by ggml's names.
    """

    nbytes: int
    types: Mapping[str, int]
    fallbacks: tuple[Fallback, ...]


def quantize_gguf(
    source: Path,
    target: Path,
    ftype_name: str,
    *,
    threads: int,
    imatrix: Path | None = None,
    allow_requantize: bool = False,
    force: bool = False,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Quantizes a whole model; the file appears whole or not at all.

    Args:
        source: a GGUF file, or the first shard of several; what is quantized already is refused, unless
            `allow_requantize` is set.
        ftype_name: as llama-quantize knows it, Q4_K_M, in whatever case.
        imatrix: an importance matrix, see `converters.imatrix`; the smallest types need one.
        timeout: seconds after which it is taken to hang; None: it may take as long as it likes.
        progress: called with (place of the next tensor, number of tensors, its name).

    Raises:
        UsageError: an unknown name.
        FileMissingError, FormatError: the source or the importance matrix is unusable.
        MissingLlamaError: llama-cpp-python is not installed or does not load.
        MismatchError: the importance matrix lacks a tensor that needs it, or has one of another size.
        LlamaError: llama.cpp refused the model, crashed or hung, or what it wrote is no sound model.
        OutputPathError, WriteError: see `converters.atomic`; or the device has no room for it.
    """
    wanted = file_type(ftype_name)
    headers = read_gguf_headers(source, "GGUF model")
    if imatrix is not None:
        read_imatrix(imatrix)
    _check_library(wanted)
    free_space_for(target, quantized_size(headers, wanted), f"the model in {wanted.name}")
    request = {
        "source": str(source.absolute()),
        "number": wanted.number,
        "threads": threads,
        "requantize": allow_requantize,
        "realign": headers[0].alignment != PADDING,
        "imatrix": None if imatrix is None else str(imatrix.absolute()),
    }
    with atomic_file(target, force=force) as file:
        made = Path(file.name)
        failure = _run({**request, "target": str(made)}, source, timeout, progress)
        if failure is not None:
            raise _error(failure, wanted, source, target, imatrix)
        return _checked(made, headers, wanted, target)


def check_quantizer(wanted: FileType, imatrix: Path | None = None) -> None:
    """Whether the quantizer can make a type; to be called before any work is done.

    Args:
        imatrix: the importance matrix that it will be given.

    Raises:
        MissingLlamaError: llama-cpp-python is not installed or does not load.
        UnsupportedError: the type needs an importance matrix, and there is none.
        FileMissingError, FormatError: what is given is none.
    """
    _check_library(wanted)
    if imatrix is not None:
        check_imatrix(imatrix)
    elif wanted.name.startswith(_NEED_IMATRIX):
        told = f"{wanted.name} needs an importance matrix: give one with --imatrix, or take IQ4_XS or Q3_K_M"
        raise UnsupportedError(told)


def _check_library(wanted: FileType) -> None:
    if libggml.find_library() is None:
        raise MissingLlamaError(f"quantizing to {wanted.name}")


@dataclass(frozen=True)
class _Failure:
    """Why the child did not quantize, as it told."""

    kind: str
    message: str


def _run(request: Mapping[str, Any], source: Path, timeout: float | None, progress: Progress | None) -> _Failure | None:
    """Raises LlamaError if the child crashed, hung or talked nonsense."""
    reply, tail, status, expired = _asked(request, timeout, progress)
    if expired:
        assert timeout is not None, "only a limit expires"
        raise LlamaError(llama_child.hang_message("quantizing", timeout), file=source)
    try:
        answer = json.loads(reply)
        return None if "ok" in answer else _Failure(**answer["failed"])
    except (ValueError, TypeError, KeyError, RecursionError):
        logger.debug("the quantizer's log ends:\n%s", "\n".join(tail))
        raise LlamaError(llama_child.crash_message("quantizing", status, tail), file=source) from None


def _error(failure: _Failure, wanted: FileType, source: Path, target: Path, imatrix: Path | None) -> Error:
    if failure.kind == "missing":
        logger.debug("llama-cpp-python does not load: %s", failure.message)
        return MissingLlamaError(f"quantizing to {wanted.name}")
    if failure.kind == "imatrix":
        return UnsupportedError(failure.message, file=imatrix)
    if imatrix is not None and _OF_IMATRIX.search(failure.message):
        return MismatchError(f"{failure.message}; take an importance matrix of this model", file=imatrix)
    if _WRITE_FAILED in failure.message:
        return WriteError(f"writing failed: {failure.message}; nothing was left behind", file=target)
    return LlamaError(failure.message, file=source)


def _asked(
    request: Mapping[str, Any], timeout: float | None, progress: Progress | None
) -> tuple[bytes, Sequence[str], int, bool]:
    """The child's reply, the end of its log, its exit status, and whether the time limit killed it."""
    tail = deque[str](maxlen=llama_child.TAIL_LINES)
    process = llama_child.start(_COMMAND)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        with process.stderr as log, llama_child.time_limit(process, timeout) as expired:
            with contextlib.suppress(OSError):  # a broken pipe: it died before reading
                llama_child.send(process.stdin, request)
            _listen(log, tail, progress)
            return process.stdout.read(), tail, process.wait(), expired.is_set()
    finally:
        llama_child.stop(process)


def _listen(stream: IO[bytes], tail: deque[str], progress: Progress | None) -> None:
    """Reads the log to its end."""
    for text in llama_child.log_lines(stream):
        tail.append(text)
        match = _TENSOR.match(text)
        if match is not None and progress is not None:
            progress(int(match[1]), int(match[2]), match[3])


def _checked(made: Path, sources: Sequence[GgufHeader], wanted: FileType, target: Path) -> Quantized:
    """The header of what the quantizer made, against those of what it was made from."""
    try:
        header = read_gguf_header(made)
    except FormatError as error:
        raise LlamaError(f"llama.cpp's quantizer wrote a damaged file: {error.message}", file=target) from None
    before = {name: tensor for source in sources for name, tensor in source.tensors.items()}
    if _shapes(header.tensors) != _shapes(before):
        raise LlamaError("llama.cpp's quantizer wrote other tensors than the model has", file=target)
    types: dict[str, int] = {}
    for tensor in header.tensors.values():
        types[tensor.dtype] = types.get(tensor.dtype, 0) + 1
    fallbacks = [
        Fallback(name, tensor.shape[-1], tensor.dtype)
        for name, tensor in header.tensors.items()
        if _fell_back(tensor, before[name], wanted)
    ]
    return Quantized(header.file_size, types, tuple(fallbacks))


def _shapes(tensors: Mapping[str, GgufTensor]) -> dict[str, tuple[int, ...]]:
    """Without outer dimensions of 1, which the quantizer drops."""
    return {name: tuple(dropwhile(lambda size: size == 1, tensor.shape)) for name, tensor in tensors.items()}


def _fell_back(after: GgufTensor, before: GgufTensor, wanted: FileType) -> bool:
    if not is_quantized_again(after) or after.qtype == wanted.qtype or after.shape[-1] % wanted.block == 0:
        return False
    return after.qtype != before.qtype or after.dtype == "F16"  # others were not to be quantized

"""The float file from which llama.cpp's quantizer makes a model: its place beside the target, and its values.

A run that was killed leaves it behind, whole and as large as the model. Whoever writes to the same target next takes
it away, whether or not he needs one himself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converters.atomic import remove_stale, temporary_of, write_errors
from converters.errors import UnsupportedError
from converters.gguf_header import read_gguf_header
from converters.gguf_layout import ModelTensor
from converters.quantization import FileType

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLOAT, _WHOLE = ".float.safelora-gguf.tmp", ".quantized.safelora-gguf.tmp"
_AT_ONCE = 1 << 22  # elements
# The bits of an exponent, all of which are set in NaN and Inf.
_EXPONENTS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


def float_files(target: Path) -> tuple[Path, Path]:
    """Beside a target the float file, and the quantized one that is still to be split."""
    return target.with_name(f".{target.name}{_FLOAT}"), target.with_name(f".{target.name}{_WHOLE}")


def clear_floats(target: Path) -> None:
    """Takes away what a killed run left.

    Raises:
        OutputPathError: another process is about to write the same target.
    """
    with write_errors(target):
        for file in float_files(target):
            for left in (file, temporary_of(file)):
                remove_stale(left, target)


def refuse_no_numbers(file: Path, tensors: Sequence[ModelTensor], wanted: FileType) -> None:
    """Looks at all values of a float file; llama.cpp stops at some that are no numbers, and makes others into numbers.

    Args:
        tensors: that it was written from.

    Raises:
        UnsupportedError: a tensor holds NaN or Inf.
    """
    origins: Mapping[str, Path] = {tensor.name: tensor.origin for tensor in tensors}
    for name, tensor in read_gguf_header(file).tensors.items():
        form, exponent = _EXPONENTS.get(tensor.dtype, ("", 0))
        if not form:
            continue
        for start in range(0, prod(tensor.shape), _AT_ONCE):
            size = np.dtype(form).itemsize
            count = min(_AT_ONCE, prod(tensor.shape) - start)
            values: NDArray[np.unsignedinteger] = np.fromfile(file, form, count, offset=tensor.offset + start * size)
            if (values & exponent == exponent).any():
                told = f"holds NaN or Inf, which can't be stored as {wanted.name}: the model, or what was added to it,"
                raise UnsupportedError(f"{told} is broken", file=origins[name], tensor=name)

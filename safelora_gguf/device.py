"""Which device computes, and how exactly."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from converters.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` as a device that is there; `auto` takes the fastest.

    Raises:
        UsageError: another name, or a device that this machine or this build of torch lacks.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps" and torch.backends.mps.is_available():
        return torch.device("mps")
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", name)
    if match and torch.cuda.is_available() and int(match[1] or 0) < torch.cuda.device_count():
        return torch.device(name)
    if match or name == "mps":
        raise UsageError(f"the device {name} is not available here; --device cpu always is")
    raise UsageError(f"unknown device {name!r}; expected auto, cpu, cuda, cuda:N or mps")


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Products in float32 are float32 products: TF32 off inside the block, as it was after it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32 = before

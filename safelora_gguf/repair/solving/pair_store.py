"""The A' of all modules by mu and fold: float32 in files of a scratch directory, read a module at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from converters.errors import WriteError, system_reason

if TYPE_CHECKING:
    import torch

_Key = tuple[float, int | None]


@dataclass(frozen=True)
class PairWriter:
    """Takes one module after the other, on their way to a file."""

    file: Path
    _stream: IO[bytes] = field(repr=False)
    _places: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict, repr=False)

    def put(self, module: str, a: torch.Tensor) -> None:
        """Stores A' (r, in) as float32.

        Raises:
            WriteError: the disk is full or fails.
        """
        assert module not in self._places, module
        place = self._stream.tell()
        with _told(self.file):
            self._stream.write(a.detach().cpu().float().contiguous().numpy().data)
        self._places[module] = place, tuple(a.shape)


class PairStore:
    """What solving has found so far.

    Args:
        directory: is there, and is removed by whoever made it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: dict[_Key, PairWriter] = {}
        self._number = 0

    def has(self, mu: float, fold: int | None = None) -> bool:
        """Whether all modules of this mu and fold are there."""
        return (mu, fold) in self._written

    def get(self, module: str, mu: float, fold: int | None = None) -> torch.Tensor:
        """A' (r, in) of a module in float32: A itself where it was left alone. The pairs of embeddings are not there.

        Raises:
            KeyError: nothing was stored for it.
        """
        import torch

        written = self._written[mu, fold]
        offset, shape = written._places[module]
        values = np.fromfile(written.file, np.float32, math.prod(shape), offset=offset)
        return torch.from_numpy(values).view(shape)

    def drop(self, mu: float, fold: int | None = None) -> None:
        """Frees the disk of what is not needed any more; nothing where it isn't there."""
        written = self._written.pop((mu, fold), None)
        if written is not None:
            written.file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self, mu: float, fold: int | None = None) -> Iterator[PairWriter]:
        """Takes the modules of one mu and fold; they are there when the block ends well, and then all of them.

        Raises:
            WriteError: the disk is full or fails.
        """
        self._number += 1
        file = self._directory / f"solved-{self._number}.f32"
        try:
            with _told(file):
                stream = file.open("wb")
            with stream:
                writer = PairWriter(file, stream)
                yield writer
                with _told(file):
                    stream.flush()
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        self.drop(mu, fold)
        self._written[mu, fold] = writer


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = f"what was solved can't be kept: {system_reason(error)}; make room, or set TMPDIR to another device"
        raise WriteError(told, file=file) from error

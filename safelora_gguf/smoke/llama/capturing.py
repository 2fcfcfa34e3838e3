"""Captures what weights are multiplied with while a model reads token sequences: a context of its own, for one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from converters.errors import system_reason
from converters.llama_log import LlamaLog
from safelora_gguf.smoke.llama.capture_file import CaptureWriter
from safelora_gguf.smoke.llama.decoding import Decoder
from safelora_gguf.smoke.llama.errors import EngineError
from safelora_gguf.smoke.llama.kept_rows import Kept
from safelora_gguf.smoke.llama.readers import Captured
from safelora_gguf.smoke.llama.weight_check import WeightCheck
from safelora_gguf.smoke.llama.weight_inputs import WeightInputs
from safelora_gguf.smoke.protocol import InputGroup, ModelOptions, Reading

Done = Callable[[int, int, str | None], None]
"""Hears the key of a reading, how many rows were captured, and why none."""


class Capturing:
    """Weights of a loaded model whose inputs are captured, with the adapters that are given.

    Args:
        model: llama.cpp's.
        adapters: llama.cpp's pointers, with their scales.
        weights: their names in the model's file.

    Attributes:
        decoded: tokens decoded so far.
        notes: sentences for the report, once it has run.

    Raises:
        EngineError: unsupported: the model has no such weight, or this build of llama.cpp does not show its tensors;
            rejected: the model's file can't be read, or llama.cpp makes no context.
    """

    def __init__(
        self, model: Any, options: ModelOptions, log: LlamaLog, adapters: Sequence[tuple[Any, float]],
        weights: Sequence[str],
    ) -> None:  # fmt: skip
        self._model = model
        self._options = options
        self._log = log
        self._adapters = adapters
        self._weights = weights
        self._decoder: Decoder | None = None
        self.notes: tuple[str, ...] = ()
        self._check = WeightCheck(options.model)
        for weight in weights:
            if weight not in self._check:
                told = f"the model, of the architecture {self._check.architecture!r}, has no weight {weight}"
                raise EngineError("unsupported", told)

    @property
    def decoded(self) -> int:
        return self._decoder.decoded if self._decoder else 0

    def run(
        self, readings: Mapping[int, Reading], file: Path, tell: Callable[[], None], done: Done
    ) -> tuple[InputGroup, ...]:
        """Reads all, each under its key, and writes the file; its groups, none where nothing was read.

        Args:
            tell: called before each decode.

        Raises:
            EngineError: unsupported: a weight is not multiplied, or otherwise than expected; unwritable: `file`.
        """
        try:
            with file.open("wb") as stream:
                writer = CaptureWriter(stream, sum(len(reading.keep) for reading in readings.values()))
                inputs = self._captured(readings, writer, tell, done)
                return writer.close(inputs.groups)
        except OSError as error:
            told = (
                f"captured inputs can't be written: {system_reason(error)}; make room, or set TMPDIR to another device"
            )
            raise EngineError("unwritable", told) from error

    def _captured(
        self, readings: Mapping[int, Reading], writer: CaptureWriter, tell: Callable[[], None], done: Done
    ) -> WeightInputs:
        inputs = WeightInputs(self._weights, writer, self._check, one_by_one=_reorders(self._model))
        decoder: Decoder | None = None
        try:
            lengths = [len(self._reader(reading).tokens) for reading in readings.values()]
            decoder = self._decoder = Decoder(self._model, self._options, self._log, inputs, lengths)
            self.notes = decoder.notes
            decoder.set_adapters(self._adapters)
            items = _that_fit(readings, lengths, decoder.limit, done)
            for item, error in self._ended(items, decoder, inputs, tell):
                rows = len(item.reading.keep)
                if error is not None:
                    writer.drop(item.row, item.row + rows)
                done(item.key, 0 if error else rows, error)
        finally:
            if decoder is not None:
                decoder.close()
            inputs.close()
        return inputs

    def _ended(
        self, items: Sequence[_Item], decoder: Decoder, inputs: WeightInputs, tell: Callable[[], None]
    ) -> Iterator[tuple[_Item, str | None]]:
        """Each with what was wrong with it. Those that failed beside others are read once more, each alone: what is no
        number spoils what is read beside it, and of a decode that failed nobody can tell which sequence it failed on.
        """
        again = []
        for item, reader in self._read(items, decoder, inputs, tell):
            if reader.error is None or reader.late or len(items) == 1:
                yield item, reader.error
            else:
                again.append(item)
        for one in again:
            for item, reader in self._read([one], decoder, inputs, tell):
                yield item, reader.error

    def _read(
        self, items: Sequence[_Item], decoder: Decoder, inputs: WeightInputs, tell: Callable[[], None]
    ) -> Iterator[tuple[_Item, Captured]]:
        readers = [self._reader(item.reading) for item in items]
        inputs.begin([Kept(np.asarray(item.reading.keep), item.row) for item in items])
        for index in decoder.run(readers, tell):
            reader = readers[index]
            reader.error = reader.error or inputs.broken.get(index)
            yield items[index], reader

    def _reader(self, reading: Reading) -> Captured:
        return Captured(reading, self._options.prompt_seconds)


@dataclass(frozen=True)
class _Item:
    """A reading under its key, and its first row in the file."""

    key: int
    reading: Reading
    row: int


def _that_fit(readings: Mapping[int, Reading], lengths: Sequence[int], limit: int, done: Done) -> list[_Item]:
    """Those that can be read, `lengths` tokens of each; `done` hears of the others."""
    items, row = [], 0
    for (key, reading), length in zip(readings.items(), lengths, strict=True):
        if 0 < length <= limit:
            items.append(_Item(key, reading, row))
        else:
            told = f"the prompt and its answer are {length} tokens long, the context {limit}"
            done(key, 0, told if length else None)
        row += len(reading.keep)
    return items


def _reorders(model: Any) -> bool:
    """Whether llama.cpp puts the tokens of several sequences in another order: those with a recurrent state."""
    kinds = (getattr(lib, name, None) for name in ("llama_model_is_recurrent", "llama_model_is_hybrid"))
    return any(is_one is not None and is_one(model) for is_one in kinds)

"""Captures what weights are multiplied with while a model reads token sequences: a context of its own, for one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from converters.llama_log import LlamaLog
from safelora_gguf.smoke.llama.capture_file import CaptureWriter
from safelora_gguf.smoke.llama.decoding import Decoder
from safelora_gguf.smoke.llama.errors import EngineError
from safelora_gguf.smoke.llama.readers import Captured
from safelora_gguf.smoke.llama.weight_check import WeightCheck
from safelora_gguf.smoke.llama.weight_inputs import Kept, WeightInputs
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
            raise EngineError("unwritable", f"the captured inputs can't be written: {error}") from error

    def _captured(
        self, readings: Mapping[int, Reading], writer: CaptureWriter, tell: Callable[[], None], done: Done
    ) -> WeightInputs:
        kept: list[Kept] = []
        readers: list[Captured] = []
        inputs = WeightInputs(self._weights, kept, writer, self._check, one_by_one=_reorders(self._model))
        decoder = self._decoder = Decoder(self._model, self._options, self._log, inputs)
        try:
            decoder.set_adapters(self._adapters)
            row = 0
            for key, reading in readings.items():
                reader = Captured(key, reading, self._options.prompt_seconds)
                length, limit = len(reader.tokens), decoder.limit
                if 0 < length <= limit:
                    readers.append(reader)
                    kept.append(Kept(np.asarray(reading.keep), row))
                else:
                    told = f"the prompt and its answer are {length} tokens long, the context {limit}"
                    done(key, 0, told if length else None)
                row += len(reading.keep)
            for index in decoder.run(readers, tell):
                error, rows = readers[index].error or inputs.broken.get(index), len(kept[index].positions)
                if error is not None:
                    writer.drop(kept[index].row, kept[index].row + rows)
                done(readers[index].key, 0 if error else rows, error)
        finally:
            decoder.close()
        return inputs


def _reorders(model: Any) -> bool:
    """Whether llama.cpp puts the tokens of several sequences in another order: those with a recurrent state."""
    kinds = (getattr(lib, name, None) for name in ("llama_model_is_recurrent", "llama_model_is_hybrid"))
    return any(is_one is not None and is_one(model) for is_one in kinds)

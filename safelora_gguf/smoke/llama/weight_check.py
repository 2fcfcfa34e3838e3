"""Whether a captured input times its weight, as the GGUF file has it, is what llama.cpp computed.

What stands in the graph of another version of llama.cpp, or of an architecture nobody tried, is not for us to know. So
of every weight a few rows are read from the file and multiplied: an input read wrong, or one that is not this weight's
alone, gives something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from converters import libggml
from converters.errors import Error
from converters.ggml import block_of
from converters.gguf_metadata import GgufTensor
from converters.gguf_shards import read_gguf_headers
from converters.gguf_tensors import GgufTensors
from safelora_gguf.smoke.llama.errors import EngineError

ROWS = 16
"""Rows of a weight that are multiplied, spread over all of them."""

LEAST_AGREEMENT = 0.9
"""Cosine between what is expected and what llama.cpp computed, which rounds inputs to 8 bits for quantized weights:
0.99 and more there."""


class WeightCheck:
    """The weights of a model's file, or of all its shards.

    Attributes:
        architecture: as the file names it.

    Raises:
        EngineError: rejected: the file can't be read.
    """

    def __init__(self, model: str) -> None:
        try:
            headers = read_gguf_headers(model, "GGUF model")
        except Error as error:
            raise EngineError("rejected", str(error)) from error
        self.architecture = headers[0].text("general.architecture") or "unknown"
        self._stored: Mapping[str, GgufTensor] = {
            name: tensor for header in headers for name, tensor in header.tensors.items()
        }
        self._tensors = GgufTensors(headers)

    def __contains__(self, weight: str) -> bool:
        return weight in self._stored

    def check(self, weight: str, inputs: Any, outputs: Any, experts: Any = None) -> None:
        """Inputs (n, in) of a weight (out, in), and what llama.cpp made of them, (n, out); of a stack of experts (n,
        out, in), which one each input went to. The bound is on the cosine of all products together, not of each.

        Raises:
            EngineError: unsupported: they don't agree, or the weight is of another shape; rejected: the file can't be
                read.
        """
        *stack, rows, width = self._stored[weight].shape
        if (inputs.shape[1], outputs.shape[1], len(stack)) != (width, rows, int(experts is not None)):
            raise self._otherwise(weight, f"an input of {inputs.shape[1]} gives {outputs.shape[1]} numbers")
        chosen = np.unique(np.linspace(0, rows - 1, ROWS).astype(int))
        found = np.empty((len(inputs), len(chosen)))
        for expert in [0] if experts is None else set(experts.tolist()):
            of = slice(None) if experts is None else experts == expert
            values = self._values(weight, expert * rows + chosen)
            found[of] = np.asarray(inputs[of], np.float64) @ values.T.astype(np.float64)
        agreement = cosine(found, outputs[:, chosen])
        if not agreement > LEAST_AGREEMENT:
            raise self._otherwise(weight, f"its input times its rows has a cosine of {agreement:.2f} with the product")

    def check_rows(self, weight: str, numbers: Any, found: Any) -> None:
        """Rows (n, in) that llama.cpp looked up in a weight, by their numbers (n,); raises what `check` does."""
        stored, looked = self._values(weight, numbers), np.asarray(found, np.float64)
        agreement = 0.0
        if looked.shape == stored.shape:
            finite = np.isfinite(stored).all(axis=1) & np.isfinite(looked).all(axis=1)
            pairs = zip(stored[finite], looked[finite], strict=True)
            agreement = min((cosine(*pair) for pair in pairs), default=1.0)
        if not agreement > LEAST_AGREEMENT:
            told = f"rows looked up in {weight} have a cosine of {agreement:.2f} with the file's"
            raise self.unsupported("inputs", f"this build of llama.cpp has the tokens in another order ({told})")

    def unsupported(self, what: str, why: str) -> EngineError:
        told = f"{what} can't be captured in the architecture {self.architecture!r}: {why}"
        return EngineError("unsupported", told)

    def _otherwise(self, weight: str, found: str) -> EngineError:
        arranged = "this build of llama.cpp arranges it otherwise than expected"
        return self.unsupported(f"the inputs of {weight}", f"{arranged} ({found})")

    def _values(self, weight: str, rows: Any) -> Any:
        """Rows of a weight by their indices, float32 (len(rows), in)."""
        try:
            blocks = np.concatenate([self._tensors.blocks(weight, row, row + 1) for row in rows])
        except Error as error:
            raise EngineError("rejected", str(error)) from error
        return dequantized(blocks, self._stored[weight].qtype)


def dequantized(blocks: Any, qtype: int) -> Any:
    """Stored rows, uint8 (rows, bytes of a row), as float32; without torch, which llama.cpp's process does without.

    Raises:
        EngineError: unsupported: nothing here reads the type.
    """
    library, kind = libggml.library(), block_of(qtype)
    native = library.dequantizer(qtype) if library is not None else None
    if native is None or kind is None:
        try:
            return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(qtype))
        except (NotImplementedError, ValueError):
            raise EngineError("unsupported", f"nothing here reads weights of ggml's type {qtype}") from None
    values = np.empty((len(blocks), blocks.shape[1] // kind.nbytes * kind.block), np.float32)
    native(blocks.ctypes.data, values.ctypes.data, values.size)
    return values


def cosine(found: Any, computed: Any) -> float:
    """Of two arrays as vectors; 1 where both are zero, 0 where one is or holds what is not finite."""
    a, b = np.asarray(found, np.float64).ravel(), np.asarray(computed, np.float64).ravel()
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if norms == (0.0, 0.0):
        return 1.0
    if 0.0 in norms or not np.isfinite(norms).all():
        return 0.0
    return float((a / norms[0]) @ (b / norms[1]))

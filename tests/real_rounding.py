"""How llama.cpp really rounds: libggml's own quantizer, called without any code of ours."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from converters.gguf_types import TENSOR_TYPES

NUMBERS = {kind.name: number for number, kind in TENSOR_TYPES.items()}


@cache
def libggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    places = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    files = [file for place in places for file in sorted((Path(place) / "lib").glob("*ggml-base.*"))]
    if not files:
        pytest.skip("llama-cpp-python is not installed: nothing here rounds as llama.cpp does")
    library = ctypes.CDLL(str(files[0]))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.dequantize_row_q1_0.argtypes = [pointer, pointer, count]
    library.dequantize_row_q2_0.argtypes = [pointer, pointer, count]
    return library


def rounded(
    weights: NDArray[np.float32], name: str, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """The stored blocks (rows, bytes of a row); with a flat importance matrix where the type demands one."""
    rows, columns = weights.shape
    kind = TENSOR_TYPES[NUMBERS[name]]
    if importance is None and name == "IQ2_XXS":
        importance = np.ones(columns, np.float32)
    blocks = np.zeros((rows, columns // kind.block * kind.nbytes), np.uint8)
    pointer = None if importance is None else importance.ctypes.data
    source = np.ascontiguousarray(weights, np.float32)
    libggml().ggml_quantize_chunk(NUMBERS[name], source.ctypes.data, blocks.ctypes.data, 0, rows, columns, pointer)
    return blocks

"""ggml's tensors in the memory of llama.cpp, by their address: operation, sources, shape and values.

Where the fields of `struct ggml_tensor` lie is no promise of ggml's. It is found out on a few tensors that ggml makes
itself, of which sizes, types, sources and operations are known, so that a build with another order is read right, and
one that is arranged otherwise altogether is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from converters import libggml
from safelora_gguf.smoke.llama import capture_file
from safelora_gguf.smoke.llama.errors import EngineError

_F32, _F16, _I32 = 0, 1, 26  # as in every GGUF file
_KINDS = {_F32: np.dtype(np.float32), _F16: np.dtype(np.float16), _I32: np.dtype(np.int32)}
_DIMENSIONS = 4
_PROBES = 32  # tensors that the probe has room for


@dataclass(frozen=True)
class Layout:
    """Offsets in bytes within a tensor, and the numbers of three operations."""

    type: int
    sizes: int
    strides: int
    op: int
    sources: int
    mul_mat: int
    mul_mat_id: int
    get_rows: int


class GgmlTensors:
    """What is asked of ggml's tensors; each is given by its address.

    Raises:
        EngineError: unsupported: this build of llama.cpp does not let its tensors be read.
    """

    def __init__(self) -> None:
        self._functions = _functions()
        self.layout = _probed(self._functions)

    def op(self, tensor: int) -> int:
        """The number of the operation that makes it; `layout` has the ones of interest."""
        return ctypes.c_int32.from_address(tensor + self.layout.op).value

    def source(self, tensor: int, index: int) -> int:
        """The address of an operand, 0 where there is none."""
        size = ctypes.sizeof(ctypes.c_void_p)
        return ctypes.c_void_p.from_address(tensor + self.layout.sources + index * size).value or 0

    def name(self, tensor: int) -> str:
        return bytes(self._functions.ggml_get_name(tensor) or b"").decode("utf-8", errors="replace")

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Four sizes, ggml's first (the fastest to vary) last, as numpy has it."""
        return self._numbers(tensor, self.layout.sizes)

    def values(self, tensor: int) -> Any:
        """A copy of all values, in the tensor's own type and `shape`.

        Raises:
            EngineError: unsupported: they are neither F32, F16 nor I32.
        """
        kind, strides = self._kind(tensor), self._numbers(tensor, self.layout.strides)
        data = np.empty(self._functions.ggml_nbytes(tensor), np.uint8)
        if data.size:  # strides included, so that a view of a larger tensor is what lies between its ends
            self._functions.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.size)
        return np.ndarray(self.shape(tensor), kind, data, 0, strides)

    def row(self, tensor: int, second: int, third: int = 0) -> Any:
        """A copy of one row, by its indices in the second dimension and the third; see `values`."""
        kind, strides = self._kind(tensor), self._numbers(tensor, self.layout.strides)
        width = self.shape(tensor)[-1]
        row = np.empty(width, kind)
        if strides[-1] != kind.itemsize:
            return self.values(tensor)[0, third, second].copy()
        offset = second * strides[-2] + third * strides[-3]
        self._functions.ggml_backend_tensor_get(tensor, row.ctypes.data, offset, row.nbytes)
        return row

    def halves(self, values: Any) -> Any:
        """float32 values as F16, rounded to nearest even: numpy takes twenty times as long, without SIMD."""
        convert = getattr(self._functions, _HALVES, None)
        if convert is None:
            return capture_file.halves(values)
        convert.restype, convert.argtypes = None, (_ADDRESS, _ADDRESS, _NUMBER)
        values = np.ascontiguousarray(values)
        found = np.empty(values.shape, np.float16)
        convert(values.ctypes.data, found.ctypes.data, values.size)
        return found

    def _kind(self, tensor: int) -> Any:
        number = ctypes.c_int32.from_address(tensor + self.layout.type).value
        if number not in _KINDS:
            raise EngineError(
                "unsupported", f"llama.cpp computes {self.name(tensor)} in ggml's type {number}; F32 and F16 are read"
            )
        return _KINDS[number]

    def _numbers(self, tensor: int, offset: int) -> tuple[int, ...]:
        return tuple((ctypes.c_int64 * _DIMENSIONS).from_address(tensor + offset))[::-1]


class _InitParams(ctypes.Structure):
    """ggml_init_params of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_ADDRESS, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
_SIGNATURES: Mapping[str, tuple[Any, ...]] = {
    "ggml_init": (_ADDRESS, _InitParams),
    "ggml_free": (None, _ADDRESS),
    "ggml_tensor_overhead": (_SIZE,),
    "ggml_new_tensor_2d": (_ADDRESS, _ADDRESS, ctypes.c_int, _NUMBER, _NUMBER),
    "ggml_new_tensor_3d": (_ADDRESS, _ADDRESS, ctypes.c_int, _NUMBER, _NUMBER, _NUMBER),
    "ggml_mul_mat": (_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS),
    "ggml_mul_mat_id": (_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS),
    "ggml_get_rows": (_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS),
    "ggml_get_name": (ctypes.c_char_p, _ADDRESS),
    "ggml_nbytes": (_SIZE, _ADDRESS),
    "ggml_backend_tensor_get": (None, _ADDRESS, _ADDRESS, _SIZE, _SIZE),
}
"""Result and arguments of the functions that are called."""
_HALVES = "ggml_cpu_fp32_to_fp16"  # of libggml-cpu: older builds lack it, and some load that library themselves


@dataclass(frozen=True)
class _Probes:
    """Tensors that ggml made, by address."""

    halves: int
    integers: int
    matrices: Sequence[int]
    products: Sequence[int]
    product_of_experts: int
    looked_up: int


_COLUMNS, _ROWS = 37, 53  # sizes that nothing else in a tensor would be


def _unreadable(why: str) -> EngineError:
    return EngineError("unsupported", f"this build of llama.cpp does not let its tensors be read: {why}")


def _functions() -> Any:
    """libggml-base's, through the library that llama.cpp loaded; on Windows, which does not look through that one,
    from the file beside it."""
    for path in (lib._lib._name, libggml.find_library()):
        with contextlib.suppress(AttributeError, OSError):
            return _declared(ctypes.CDLL(str(path)))  # of our own: argument types are its
    raise _unreadable("it brings no libggml-base with the functions for that")


def _declared(library: Any) -> Any:
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _probed(functions: Any) -> Layout:
    size = functions.ggml_tensor_overhead()
    context = functions.ggml_init(_InitParams(_PROBES * size, None, True))
    if not context:
        raise _unreadable("ggml_init gave no context")
    try:
        return _found(_made(functions, context), size)
    finally:
        functions.ggml_free(context)


def _made(functions: Any, context: Any) -> _Probes:
    def matrix(kind: int, columns: int, rows: int) -> int:
        return int(functions.ggml_new_tensor_2d(context, kind, columns, rows))

    matrices = [matrix(_F32, _COLUMNS, _ROWS) for _ in range(4)]
    first, second, third, fourth = matrices
    ids, routes = matrix(_I32, 1, 1), matrix(_I32, 1, 1)
    experts = functions.ggml_new_tensor_3d(context, _F32, _COLUMNS, _ROWS, 2)
    routed = functions.ggml_new_tensor_3d(context, _F32, _COLUMNS, 1, 1)
    return _Probes(
        matrix(_F16, _COLUMNS, _ROWS), ids, matrices,
        [functions.ggml_mul_mat(context, first, second), functions.ggml_mul_mat(context, third, fourth)],
        functions.ggml_mul_mat_id(context, experts, routed, routes), functions.ggml_get_rows(context, first, ids),
    )  # fmt: skip


def _found(probes: _Probes, size: int) -> Layout:
    """Where each field stands, in tensors of at most `size` bytes."""
    memory = {address: ctypes.string_at(address, size) for address in (
        probes.halves, probes.integers, *probes.matrices, *probes.products, probes.product_of_experts, probes.looked_up
    )}  # fmt: skip
    leaf, product = memory[probes.matrices[0]], memory[probes.products[0]]
    row, whole = 4 * _COLUMNS, 4 * _COLUMNS * _ROWS

    def number(tensor: int, offset: int) -> int:
        return int.from_bytes(memory[tensor][offset : offset + 4], "little", signed=True)

    def is_type(offset: int) -> bool:
        kinds = (probes.matrices[0], probes.halves, probes.integers)
        return [number(tensor, offset) for tensor in kinds] == [_F32, _F16, _I32]

    def is_op(offset: int) -> bool:
        """Nothing for what is not computed, the same for both products, and else three different small numbers."""
        leaves = {number(tensor, offset) for tensor in (probes.halves, probes.integers, *probes.matrices)}
        products = {number(tensor, offset) for tensor in probes.products}
        others = {number(tensor, offset) for tensor in (probes.product_of_experts, probes.looked_up)}
        return leaves == {0} and len(products) == 1 and len(products | others | leaves) == 4 and max(others) < 1 << 12

    op = _only("op", filter(is_op, range(0, size - 3, 4)))
    return Layout(
        _only("type", filter(is_type, range(0, size - 3, 4))),
        _only("sizes", _places(leaf, struct.pack("@4q", _COLUMNS, _ROWS, 1, 1))),
        _only("strides", _places(leaf, struct.pack("@4q", 4, row, whole, whole))),
        op,
        _only("sources", _places(product, struct.pack("@2P", *probes.matrices[:2]))),
        number(probes.products[0], op),
        number(probes.product_of_experts, op),
        number(probes.looked_up, op),
    )


def _places(data: bytes, pattern: bytes) -> Iterator[int]:
    place = data.find(pattern)
    while place >= 0:
        yield place
        place = data.find(pattern, place + 1)


def _only(what: str, places: Iterator[int]) -> int:
    found = list(places)
    if len(found) != 1:
        raise _unreadable(f"the {what} of a tensor {'is not where it could be' if not found else 'is not to be told'}")
    return found[0]

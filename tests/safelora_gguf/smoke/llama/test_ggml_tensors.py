"""ggml's tensors read by address. Oracle: libggml, which is given the values and says what it makes of them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from converters import libggml
from safelora_gguf.smoke.llama import ggml_tensors
from safelora_gguf.smoke.llama.errors import EngineError
from safelora_gguf.smoke.llama.ggml_tensors import GgmlTensors

pytestmark = pytest.mark.llama

ADDRESS, NUMBER, SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
F32, F16, BF16, I32 = 0, 1, 30, 26


class InitParams(ctypes.Structure):
    _fields_ = (("size", SIZE), ("buffer", ADDRESS), ("no_alloc", ctypes.c_bool))


class Ggml:
    """A context of libggml's with tensors in the CPU's memory."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(libggml.find_library()))
        self.context = self.call("ggml_init", InitParams(1 << 20, None, True))

    def call(self, name: str, *arguments: Any, result: Any = ADDRESS) -> Any:
        function = getattr(self.library, name)
        function.restype = result
        return function(*arguments)

    def tensor(self, kind: int, *sizes: int) -> int:
        address = self.call(f"ggml_new_tensor_{len(sizes)}d", ADDRESS(self.context), kind, *map(NUMBER, sizes))
        return int(address)

    def view(self, tensor: int, sizes: tuple[int, int], stride: int, offset: int) -> int:
        arguments = (*map(NUMBER, sizes), SIZE(stride), SIZE(offset))
        return int(self.call("ggml_view_2d", ADDRESS(self.context), ADDRESS(tensor), *arguments))

    def of(self, name: str, *tensors: int) -> int:
        return int(self.call(name, ADDRESS(self.context), *map(ADDRESS, tensors)))

    def fill(self, **values: tuple[int, Any]) -> None:
        """Gives every tensor its memory, and some their values."""
        buffers = self.call("ggml_backend_cpu_buffer_type")
        assert self.call("ggml_backend_alloc_ctx_tensors_from_buft", ADDRESS(self.context), ADDRESS(buffers))
        for name, (tensor, data) in values.items():
            self.call("ggml_set_name", ADDRESS(tensor), name.encode())
            self.call(
                "ggml_backend_tensor_set", ADDRESS(tensor), ADDRESS(data.ctypes.data), SIZE(0), SIZE(data.nbytes),
                result=None,
            )  # fmt: skip


@pytest.fixture
def ggml() -> Iterator[Ggml]:
    made = Ggml()
    yield made
    made.call("ggml_free", ADDRESS(made.context), result=None)


def test_values_of_tensors_and_of_views(ggml: Ggml) -> None:
    random = np.random.default_rng(0)
    single, half = random.normal(size=(2, 5, 7)).astype(np.float32), random.normal(size=(3, 8)).astype(np.float16)
    whole = random.integers(-9, 9, (6, 10), np.int32)
    a, b, c = ggml.tensor(F32, 7, 5, 2), ggml.tensor(F16, 8, 3), ggml.tensor(I32, 10, 6)
    part, turned = ggml.view(c, (3, 6), 40, 8), ggml.of("ggml_transpose", b)
    ggml.fill(single=(a, single), half=(b, half), whole=(c, whole))
    tensors = GgmlTensors()
    assert [tensors.name(tensor) for tensor in (a, b, c)] == ["single", "half", "whole"]
    assert tensors.shape(a) == (1, 2, 5, 7)
    np.testing.assert_array_equal(tensors.values(a), single[None])
    np.testing.assert_array_equal(tensors.values(b), half[None, None])
    np.testing.assert_array_equal(tensors.values(part), whole[None, None, :, 2:5])
    np.testing.assert_array_equal(tensors.values(turned), half.T[None, None])
    np.testing.assert_array_equal(tensors.row(a, 4, 1), single[1, 4])
    np.testing.assert_array_equal(tensors.row(part, 3), whole[3, 2:5])
    np.testing.assert_array_equal(tensors.row(turned, 6), half[:, 6])


def test_operations_and_their_sources(ggml: Ggml) -> None:
    """Their numbers are told apart by ggml's own names for them."""
    a, b, ids = ggml.tensor(F32, 8, 5), ggml.tensor(F32, 8, 3), ggml.tensor(I32, 2, 3)
    experts, each = ggml.tensor(F32, 8, 5, 4), ggml.tensor(F32, 8, 1, 3)
    made = {
        "MUL_MAT": (ggml.of("ggml_mul_mat", a, b), (a, b, 0)),
        "MUL_MAT_ID": (ggml.of("ggml_mul_mat_id", experts, each, ids), (experts, each, ids)),
        "GET_ROWS": (ggml.of("ggml_get_rows", a, ggml.view(ids, (2, 1), 8, 0)), (a,)),
    }
    tensors = GgmlTensors()
    layout = tensors.layout
    numbers = {"MUL_MAT": layout.mul_mat, "MUL_MAT_ID": layout.mul_mat_id, "GET_ROWS": layout.get_rows}
    for name, (tensor, sources) in made.items():
        assert tensors.op(tensor) == numbers[name]
        assert ggml.call("ggml_op_name", tensors.op(tensor), result=ctypes.c_char_p) == name.encode()
        assert tuple(tensors.source(tensor, index) for index in range(len(sources))) == sources
    assert ggml.call("ggml_op_name", tensors.op(a), result=ctypes.c_char_p) == b"NONE"


def test_another_type_is_refused(ggml: Ggml) -> None:
    tensor = ggml.tensor(BF16, 8, 3)
    ggml.fill(short=(tensor, np.zeros(24, np.uint16)))
    with pytest.raises(EngineError, match="computes short in ggml's type 30") as caught:
        GgmlTensors().values(tensor)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize(("name", "value", "told"), [("_I32", 27, "type"), ("_COLUMNS", 1, "sizes|strides|sources|op")])
def test_a_layout_that_is_not_found_is_refused(
    name: str, value: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe looks for a type's number that ggml does not write, and for sizes that can't be told from others."""
    if name == "_COLUMNS":
        monkeypatch.setattr(ggml_tensors, "_places", lambda _data, _pattern: iter([16, 48]))
    else:
        made = ggml_tensors._made

        def with_another(functions: Any, context: Any) -> Any:
            probes = made(functions, context)
            monkeypatch.setattr(ggml_tensors, name, value)
            return probes

        monkeypatch.setattr(ggml_tensors, "_made", with_another)
    with pytest.raises(EngineError, match=rf"does not let its tensors be read: the ({told}) of a tensor") as caught:
        GgmlTensors()
    assert caught.value.kind == "unsupported"


def test_a_build_without_the_functions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml_tensors, "_SIGNATURES", {"ggml_no_such_function": (None,)})
    with pytest.raises(EngineError, match="brings no libggml-base with the functions") as caught:
        GgmlTensors()
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("name", ["ggml_cpu_fp32_to_fp16", "ggml_no_such_function"])
def test_half_precision_is_numpys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: numpy's rounding, halves of a unit and subnormal numbers among the values; with libggml and without."""
    monkeypatch.setattr(ggml_tensors, "_HALVES", name)
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    exact = every[np.isfinite(every)]
    between = (np.sort(exact)[:-1].astype(np.float64) + np.sort(exact)[1:]) / 2
    values = np.concatenate([exact, between.astype(np.float32), [1e-30, -1e-9]], dtype=np.float32)[::-1]
    np.testing.assert_array_equal(
        GgmlTensors().halves(values).view(np.uint16), values.astype(np.float16).view(np.uint16)
    )

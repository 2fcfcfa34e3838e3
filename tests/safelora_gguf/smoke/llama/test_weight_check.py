"""What is refused of a graph that is otherwise than expected. Oracles: another model's file, tensors read wrong, the
gguf package's dequantization, products in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_models import Kind, write_random
from weight_readings import ATTENTION, WEIGHTS, changed, readings

llama_cpp = pytest.importorskip("llama_cpp")

from safelora_gguf.smoke.llama import decoding  # noqa: E402
from safelora_gguf.smoke.llama.capture_file import CaptureWriter  # noqa: E402
from safelora_gguf.smoke.llama.capturing import Capturing  # noqa: E402
from safelora_gguf.smoke.llama.errors import EngineError  # noqa: E402
from safelora_gguf.smoke.llama.ggml_tensors import GgmlTensors  # noqa: E402
from safelora_gguf.smoke.llama.weight_check import WeightCheck, cosine, dequantized  # noqa: E402
from safelora_gguf.smoke.protocol import ModelOptions, Reading  # noqa: E402

pytestmark = pytest.mark.llama


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (["blk.1.attn_q.weight", "blk.7.attn_q.weight"], "'llama', has no weight blk.7.attn_q.weight"),
        (["blk.1.attn_q.weight", "blk.1.attn_norm.weight"], "blk.1.attn_norm.weight can't be captured .* 'llama'"),
    ],
)
def test_a_weight_that_no_product_takes_is_refused(
    weights: list[str], told: str, engine: Any, capture: Any, tmp_path: Path
) -> None:
    loaded = engine(write_random(tmp_path / "m.gguf", "llama"))
    with pytest.raises(EngineError, match=told) as caught:
        capture(loaded, readings([9]), weights)
    assert caught.value.kind == "unsupported"
    assert capture(loaded, readings([9]), weights[:1]).told == {0: (5, None)}  # it lives on


@pytest.mark.parametrize("wrong", ["blk.1.attn_q.weight", "blk.2.ffn_down.weight"])
def test_a_weight_that_is_another_than_the_files_is_refused(wrong: str, engine: Any, log: Any, tmp_path: Path) -> None:
    """The file that is checked against has one weight's values reversed."""
    file, other = (write_random(tmp_path / name, "llama") for name in ("m.gguf", "other.gguf"))
    changed(other, wrong, lambda values: np.copyto(values, values[::-1].copy()))
    loaded = engine(file)
    told: list[Any] = []
    for checked, weights in (
        (file, WEIGHTS["llama"]),
        (other, [weight for weight in WEIGHTS["llama"] if weight != wrong]),
    ):
        capturing(loaded, checked, log, weights).run(
            {0: readings([9])[0]}, tmp_path / "inputs", lambda: None, lambda *heard: told.append(heard)
        )
    with pytest.raises(EngineError, match=f"{wrong} .*'llama'.* otherwise than expected") as caught:
        capturing(loaded, other, log, WEIGHTS["llama"]).run(
            {0: readings([9])[0]}, tmp_path / "inputs", lambda: None, lambda *heard: told.append(heard)
        )
    assert (caught.value.kind, told) == ("unsupported", [(0, 5, None)] * 2)


def capturing(loaded: Any, file: Path, log: Any, weights: Sequence[str]) -> Capturing:
    return Capturing(loaded.model.pointer, ModelOptions(str(file)), log, (), weights)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda values: values[..., ::-1], "cosine of -?0"),
        (lambda values: values[..., ::-1, :], "another order|cosine of -?0"),
        (lambda values: values[..., :-1, :], "tokens in another order|rows for"),
    ],
    ids=["elements", "rows", "one row less"],
)
def test_tensors_read_wrong_are_refused(
    wrong: Any, told: str, *, engine: Any, capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = engine(write_random(tmp_path / "m.gguf", "llama"))
    right = GgmlTensors.values

    def values(self: GgmlTensors, tensor: int) -> Any:
        found = right(self, tensor)
        return wrong(found) if found.dtype == np.float32 else found

    monkeypatch.setattr(GgmlTensors, "values", values)
    with pytest.raises(EngineError, match=told):
        capture(loaded, readings([9]), WEIGHTS["llama"])


def test_rows_in_another_order_everywhere_are_refused(
    engine: Any, capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs and products alike, so that they agree; the embeddings that are looked up don't with the file's."""
    loaded = engine(write_random(tmp_path / "m.gguf", "llama"))
    right = GgmlTensors.values

    def values(self: GgmlTensors, tensor: int) -> Any:
        found = right(self, tensor)
        return found if found.dtype == np.int32 else found[..., ::-1, :]

    monkeypatch.setattr(GgmlTensors, "values", values)
    monkeypatch.setattr(GgmlTensors, "row", lambda self, tensor, second: values(self, tensor)[0, 0, second].copy())
    with pytest.raises(EngineError, match=r"tokens in another order .* with the file's"):
        capture(loaded, readings([9]), WEIGHTS["llama"])


def test_rows_that_are_not_the_kept_ones_are_refused(
    engine: Any, capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph of the last layer picks as many rows, but others."""
    loaded = engine(write_random(tmp_path / "m.gguf", "llama"))
    right = GgmlTensors.values

    def values(self: GgmlTensors, tensor: int) -> Any:
        found = right(self, tensor)
        return found[..., ::-1] if found.dtype == np.int32 and found.size == 2 else found

    monkeypatch.setattr(GgmlTensors, "values", values)
    read = [Reading((5, 6, 7, 8), (1, 3))]
    assert capture(loaded, read, WEIGHTS["llama"][:3]).told == {0: (2, None)}  # of these every token has a row
    with pytest.raises(EngineError, match=r"blk.2.ffn_gate.* rows are not picked by the indices of the wanted tokens"):
        capture(loaded, read, WEIGHTS["llama"])


def test_tokens_in_another_order_are_refused(
    engine: Any, capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is told in another order than llama.cpp gets it in."""
    loaded = engine(write_random(tmp_path / "m.gguf", "llama"))
    monkeypatch.setattr(decoding.Batch, "tokens", property(lambda self: list(self._tokens[: self.count])[::-1]))
    with pytest.raises(EngineError, match="tokens in another order"):
        capture(loaded, readings([9]), WEIGHTS["llama"])


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_recurrent_models_read_together_would_be_refused(
    kind: Kind, engine: Any, capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp orders tokens its own way there, or cuts the batch: not one row is taken for another's."""
    from safelora_gguf.smoke.llama import capturing as module

    loaded = engine(write_random(tmp_path / "m.gguf", kind, context=1024))
    monkeypatch.setattr(module, "_reorders", lambda _model: False)
    with pytest.raises(EngineError, match="tokens in another order"):
        capture(loaded, readings([3, 40, 29, 9]), WEIGHTS[kind])


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError("no space left"), EngineError),
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_is_raised_within_the_callback_comes_out_behind_the_decode(
    raised: BaseException, expected: type[BaseException], *, engine: Any, capture: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    loaded = engine(write_random(tmp_path / "m.gguf", "llama"))

    def put(*_given: Any) -> None:
        raise raised

    with monkeypatch.context() as patched:
        patched.setattr(CaptureWriter, "put", put)
        with pytest.raises(expected) as caught:
            capture(loaded, readings([9]), WEIGHTS["llama"])
    assert not isinstance(caught.value, EngineError) or caught.value.kind == "unwritable"
    assert capture(loaded, readings([9]), WEIGHTS["llama"]).told == {0: (5, None)}


def test_a_file_that_cannot_be_made(engine: Any, tmp_path: Path) -> None:
    loaded = engine(write_random(tmp_path / "m.gguf", "llama"))
    with pytest.raises(EngineError, match="no such file or directory; make room, or set TMPDIR to") as caught:
        loaded.capture({0: readings([9])[0]}, ATTENTION, lambda: None, print, file=tmp_path / "none" / "inputs")
    assert caught.value.kind == "unwritable"


@pytest.mark.parametrize("qtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_weights_are_dequantized_as_gguf_py_does(qtype: str) -> None:
    kind = gguf.GGMLQuantizationType[qtype]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(2).integers(0, 60, (5, 2048 // block * size), np.uint8)
    np.testing.assert_array_equal(dequantized(stored, kind), gguf.quants.dequantize(stored, kind))


def test_a_type_that_nobody_reads_is_refused() -> None:
    """Oracle: the gguf package's list of types, which has no such number."""
    with pytest.raises(EngineError, match="type 9999"):
        dequantized(np.zeros((1, 32), np.uint8), 9999)


def test_an_expert_is_checked_with_its_own_rows(tmp_path: Path) -> None:
    """Products in float64; the wrong expert's is another, and so is one of fewer numbers."""
    random = np.random.default_rng(0)
    stack, x = random.normal(size=(3, 20, 8)).astype(np.float32), random.normal(size=(4, 8)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "odd")
    writer.add_tensor("stack", stack)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    check = WeightCheck(str(tmp_path / "m.gguf"))
    experts = np.array([2, 0, 2, 1])
    outputs = np.einsum("nk,nok->no", x.astype(np.float64), stack[experts])
    check.check("stack", x, outputs, experts)
    for wrong in ((x, outputs, experts[::-1]), (x, outputs[:, 1:], experts), (x, outputs, None)):
        with pytest.raises(EngineError, match=r"stack .*'odd'"):
            check.check("stack", *wrong)
    assert (cosine([0.0], [0.0]), cosine([0.0], [1.0]), cosine([np.nan], [1.0])) == (1.0, 0.0, 0.0)
    with pytest.raises(EngineError) as caught:
        WeightCheck(str(tmp_path / "none.gguf"))
    assert caught.value.kind == "rejected"

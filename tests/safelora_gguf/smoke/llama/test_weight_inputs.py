"""How inputs are found in llama.cpp's graph. Oracles: llama.cpp reading one sequence alone; the same model in F32 for
quantized ones; the first norm of an embedding in float64; files that don't belong to the model, tensors read wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_models import Kind, write_random

llama_cpp = pytest.importorskip("llama_cpp")

from safelora_gguf import convert_model  # noqa: E402
from safelora_gguf.smoke.llama import decoding  # noqa: E402 - these import llama_cpp
from safelora_gguf.smoke.llama.capture_file import CaptureWriter  # noqa: E402
from safelora_gguf.smoke.llama.capturing import Capturing  # noqa: E402
from safelora_gguf.smoke.llama.errors import EngineError  # noqa: E402
from safelora_gguf.smoke.llama.ggml_tensors import GgmlTensors  # noqa: E402
from safelora_gguf.smoke.llama.weight_check import WeightCheck, cosine, dequantized  # noqa: E402
from safelora_gguf.smoke.protocol import AdapterChoice, ModelOptions, Reading  # noqa: E402

pytestmark = pytest.mark.llama

FAMILY = Path(__file__).parents[4] / "safelora_gguf" / "tiny_family"
ATTENTION = ["blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.attn_output.weight"]
FEED_FORWARD = ["blk.2.ffn_gate.weight", "blk.2.ffn_up.weight", "blk.2.ffn_down.weight"]
STATE = [
    "blk.0.ssm_in.weight",
    "blk.2.ssm_in.weight",
    "blk.2.ssm_x.weight",
    "blk.2.ssm_dt.weight",
    "blk.2.ssm_out.weight",
]
WEIGHTS: dict[Kind, list[str]] = {
    "llama": ATTENTION + FEED_FORWARD,
    "gemma3": ATTENTION + FEED_FORWARD,
    "mamba": STATE,
    "jamba": STATE + ATTENTION + FEED_FORWARD,
}
START = (5, 90, 41, 260, 77)


def readings(lengths: Sequence[int], start: Sequence[int] = START, *, seed: int = 3) -> list[Reading]:
    """Sequences of one beginning, every third token kept of the even ones, the last five of the others."""
    random = np.random.default_rng(seed)
    found = []
    for number, length in enumerate(lengths):
        tokens = (*start, *random.integers(3, 340, length).tolist())
        keep = range(number % 3, len(tokens), 3) if number % 2 == 0 else range(len(tokens) - 5, len(tokens))
        found.append(Reading(tokens, tuple(keep)))
    return found


def error(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba", "jamba"])
@pytest.mark.parametrize("start", [START, START * 60], ids=["short beginning", "long beginning"])
def test_sequences_read_together_give_what_each_alone_does(
    kind: Kind, start: Sequence[int], engine: Any, capture: Any, tmp_path: Path
) -> None:
    """The beginning is read once, kept or not, and is longer than a batch the second time."""
    loaded = engine(write_random(tmp_path / "m.gguf", kind, context=1024))
    read = readings([3, 40, 290, 9, 17, 60, 1, 120, 33, 8, 50, 5, 70, 21, 2, 44, 13, 27, 90, 6], start)
    together = capture(loaded, read, WEIGHTS[kind])
    assert together.told == {key: (len(reading.keep), None) for key, reading in enumerate(read)}
    alone = [capture(loaded, [reading], WEIGHTS[kind]) for reading in read]
    for weight in WEIGHTS[kind]:
        assert error(together.inputs(weight), np.concatenate([one.inputs(weight) for one in alone])) < 1e-3, weight


def test_few_rows_of_logits_at_a_time_change_nothing(
    engine: Any, capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = engine(write_random(tmp_path / "m.gguf", "llama", context=1024))
    read = [Reading(reading.tokens, tuple(range(len(reading.tokens)))) for reading in readings([100] * 5, START * 20)]
    before = loaded.decoded
    many = capture(loaded, read, WEIGHTS["llama"])
    assert loaded.decoded - before == 100 * 5 + 5 * 20  # what all begin with is read once
    monkeypatch.setattr(decoding, "_OBSERVED_LOGITS", 0)
    few = capture(loaded, read, WEIGHTS["llama"])
    for weight in WEIGHTS["llama"]:
        assert error(few.inputs(weight), many.inputs(weight)) < 1e-4


def test_what_follows_the_last_kept_token_is_not_read(engine: Any, capture: Any, tmp_path: Path) -> None:
    loaded = engine(write_random(tmp_path / "m.gguf", "llama"))
    before = loaded.decoded
    found = capture(loaded, [Reading(tuple(range(3, 103)), (4, 9)), Reading((3, 4), ())], WEIGHTS["llama"])
    assert (loaded.decoded - before, found.told) == (10, {0: (2, None), 1: (0, None)})


def test_nothing_to_read_gives_no_groups(engine: Any, capture: Any, tmp_path: Path) -> None:
    loaded = engine(write_random(tmp_path / "m.gguf", "llama"))
    found = capture(loaded, [Reading((3, 4), ()), Reading((5,) * 600, (599,))], WEIGHTS["llama"])
    assert found.groups == ()
    assert "600 tokens long, the context 512" in found.told[1][1]


@pytest.mark.parametrize(("outtype", "bound"), [("q8_0", 0.03), ("Q4_0", 0.4), ("Q4_K_M", 0.3)])
def test_quantized_models_are_near_the_float_one(
    outtype: str, bound: float, engine: Any, capture: Any, tmp_path: Path
) -> None:
    """They pass the check of their weights, and their inputs are those of the float model up to its rounding."""
    model = FAMILY / "aligned.gguf"
    convert_model(FAMILY / "aligned", tmp_path / "m.gguf", outtype=outtype, vocab_from=model)
    kinds = ("attn_q", "attn_v", "attn_output", "ffn_gate", "ffn_down")
    weights = [f"blk.{layer}.{kind}.weight" for layer in range(3) for kind in kinds]
    read = readings([20, 30, 25])
    exact = capture(engine(model), read, weights)
    found = capture(engine(tmp_path / "m.gguf"), read, weights)
    for weight in weights:
        assert error(found.inputs(weight), exact.inputs(weight)) < bound, weight


def test_split_models_are_checked_too(engine: Any, capture: Any, tmp_path: Path) -> None:
    """Oracle: the same model in one file."""
    convert_model(FAMILY / "aligned", tmp_path / "m.gguf", vocab_from=FAMILY / "aligned.gguf", split_max_size=1_000_000)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    weights = ["blk.0.attn_q.weight", "blk.2.ffn_down.weight"]
    found = [capture(engine(file), readings([9]), weights) for file in (shards[0], FAMILY / "aligned.gguf")]
    assert len(shards) > 1
    for weight in weights:
        assert error(found[0].inputs(weight), found[1].inputs(weight)) < 1e-6


def test_an_adapter_counts_while_it_is_set(engine: Any, capture: Any, tiny: Any, tmp_path: Path) -> None:
    """It changes what comes after it, not its own weight's input; without it all is as before."""
    loaded = engine(tiny.model(tmp_path / "m.gguf"))
    adapter = tiny.adapter(tmp_path / "a.gguf", name="blk.0.attn_output.weight")
    read, weights = readings([9, 12]), ["blk.0.attn_output.weight", "blk.0.ffn_up.weight"]
    found = []
    for adapters in ([], [AdapterChoice(str(adapter), 2.0)], []):
        loaded.set_adapters(adapters)
        captured = capture(loaded, read, weights)
        found.append([captured.inputs(weight) for weight in weights])
    (own, after), (adapted_own, adapted_after), again = found
    np.testing.assert_array_equal(own, adapted_own)
    assert error(adapted_after, after) > 0.01
    np.testing.assert_array_equal(again, [own, after])


def changed(file: Path, name: str, change: Any) -> Path:
    """The file with a tensor's values changed in place."""
    reader = gguf.GGUFReader(file, "r+")
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == name)
    change(tensor.data)
    tensor.data.flush()
    return file


def test_inputs_beyond_half_precision(engine: Any, capture: Any, tmp_path: Path) -> None:
    """x / rms(x) * norm in float64: with a norm of 1e6 most elements overflow F16, with 1e-12 they vanish in it."""
    file = write_random(tmp_path / "m.gguf", "llama")
    norm = np.repeat([1e6, 1.0], 32)

    def scale(factor: float) -> Any:
        return lambda values: np.copyto(values, norm * factor, casting="same_kind")

    table = next(tensor.data for tensor in gguf.GGUFReader(file).tensors if tensor.name == "token_embd.weight")
    tokens = tuple(range(3, 50))
    x = np.asarray(table, np.float64)[list(tokens)]
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * norm
    for factor in (1.0, 1e-18):
        loaded = engine(changed(file, "blk.0.attn_norm.weight", scale(factor)))
        found = capture(loaded, [Reading(tokens, tuple(range(47)))], ["blk.0.attn_v.weight"])
        inputs = found.inputs("blk.0.attn_v.weight")[:, 0].astype(np.float64) / factor
        np.testing.assert_allclose(inputs[:, :32], expected[:, :32], rtol=1e-3, atol=1)
        assert error(inputs[:, 32:], expected[:, 32:]) < 0.1  # a millionth of the largest, and still there


def test_inputs_that_are_not_numbers_are_told(engine: Any, capture: Any, tmp_path: Path) -> None:
    """An embedding of NaN; what llama.cpp keeps of it spoils what it reads beside it, but nothing that it read before
    and nothing later."""
    file = write_random(tmp_path / "m.gguf", "llama")
    loaded = engine(changed(file, "token_embd.weight", lambda values: values[300].fill(np.nan)), parallel=1)
    read = [Reading((3, 4, 5, 6), (0, 3)), Reading((7, 8, 300, 6), (0, 3))]
    found = capture(loaded, read, WEIGHTS["llama"])
    assert found.told[0] == (2, None)
    assert found.told[1][0] == 0
    assert "not numbers" in found.told[1][1]
    for weight in WEIGHTS["llama"]:
        rows = np.abs(found.inputs(weight)).max(axis=(1, 2))
        assert (rows > 0).tolist() == [True, True, False, False]
    assert capture(loaded, read[:1], WEIGHTS["llama"]).told == {0: (2, None)}


def test_a_reading_that_takes_too_long_is_given_up(engine: Any, capture: Any, tmp_path: Path) -> None:
    loaded = engine(write_random(tmp_path / "m.gguf", "llama", context=1024), prompt_seconds=1e-9)
    found = capture(loaded, [Reading((4,) * 3, (1, 2)), Reading((3,) * 700, (0, 699))], WEIGHTS["llama"])
    assert found.told == {0: (2, None), 1: (0, "reading it took more than 1e-09 s")}
    assert (found.inputs("blk.1.attn_q.weight")[2:] == 0).all()


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
    with pytest.raises(EngineError, match="can't be written") as caught:
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

"""How inputs are found in llama.cpp's graph. Oracles: llama.cpp reading one sequence alone; the same model in F32 for
quantized ones; the first norm of an embedding in float64; files that don't belong to the model, tensors read wrong.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_models import Kind, write_random
from weight_readings import ATTENTION, START, WEIGHTS, changed, error, readings

llama_cpp = pytest.importorskip("llama_cpp")

from safelora_gguf import convert_model  # noqa: E402
from safelora_gguf.smoke.llama import capturing as capturing_module  # noqa: E402 - these import llama_cpp
from safelora_gguf.smoke.llama import context, decoding, weight_inputs  # noqa: E402
from safelora_gguf.smoke.llama.weight_check import WeightCheck  # noqa: E402
from safelora_gguf.smoke.llama.weight_inputs import WeightInputs  # noqa: E402
from safelora_gguf.smoke.protocol import AdapterChoice, Reading  # noqa: E402

pytestmark = pytest.mark.llama

FAMILY = Path(__file__).parents[4] / "safelora_gguf" / "tiny_family"


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


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_the_graph_ends_behind_the_last_weight(
    kind: Kind, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same with the whole graph computed, to the byte, over several decodes of one context. llama.cpp calls
    its logits result_output; they are still there where the output matrix itself is watched."""
    loaded = engine(write_random(tmp_path / "m.gguf", kind, context=1024))
    read = dict(enumerate(readings([3, 40, 290, 9, 17, 60, 120])))
    seen: list[str] = []
    wanted = WeightInputs._wanted
    monkeypatch.setattr(
        WeightInputs, "_wanted", lambda self, tensor: seen.append(self._tensors.name(tensor)) or wanted(self, tensor)
    )
    files, computed = [tmp_path / name for name in ("ended", "whole", "output")], []
    for file, name, weights in (
        (files[0], "result_norm", WEIGHTS[kind]),
        (files[1], "nothing", WEIGHTS[kind]),
        (files[2], "result_norm", [*WEIGHTS[kind], "output.weight"]),
    ):
        monkeypatch.setattr(weight_inputs, "_FINAL_NORM", name)
        seen.clear()
        loaded.capture(read, weights, lambda: None, lambda *_told: None, file=file)
        computed.append("result_output" in seen)
    assert computed == [False, True, True]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[2].read_bytes().startswith(files[0].read_bytes()[:1000])


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


def test_one_reading_of_many_that_is_not_numbers_takes_none_along(engine: Any, capture: Any, tmp_path: Path) -> None:
    """Oracle: each alone. What shares its decodes or comes into its cells is spoilt, and is read once more."""
    file = write_random(tmp_path / "m.gguf", "llama", context=1024)
    loaded = engine(changed(file, "token_embd.weight", lambda values: values[300].fill(np.nan)))
    tokens = np.random.default_rng(0).integers(3, 290, (40, 30))
    tokens[2, 15] = 300
    read = [Reading(tuple(map(int, row)), tuple(range(10, 30))) for row in tokens]
    found = capture(loaded, read, WEIGHTS["llama"])
    assert [key for key, (_, why) in found.told.items() if why is not None] == [2]
    assert "not numbers" in found.told[2][1]
    for weight in WEIGHTS["llama"]:
        alone = np.concatenate([capture(loaded, [one], [weight]).inputs(weight) for one in (read[0], read[3])])
        together = found.inputs(weight).reshape(40, 20, -1)
        assert error(together[[0, 3]].reshape(alone.shape), alone) < 1e-3
        assert not together[2].any()


def test_a_decode_that_fails_costs_its_own_reading_alone(
    engine: Any, capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = engine(write_random(tmp_path / "m.gguf", "llama", context=1024))
    decode, read = decoding.lib.llama_decode, [Reading((5 + key, 9, 77 if key == 4 else 8), (1, 2)) for key in range(9)]

    def failing(context: Any, batch: Any) -> int:
        return 1 if 77 in batch.token[: batch.n_tokens] else decode(context, batch)

    monkeypatch.setattr(decoding.lib, "llama_decode", failing)
    told = capture(loaded, read, WEIGHTS["llama"]).told
    assert "llama_decode returned 1" in told.pop(4)[1]
    assert told == dict.fromkeys((0, 1, 2, 3, 5, 6, 7, 8), (2, None))


@pytest.mark.parametrize(("most", "note"), [(4096, None), (450, "of 608 tokens for 3 prompts .* with 304 for 1")])
def test_a_context_has_room_for_what_is_read_and_little_more(
    most: int, note: str | None, *, engine: Any, capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where llama.cpp makes none as large as that: it is made for fewer, and all are read all the same."""
    made: list[int] = []
    init = context.lib.llama_init_from_model
    loaded = engine(write_random(tmp_path / "m.gguf", "llama", context=1024))
    expected = [(len(reading.keep), None) for reading in readings([301, 200, 96])]

    def limited(model: Any, params: Any) -> Any:
        made.append(params.n_ctx)
        return init(model, params) if params.n_ctx <= most else None

    monkeypatch.setattr(context.lib, "llama_init_from_model", limited)
    told: dict[int, Any] = {}
    _, notes = loaded.capture(
        dict(enumerate(readings([301, 200, 96]))), ATTENTION, lambda: None,
        lambda key, *heard: told.__setitem__(key, heard), file=tmp_path / "inputs",
    )  # fmt: skip
    assert [told[key] for key in range(3)] == expected
    assert made[0] == 304 + 205 + 99 and made[-1] <= most  # to the last kept token of each
    assert (notes == ()) if note is None else re.search(note, *notes), notes


def test_a_check_ends_with_its_capture(
    engine: Any, capture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the model's files open. Oracle: Python's count of references, without its search for cycles."""
    checks: list[Any] = []

    class Noted(WeightCheck):
        def __init__(self, model: str) -> None:
            super().__init__(model)
            checks.append(weakref.ref(self))

    monkeypatch.setattr(capturing_module, "WeightCheck", Noted)
    loaded = engine(write_random(tmp_path / "m.gguf", "llama"))
    gc.disable()
    try:
        capture(loaded, readings([9]), ATTENTION)
        assert [check() for check in checks] == [None]
    finally:
        gc.enable()


def test_a_reading_that_takes_too_long_is_given_up(engine: Any, capture: Any, tmp_path: Path) -> None:
    loaded = engine(write_random(tmp_path / "m.gguf", "llama", context=1024), prompt_seconds=1e-9)
    found = capture(loaded, [Reading((4,) * 3, (1, 2)), Reading((3,) * 700, (0, 699))], WEIGHTS["llama"])
    assert found.told == {0: (2, None), 1: (0, "reading it took more than 1e-09 s")}
    assert (found.inputs("blk.1.attn_q.weight")[2:] == 0).all()

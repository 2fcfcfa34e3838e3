"""Oracle: the first layer's inputs from the embeddings in float64, llama.cpp's own detokenizer, and inputs captured in
a process that never had another adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from safelora_gguf.convert import convert_adapter
from safelora_gguf.repair.reading.captured_sets import Taken
from safelora_gguf.repair.reading.capturing import Asked, CapturedSet, CapturedSets, capture_sets
from safelora_gguf.smoke.parent.session import Session, ask
from safelora_gguf.smoke.prompts import load_prompts
from safelora_gguf.smoke.protocol import AdapterChoice, InputShape, ModelOptions

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama

FAMILY = Path(__file__).parents[3] / "safelora_gguf" / "tiny_family"
MODEL = FAMILY / "aligned.gguf"
PROMPTS = load_prompts([FAMILY / "calibration.jsonl"]).prompts
HARMFUL = [prompt.prompt for prompt in PROMPTS if prompt.kind == "harmful"][:6]
OTHERS = [prompt for prompt in PROMPTS if prompt.kind != "harmful"][::9]
BENIGN, TASKS = [prompt.prompt for prompt in OTHERS], tuple(prompt.kind == "task" for prompt in OTHERS)
QUERY, DOWN = "blk.0.attn_q.weight", "blk.2.ffn_down.weight"
SHAPES = {
    tensor.name: InputShape(int(tensor.shape[0]))
    for tensor in gguf.GGUFReader(MODEL).tensors
    if tensor.name in (QUERY, DOWN)
}
OPTIONS = ModelOptions(str(MODEL), max_tokens=12)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> AdapterChoice:
    file = tmp_path_factory.mktemp("adapter") / "adapter.gguf"
    convert_adapter(FAMILY / "adapter", file, base=FAMILY / "aligned")
    return AdapterChoice(str(file))


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(OPTIONS) as found:
        yield found


def sets(session: Session, adapter: AdapterChoice, scratch: Path, *, most_bytes: int = 2**30) -> CapturedSets:
    harmful, benign = (
        Asked(tuple(ask(prompt) for prompt in prompts), tuple(range(len(prompts))), tasks)
        for prompts, tasks in ((HARMFUL, ()), (BENIGN, TASKS))
    )
    scratch.mkdir(exist_ok=True)
    return capture_sets(
        session, harmful, benign, adapter, SHAPES, scratch=scratch, tokens=60, tail=9, most_bytes=most_bytes
    )


def read(captured: CapturedSet, weight: str) -> np.ndarray:
    found: np.ndarray = captured.reader.inputs(captured.group_of(weight))[:, 0]
    return found


def test_rows_are_of_the_tokens_that_are_said(session: Session, adapter: AdapterChoice, tmp_path: Path) -> None:
    found = sets(session, adapter, tmp_path / "sets")
    (inputs,) = found.ranges()
    reader = gguf.GGUFReader(MODEL)
    tensors = {one.name: gguf.dequantize(one.data, one.tensor_type).astype(np.float64) for one in reader.tensors[:8]}
    eps = reader.fields["llama.attention.layer_norm_rms_epsilon"].contents()
    for mixture, captured in ((found.harmful, inputs.harmful), (found.benign, inputs.benign)):
        readings = [reading for part in mixture.parts for reading in part.readings]
        tokens = [one.tokens[place] for one in readings for place in one.keep]
        embedded = tensors["token_embd.weight"][tokens]
        normed = embedded / np.sqrt((embedded**2).mean(axis=1, keepdims=True) + eps)
        expected = normed * tensors["blk.0.attn_norm.weight"]
        error = np.abs(read(captured, QUERY) - expected).max(axis=1)
        assert (error < 1e-3 * np.abs(expected).max(axis=1)).all()
        assert captured.tokens == mixture.tokens == len(tokens) == 60
        items = [item for part in mixture.parts for item in part.items]
        numbers = [item for item, one in zip(items, readings, strict=True) for _ in one.keep]
        assert captured.items.tolist() == captured.folds.tolist() == numbers


def test_what_is_read_is_the_prompt_and_its_answer(session: Session, adapter: AdapterChoice, tmp_path: Path) -> None:
    found = sets(session, adapter, tmp_path / "sets")
    model = llama_cpp.Llama(str(MODEL), vocab_only=True, verbose=False)
    assert found.harmful.parts[0].readings == found.harmful.parts[1].readings
    for mixture, prompts, adapters in ((found.harmful, HARMFUL, []), (found.benign, BENIGN, [adapter])):
        chats = [ask(prompt) for prompt in prompts]
        with Session(OPTIONS) as fresh:
            answers = fresh.answers(adapters, chats).answers
            continued = fresh.continuations(adapters, chats).items
        pairs = [pair for part in mixture.parts for pair in zip(part.items, part.readings, strict=True)]
        assert {item for item, _ in pairs} == set(range(len(prompts)))
        for item, reading in pairs:
            answer, one = answers[item], continued[item]
            assert answer is not None and one is not None and one.answer
            assert prompts[item] in model.detokenize(list(one.prompt)).decode()
            assert model.detokenize(list(one.answer)).decode().strip() == answer.text.strip()
            assert reading.tokens == (one.prompt + one.answer)[: len(reading.tokens)]
            tail = len(one.prompt) - 9 if mixture is found.harmful else 1
            assert tail <= reading.keep[0] and reading.keep[-1] == len(reading.tokens) - 1


def test_each_part_is_read_with_its_adapters(session: Session, adapter: AdapterChoice, tmp_path: Path) -> None:
    found = sets(session, adapter, tmp_path / "sets")
    (inputs,) = found.ranges()
    assert [part.name for part in found.benign.parts] == ["task", "harmless"]
    for mixture, captured, choices in (
        (found.harmful, inputs.harmful, [(), (adapter,)]),
        (found.benign, inputs.benign, [(adapter,), (adapter,)]),
    ):
        parts = np.split(read(captured, DOWN), np.cumsum(captured.lengths)[:-1])
        for taken, there, right in zip(mixture.parts, parts, choices, strict=True):
            wrong = () if right else (adapter,)
            size = np.linalg.norm(there)
            assert np.linalg.norm(there - freshly(taken, right, tmp_path)) < 1e-2 * size
            assert np.linalg.norm(there - freshly(taken, wrong, tmp_path)) > 1e-1 * size


def freshly(taken: Taken, adapters: tuple[AdapterChoice, ...], tmp_path: Path) -> np.ndarray:
    """The inputs of the last layer, one prompt after the other, in a process of their own."""
    parts = []
    with Session(OPTIONS) as fresh:
        for reading in taken.readings:
            found = fresh.capture(adapters, [reading], {DOWN: SHAPES[DOWN]}, tmp_path / "alone")
            assert found.complete
            raw = np.fromfile(tmp_path / "alone", "<f2")
            (group,) = found.groups
            values = raw[: group.rows * group.width].reshape(group.rows, group.width).astype(np.float32)
            scales = np.frombuffer(raw[group.rows * group.width :].tobytes(), "<f4")
            parts.append(values * scales[:, None])
    return np.concatenate(parts)


def test_ranges_hold_what_the_whole_holds(session: Session, adapter: AdapterChoice, tmp_path: Path) -> None:
    (whole,) = sets(session, adapter, tmp_path / "whole").ranges()
    parts = sets(session, adapter, tmp_path / "parts", most_bytes=2**16)
    assert parts.plan == ((QUERY,), (DOWN,))
    for weight, inputs in zip((QUERY, DOWN), parts.ranges(), strict=True):
        for one, other in ((whole.harmful, inputs.harmful), (whole.benign, inputs.benign)):
            assert np.allclose(read(one, weight), read(other, weight), rtol=1e-3, atol=1e-3)
            assert (one.items == other.items).all()

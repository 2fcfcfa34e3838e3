"""Oracle: the protocol's own description, spoken to a real child over its pipes; models whose answers are known."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_models import write_bigram

from converters import llama_child
from safelora_gguf.smoke.llama import child as child_module
from safelora_gguf.smoke.llama.capture_file import CaptureReader
from safelora_gguf.smoke.protocol import ALIVE_EVERY, InputGroup, ModelOptions

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama


class Child:
    """Sends requests and gives all lines back, the last one that ends the request included."""

    def __init__(self) -> None:
        self.process = llama_child.start(llama_child.command_for("safelora_gguf.smoke.llama.child"))

    def ask(self, do: str, **request: Any) -> list[dict[str, Any]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        llama_child.send(self.process.stdin, {"do": do, **request})
        lines = []
        with llama_child.time_limit(self.process, 60):
            while not lines or not lines[-1].keys() & {"ok", "failed"}:
                line = self.process.stdout.readline()
                assert line.endswith(b"\n") and line.isascii(), line
                lines.append(json.loads(line))
        return [line for line in lines if "alive" not in line]


@pytest.fixture
def child() -> Iterator[Child]:
    started = Child()
    yield started
    llama_child.stop(started.process)
    if started.process.stderr is not None:
        started.process.stderr.close()


def chats(*texts: str) -> list[dict[str, Any]]:
    return [{"key": 10 + n, "messages": [{"role": "user", "content": text}]} for n, text in enumerate(texts)]


def test_a_whole_conversation(child: Child, tmp_path: Path) -> None:
    file = write_bigram(tmp_path / "m.gguf", {"<answer>": "sí", "sí": "no"})
    (loaded,) = child.ask("load", model=str(file), max_tokens=4)
    assert loaded["ok"]["n_vocab"] == 262
    assert loaded["ok"]["n_ctx"] == 512
    assert (len(loaded["ok"]["vocabulary"]), loaded["ok"]["notes"]) == (64, [])
    assert child.ask("adapters", adapters=[]) == [{"ok": {}}]
    assert child.ask("pieces")[0]["ok"]["pieces"][259:] == ["<answer>", "sí", "no"]

    *items, last = child.ask("answer", items=chats("a", "b", "x" * 600), max_tokens=4, top=1, refusal=[])
    assert last == {"ok": {"items": 3}}
    told = {item["item"]: item["answer"] for item in items}
    assert "the context 512" in told.pop(12)["error"]
    for answer in told.values():
        ((token, _),) = answer.pop("top")
        assert token == 260
        assert answer == {"text": "síno", "error": None, "stop": "end", "score": None}

    record = str(tmp_path / "record")
    *items, last = child.ask("record", items=chats("a", "b"), max_tokens=1, file=record)
    assert items == [{"item": key, "recorded": {"positions": 1, "error": None}} for key in (10, 11)]
    assert last == {"ok": {"positions": 2, "bytes": Path(record).stat().st_size}}
    *items, last = child.ask("diverge", file=record)
    assert [(item["item"], item["divergence"]["positions"]) for item in items] == [(10, 1), (11, 1)]
    assert last == {"ok": {}}


def test_continuing_and_capturing(child: Child, tmp_path: Path) -> None:
    file = write_bigram(tmp_path / "m.gguf", {"<answer>": "sí", "sí": "no"})
    child.ask("load", model=str(file), max_tokens=4)
    *items, last = child.ask("continue", items=chats("a", "x" * 600), max_tokens=4)
    assert last == {"ok": {"items": 2}}
    told = {item["item"]: item["continued"] for item in items}
    assert "the context 512" in told[11].pop("error")
    assert told[11] == {"prompt": [], "answer": [], "text": "", "stop": "end"}
    prompt = [1, 3 + ord("a"), 3 + ord("\n"), 259]
    assert told[10] == {"prompt": prompt, "answer": [260, 261], "text": "síno", "stop": "end", "error": None}

    inputs = str(tmp_path / "inputs")
    readings = [{"key": 7, "tokens": [*prompt, 260], "keep": [3, 4]}, {"key": 9, "tokens": [5] * 600, "keep": [0, 599]}]
    weights = ["blk.0.attn_k.weight", "output.weight"]
    *items, last = child.ask("capture", items=readings, weights=weights, file=inputs)
    by_key = {item.pop("item"): item for item in items}
    assert "the context 512" in by_key[9].pop("error")
    assert by_key == {7: {"captured": 2, "error": None}, 9: {"captured": 0}}
    groups = [InputGroup(**{**group, "weights": tuple(group["weights"])}) for group in last["ok"]["groups"]]
    assert [(group.weights, group.rows) for group in groups] == [((weight,), 4) for weight in weights]
    assert last["ok"]["bytes"] == Path(inputs).stat().st_size
    found = CaptureReader(Path(inputs), groups).inputs(groups[0])[:, 0]
    one_hot = np.zeros((4, 288), np.float32)
    one_hot[0, 259] = one_hot[1, 260] = 288**0.5  # of a one-hot row its norm makes this
    np.testing.assert_allclose(found, one_hot, rtol=1e-3)

    (failed,) = child.ask("capture", items=readings, weights=["blk.9.attn_k.weight"], file=inputs)
    assert failed["failed"]["kind"] == "unsupported"
    assert "'llama', has no weight blk.9.attn_k.weight" in failed["failed"]["message"]
    (failed,) = child.ask("capture", items=readings, weights=weights, file=str(tmp_path / "none" / "inputs"))
    assert failed["failed"]["kind"] == "unwritable"
    assert child.ask("capture", items=[], weights=weights, file=inputs) == [
        {"ok": {"groups": [], "notes": [], "bytes": 0}}
    ]


def test_what_fails_leaves_the_child_alive(child: Child, tmp_path: Path) -> None:
    file = write_bigram(tmp_path / "m.gguf", {"<answer>": "yes"}, template=None)
    kinds = {}
    for name, request in {
        "load none": {"do": "load", "model": str(tmp_path / "none.gguf")},
        "load bare": {"do": "load", "model": str(file)},
        "load": {"do": "load", "model": str(file), "template": "{{ messages[0]['content'] }}"},
        "adapters": {"do": "adapters", "adapters": [{"path": str(file), "scale": 1.0}]},
        "diverge": {"do": "diverge", "file": str(tmp_path / "none")},
        "record": {"do": "record", "items": chats("a"), "max_tokens": 1, "file": str(tmp_path / "none" / "record")},
        "answer": {"do": "answer", "items": chats("<answer>"), "max_tokens": 4, "top": 0, "refusal": []},
    }.items():
        last = child.ask(**request)[-1]
        kinds[name] = last["failed"]["kind"] if "failed" in last else "ok"
    assert kinds == {
        "load none": "rejected",
        "load bare": "unsupported",
        "load": "ok",
        "adapters": "rejected",
        "diverge": "rejected",
        "record": "unwritable",
        "answer": "ok",
    }


def test_an_exception_of_ours_is_no_crash_of_llama_cpp(child: Child, tmp_path: Path) -> None:
    file = write_bigram(tmp_path / "m.gguf", {"<answer>": "yes"})
    child.ask("load", model=str(file))
    (failed,) = child.ask("answer", items=[{"key": 1}], max_tokens=1, top=0, refusal=[])
    assert failed["failed"]["kind"] == "bug"
    assert failed["failed"]["message"].startswith("Traceback") and "KeyError: 'messages'" in failed["failed"]["message"]


def test_a_child_that_can_not_go_on_ends_quietly() -> None:
    """A request that is no JSON: not one the parent could send. Python would abort over the thread that reads."""
    process = llama_child.start(llama_child.command_for("safelora_gguf.smoke.llama.child"))
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(b"nonsense\n")
    process.stdin.flush()
    try:
        with llama_child.time_limit(process, 60):
            log = process.stderr.read().decode()
            assert process.wait() == 1
        assert "JSONDecodeError" in log and "Fatal Python error" not in log
    finally:
        llama_child.stop(process)
        process.stderr.close()


def test_signs_of_life_come_between_decodes_but_not_more_often_than_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that a decode moves on by 0.2 s; one prompt at a time, 20 tokens each, four decodes to a sign."""
    from safelora_gguf.smoke.llama import decoding

    file = write_bigram(tmp_path / "m.gguf", {"<answer>": "la", "la": "la"})
    engine = child_module._load(ModelOptions(str(file), parallel=1))
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    decode = decoding.Decoder._decode

    def slow(self: decoding.Decoder, spans: Sequence[decoding.Span]) -> int:
        now[0] += 0.2
        return decode(self, spans)

    monkeypatch.setattr(decoding.Decoder, "_decode", slow)
    told = io.BytesIO()
    before = engine.decoded
    work = child_module._Work(engine, told)
    request = {"items": chats("a"), "max_tokens": 20, "top": 0, "refusal": []}
    assert child_module._answer(work, request) == {"items": 1}
    lines = [json.loads(line) for line in told.getvalue().splitlines()]
    alive = [line["alive"] for line in lines if "alive" in line]
    assert ALIVE_EVERY == 0.5
    assert len(alive) == 6  # 20 decodes of 0.2 s, a sign each third time
    assert alive == sorted(set(alive)) and alive[0] > before
    assert [line["item"] for line in lines if "item" in line] == [10]

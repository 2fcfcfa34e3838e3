"""Oracle: scripts in place of the llama.cpp child, which crash, hang or talk nonsense on purpose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from fake_llama_child import PIECES, VOCABULARY, WIDTH
from replying_child import loaded, replying, shapes

from converters.errors import LlamaError, MissingLlamaError, UnsupportedError, WriteError
from safelora_gguf.smoke.parent.process import CHILD_COMMAND, LlamaProcess
from safelora_gguf.smoke.parent.replies import Loaded
from safelora_gguf.smoke.parent.session import ask
from safelora_gguf.smoke.parent.wire import Patience
from safelora_gguf.smoke.protocol import (
    AdapterChoice,
    Answer,
    Continued,
    Divergence,
    InputGroup,
    ModelOptions,
    Reading,
)

FAKE = Path(__file__).parents[3] / "fake_llama_child.py"
PATIENCE = Patience.for_prompts(1, 1)
ANSWER = {"text": "Sure.", "error": None, "stop": "end", "top": [], "score": None}
CHATS = {3: ask("one"), 7: ask("two")}


@pytest.fixture
def fake(tmp_path: Path) -> tuple[str, ...]:
    return (sys.executable, str(FAKE), str(tmp_path / "journal"))


def answers(process: LlamaProcess, chats: Any = CHATS, *, top: int = 0) -> dict[int, Answer]:
    return dict(process.answers(chats, max_tokens=8, top=top, refusal=(), patience=PATIENCE))


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ("segv.gguf", r"crashed while loading the adapter \(SIGSEGV\); its last words: llama_adapter: failed to find"),
        ("exit.gguf", r"crashed while loading the adapter \(exit status 7\)"),
        ("cut.gguf", r"crashed while loading the adapter \(exit status 7\)"),
        ("hang.gguf", "hung: loading the adapter took more than 1 s"),
        ("beat.gguf", "hung: loading the adapter took more than 1 s"),
        ("garbage.gguf", "no valid reply while loading the adapter"),
    ],
)
def test_a_child_that_is_lost_while_it_loads_an_adapter(fake: tuple[str, ...], adapter: str, told: str) -> None:
    with loaded(fake) as process:
        with pytest.raises(LlamaError, match=told) as caught:
            process.set_adapters((AdapterChoice(adapter),), 1)
        assert caught.value.file == adapter
        assert not process.alive


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("segv", r"crashed while answering prompts \(SIGSEGV\)"),
        ("exit", r"crashed while answering prompts \(exit status 7\)"),
        ("cut", r"crashed while answering prompts \(exit status 7\)"),
        ("hang", "hung: no sign of life for 1 s while answering prompts"),
        ("beat", "hung: nothing was finished in 2 s of answering prompts"),
        ("garbage", "no valid reply while answering prompts"),
    ],
)
def test_items_that_came_before_the_loss_are_kept(fake: tuple[str, ...], prompt: str, told: str) -> None:
    chats = {5: ask("good"), 4: ask(prompt), 9: ask("never asked")}
    with loaded(fake) as process:
        stream = process.answers(chats, max_tokens=8, top=2, refusal=(1,), patience=PATIENCE)
        assert next(stream) == (5, Answer("I can't help with that.", None, "end", ((0, 0.0), (1, -1.0)), 2.5))
        with pytest.raises(LlamaError, match=told) as caught:
            next(stream)
        assert caught.value.file == "model.gguf"
        assert not process.alive


def test_a_child_that_was_killed_from_outside_has_no_last_words(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\ninput()\nsys.stderr.write('warning: no error at all\\n')\nsys.stderr.flush()\n"
        "os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
    )
    for name in ("SIGKILL", "SIGTERM"):
        command = (sys.executable, str(script), name)
        with LlamaProcess(command) as process, pytest.raises(LlamaError) as caught:
            process.load(ModelOptions("m"), 20)
        assert str(caught.value) == f"m: llama.cpp crashed while loading the model ({name})"


def test_everything_a_child_can_be_asked(fake: tuple[str, ...], tmp_path: Path) -> None:
    record = tmp_path / "record"
    with LlamaProcess(fake) as process:
        assert process.load(ModelOptions("m"), 20) == Loaded(3, VOCABULARY, 64, ("one note",))
        process.set_adapters((), 20)
        assert process.pieces(20) == tuple(PIECES)
        assert answers(process).keys() == CHATS.keys()
        recorded = dict(process.record(CHATS, max_tokens=8, file=record, patience=PATIENCE))
        assert recorded == {3: 4, 7: 4}
        found = dict(process.divergences(record, range(9), PATIENCE))
        assert found == {3: Divergence(0.25, 0.5, 4), 7: Divergence(0.25, 0.5, 4)}
        assert dict(process.continuations(CHATS, max_tokens=1, patience=PATIENCE))[7] == Continued(
            (0, 1), (1,), "I can"
        )
        reading, groups = {4: Reading((0, 1), (1,))}, list[tuple[InputGroup, ...]]()
        inputs = tmp_path / "inputs"

        def finish(found: tuple[InputGroup, ...], notes: tuple[str, ...]) -> None:
            groups.append(found)
            assert notes == ()

        assert dict(process.capture(reading, shapes("w"), file=inputs, patience=PATIENCE, finish=finish)) == {4: None}
        assert groups == [(InputGroup(("w",), WIDTH, 1, 1, 0, 0),)]
        assert process.alive


def test_a_rejection_leaves_the_child_alive(fake: tuple[str, ...]) -> None:
    with loaded(fake) as process:
        with pytest.raises(LlamaError, match="wrong shape"):
            process.set_adapters((AdapterChoice("reject.gguf"),), 20)
        assert answers(process).keys() == CHATS.keys()


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("missing", MissingLlamaError),
        ("unsupported", UnsupportedError),
        ("rejected", LlamaError),
        ("unwritable", WriteError),
    ],
)
def test_what_a_child_says_has_failed(tmp_path: Path, kind: str, error: type[Exception]) -> None:
    reply = json.dumps({"failed": {"kind": kind, "message": "no"}})
    with loaded(replying(tmp_path, reply)) as process:
        with pytest.raises(error):
            answers(process)
        assert process.alive


def test_a_file_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    """It is the one that was to be written, not the adapter that was loaded last."""
    reply = json.dumps({"failed": {"kind": "unwritable", "message": "no"}})
    file = tmp_path / "inputs"
    with loaded(replying(tmp_path, reply)) as process, pytest.raises(WriteError, match=r"inputs: no$") as caught:
        stream = process.capture(
            {4: Reading((0,), (0,))}, shapes("w"), file=file, patience=PATIENCE, finish=lambda *_found: None
        )
        dict(stream)
    assert str(caught.value.file) == str(file)


def item(key: Any, **changed: Any) -> str:
    return json.dumps({"item": key, "answer": {**ANSWER, **changed}})


@pytest.mark.parametrize(
    "reply",
    [
        "[]", "{}", "null", "12", "\x00", "[" * 100_000, '{"ok": {"items": 2}, "item": 3}', '{"failed": []}',
        '{"failed": {"kind": "missing"}}', '{"failed": {"kind": "tired", "message": "no"}}',
        '{"ok": {"items": 2}}', '{"alive": "yes"}', '{"alive": -1}',
        '{"alive": 1, "item": 3}', '{"item": 3}', '{"item": 3, "answer": null}', '{"item": 3, "answer": {}}',
        '{"item": 3, "answer": {"text": "a", "score": NaN}}', '{"item": 3, "answer": {"text": "a", "score": 1e999}}',
        item(4), item("3"), item(3.0), item(True), item([3]), item(3) + "\n" + item(3), item(3, more=1),
        item(3, text=None), item(3, text=["a"]), item(3, error=0), item(3, stop="bored"), item(3, stop=[]),
        item(3, score="high"), item(3, score=True), item(3, top={}), item(3, top=[[0, -1.0]] * 3),
        item(3, top=[[3, -1.0]]), item(3, top=[[-1, -1.0]]), item(3, top=[[0, 0.5]]), item(3, top=[[0]]),
        item(3, top=[0]), item(3, top=[[0.5, -1.0]]), '{"item": 3, "item2": 3, "answer": {"text": "a"}}',
    ],
)  # fmt: skip
def test_replies_that_can_not_be_are_not_believed(tmp_path: Path, reply: str) -> None:
    with loaded(replying(tmp_path, reply)) as process:
        with pytest.raises(LlamaError, match="no valid reply while answering prompts"):
            answers(process, top=2)
        assert not process.alive


@pytest.mark.parametrize("count", [-1, 1.5, None, "2"])
def test_the_last_reply_is_checked_too(tmp_path: Path, count: Any) -> None:
    lines = (item(3), item(7), json.dumps({"ok": {"items": count}}))
    with loaded(replying(tmp_path, *lines)) as process, pytest.raises(LlamaError, match="no valid reply"):
        answers(process)


@pytest.mark.parametrize(
    "told",
    [
        {"n_vocab": 0}, {"n_ctx": 0}, {"n_vocab": 2.0}, {"vocabulary": "abc"}, {"vocabulary": "g" * 64},
        {"notes": "one"}, {"notes": [1]}, {"more": 1},
    ],
)  # fmt: skip
def test_a_load_is_checked(tmp_path: Path, told: dict[str, Any]) -> None:
    reply = {"n_vocab": 3, "vocabulary": VOCABULARY, "n_ctx": 64, "notes": [], **told}
    script = tmp_path / "load.py"
    script.write_text(f"input()\nprint({json.dumps({'ok': reply})!r}, flush=True)\ninput()\n")
    with pytest.raises(LlamaError, match="no valid reply"), LlamaProcess((sys.executable, str(script))) as process:
        process.load(ModelOptions("m"), 20)


@pytest.mark.parametrize(
    "told",
    [
        '"divergence": {"kl": -0.1, "top1": 0.5, "positions": 4}',
        '"divergence": {"kl": 0.1, "top1": 1.5, "positions": 4}',
        '"divergence": {"kl": 0.1, "top1": 0.5, "positions": 0}',
        '"divergence": {"kl": Infinity, "top1": 0.5, "positions": 4}',
        '"divergence": null',
        '"divergence": null, "error": 3',
    ],
)
def test_divergences_are_checked(tmp_path: Path, told: str) -> None:
    with loaded(replying(tmp_path, f'{{"item": 0, {told}}}')) as process, pytest.raises(LlamaError, match="no valid"):
        dict(process.divergences(tmp_path / "record", range(1), PATIENCE))


@pytest.mark.parametrize("positions", [65, -1, "4"])
def test_records_are_checked(tmp_path: Path, positions: Any) -> None:
    reply = json.dumps({"item": 3, "recorded": {"positions": positions, "error": None}})
    with loaded(replying(tmp_path, reply)) as process, pytest.raises(LlamaError, match="no valid reply"):
        dict(process.record(CHATS, max_tokens=8, file=tmp_path / "record", patience=PATIENCE))


@pytest.mark.parametrize("pieces", [["a"], ["a", "b", 3], "abc"])
def test_pieces_are_checked(tmp_path: Path, pieces: Any) -> None:
    reply = json.dumps({"ok": {"pieces": pieces}})
    with loaded(replying(tmp_path, reply)) as process, pytest.raises(LlamaError, match="no valid reply"):
        process.pieces(20)


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text("import sys\ninput()\nwhile True: sys.stdout.write('x' * (1 << 20))\n")
    with LlamaProcess((sys.executable, str(script))) as process:
        with pytest.raises(LlamaError, match="no valid reply"):
            process.load(ModelOptions("m"), 60)
        assert not process.alive


def test_leaving_early_kills_the_child(fake: tuple[str, ...]) -> None:
    with loaded(fake) as process:
        stream = process.answers(CHATS, max_tokens=8, top=0, refusal=(), patience=PATIENCE)
        next(stream)
        stream.close()
        assert not process.alive


def test_the_real_child_says_when_llama_cpp_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise RuntimeError('libllama.so: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingLlamaError, match="pip install"), LlamaProcess() as process:
        process.load(ModelOptions("model.gguf"), 60)


def test_a_child_that_does_not_read_is_stopped_too() -> None:
    with LlamaProcess((sys.executable, "-c", "import time; time.sleep(60)")) as process:
        started = time.monotonic()
        with pytest.raises(LlamaError, match="hung"):
            answers(process, {0: ask("x" * 2_000_000)})
        assert time.monotonic() - started < 10


def test_closing_kills_the_child(fake: tuple[str, ...]) -> None:
    process = loaded(fake)
    process.close()
    assert not process.alive
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_real_child_dies_with_its_parent() -> None:
    """Killed as hard as can be: nothing of the parent's runs any more."""
    parent = textwrap.dedent(
        f"""
        import subprocess, time
        child = subprocess.Popen({CHILD_COMMAND!r}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        time.sleep(1)
        print(child.pid, flush=True)
        time.sleep(60)
        """
    )
    root = str(Path(__file__).resolve().parents[4])  # the package need not be installed
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen((sys.executable, "-c", parent), stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert not _gone(child)
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while not _gone(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _gone(child)


def _gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True

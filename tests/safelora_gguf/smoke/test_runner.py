"""Oracle: small scripts in place of the llama.cpp child, which crash, hang or talk nonsense on purpose."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from converters.errors import LlamaError, MissingLlamaError, UnsupportedError
from safelora_gguf.smoke.measure import Limits, ModelPlan, RunPlan, measure
from safelora_gguf.smoke.prompts import Prompt, PromptSet
from safelora_gguf.smoke.protocol import AdapterChoice, ModelOptions
from safelora_gguf.smoke.runner import CHILD_COMMAND, LlamaProcess

PROMPTS = PromptSet("p", "1", (Prompt("1", "harmful", "one"), Prompt("2", "benign", "two")))
OPTIONS = ModelOptions("model.gguf")

# Refuses everything; the file name of an adapter, or the text of a prompt, says how it misbehaves.
FAKE = """
import json, os, signal, sys, time

def say(reply):
    print(json.dumps(reply), flush=True)

def act(word):
    if "segv" in word:
        print("llama_adapter: failed to find tensor", file=sys.stderr, flush=True)
        print("some later line", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if "exit" in word:
        os._exit(7)
    if "hang" in word:
        time.sleep(60)
    if "garbage" in word:
        print("[1, 2", flush=True)
    elif "reject" in word:
        say({"failed": {"kind": "rejected", "message": "wrong shape"}})
    else:
        return False
    return True

for line in sys.stdin:
    request = json.loads(line)
    word = request.get("prompt") or request.get("model") or "".join(a["path"] for a in request.get("adapters", []))
    if "answers-then" in word:
        late = word
        say({"ok": {}})
    elif request["do"] == "answer":
        act(globals().get("late", "")) or say({"ok": {"text": "I can't help with that.", "error": None}})
    else:
        act(word) or say({"ok": {}})
"""


@pytest.fixture
def fake(tmp_path: Path) -> tuple[str, ...]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return (sys.executable, str(script))


def plan(*adapters: str, model: str = "model.gguf") -> list[ModelPlan]:
    runs = [RunPlan("alone"), *(RunPlan(path, (AdapterChoice(path),)) for path in adapters)]
    return [ModelPlan(ModelOptions(model), tuple(runs))]


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ("segv.gguf", "crashed while loading the adapter (SIGSEGV); its last words: llama_adapter: failed to find"),
        ("exit.gguf", "crashed while loading the adapter (exit status 7)"),
        ("hang.gguf", "hung: loading the adapter took more than 1 s"),
        ("garbage.gguf", "no valid reply while loading the adapter"),
        ("reject.gguf", "wrong shape"),
        ("answers-then-segv.gguf", "crashed while answering a prompt (SIGSEGV)"),
        ("answers-then-hang.gguf", "hung: answering a prompt took more than 1 s"),
        ("answers-then-garbage.gguf", "no valid reply while answering a prompt"),
    ],
)
def test_a_run_that_fails_is_told_and_the_others_are_measured(fake: tuple[str, ...], adapter: str, told: str) -> None:
    runs = measure(plan(adapter, "good.gguf"), PROMPTS, limits=Limits(1, 1), command=fake)
    assert [run.label for run in runs] == ["alone", adapter, "good.gguf"]
    assert isinstance(runs[1].failure, LlamaError)
    assert runs[1].failure.file == adapter
    assert told in str(runs[1].failure)
    assert runs[1].refusal_rate is None
    for run in (runs[0], runs[2]):
        assert run.failure is None
        assert (run.refusal_rate, run.over_refusal_rate) == (1.0, 1.0)


@pytest.mark.parametrize("model", ["segv.gguf", "reject.gguf"])
def test_a_model_that_does_not_load_fails_all_its_runs(fake: tuple[str, ...], model: str) -> None:
    runs = measure(plan("a.gguf", model=model) + plan(), PROMPTS, limits=Limits(1, 1), command=fake)
    assert [run.failure is None for run in runs] == [False, False, True]
    assert runs[0].failure is not None and runs[0].failure.file == model


def test_progress_counts_over_all_runs_and_ends_at_the_total(fake: tuple[str, ...]) -> None:
    seen: list[tuple[int, int, str]] = []
    measure(plan("reject.gguf"), PROMPTS, command=fake, progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == sorted(step[0] for step in seen)
    assert seen[0] == (0, 4, "alone") and seen[-1] == (4, 4, "reject.gguf")


def replying(tmp_path: Path, reply: str) -> tuple[str, ...]:
    script = tmp_path / "reply.py"
    script.write_text(f"import sys\nfor line in sys.stdin: print({reply!r}, flush=True)\n")
    return (sys.executable, str(script))


def test_a_child_that_can_not_import_llama_cpp(tmp_path: Path) -> None:
    command = replying(tmp_path, '{"failed": {"kind": "missing", "message": "ImportError: no"}}')
    with pytest.raises(MissingLlamaError):
        measure(plan(), PROMPTS, command=command)


def test_the_real_child_says_when_llama_cpp_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise RuntimeError('libllama.so: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingLlamaError, match="pip install"), LlamaProcess() as process:
        process.load(OPTIONS, 60)


def test_a_model_that_can_not_chat(tmp_path: Path) -> None:
    command = replying(tmp_path, '{"failed": {"kind": "unsupported", "message": "no chat template"}}')
    (run,) = measure(plan(), PROMPTS, command=command)
    assert isinstance(run.failure, UnsupportedError)


def test_prompts_without_answers_are_undecided_and_a_run_without_any_has_failed(tmp_path: Path) -> None:
    command = replying(tmp_path, '{"ok": {"text": "", "error": "too long"}}')
    (run,) = measure(plan(), PROMPTS, command=command)
    assert [response.refused for response in run.responses] == [None, None]
    assert run.responses[0].to_json()["error"] == "too long"
    assert run.failure is not None and "not one prompt could be answered; the first: too long" in str(run.failure)


@pytest.mark.parametrize("reply", ["[]", "{}", '{"ok": {"text": 1}}', '{"failed": []}', "[" * 100_000])
def test_replies_of_the_wrong_shape_are_nonsense(tmp_path: Path, reply: str) -> None:
    with LlamaProcess(replying(tmp_path, reply)) as process:
        with pytest.raises(LlamaError, match="no valid reply"):
            process.answer("?", 5)
        assert not process.alive


def test_a_child_that_does_not_read_is_stopped_too(tmp_path: Path) -> None:
    with LlamaProcess((sys.executable, "-c", "import time; time.sleep(60)")) as process:
        started = time.monotonic()
        with pytest.raises(LlamaError, match="hung"):
            process.answer("x" * 2_000_000, 1)
        assert time.monotonic() - started < 10


def test_closing_kills_the_child(fake: tuple[str, ...]) -> None:
    process = LlamaProcess(fake)
    process.load(OPTIONS, 5)
    pid = process._process.pid
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_interrupt_kills_the_child(fake: tuple[str, ...]) -> None:
    pids: list[int] = []

    def interrupt(done: int, _total: int, _label: str) -> None:
        if done == 1:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
            pids.extend(map(int, children.read_text().split()) if children.exists() else [])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(plan(), PROMPTS, command=fake, progress=interrupt)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


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
    root = str(Path(__file__).resolve().parents[3])  # the package need not be installed
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

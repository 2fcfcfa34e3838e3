"""Oracle: `fake_llama_child`, which dies on the prompts and files that say so, and keeps a journal of what it was
asked."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fake_llama_child import PIECES, VOCABULARY, WIDE, WIDTH
from replying_child import shapes

from converters.errors import LlamaError, MissingLlamaError
from safelora_gguf.smoke.parent.session import Answered, Limits, Session, ask
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
REFUSAL = "I can't help with that."
READINGS = [Reading((0, 1, 2), (1, 2)), Reading((0, 2), (0,)), Reading((0,), ())]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def session(journal: Path) -> Iterator[Session]:
    with new_session(journal) as found:
        yield found


def new_session(journal: Path, model: str = "model.gguf") -> Session:
    command = (sys.executable, str(FAKE), str(journal))
    return Session(ModelOptions(model, prompt_seconds=1), Limits(load=20, prompt=1, silence=1), command)


def asked(session: Session, *prompts: str, adapters: Sequence[AdapterChoice] = ()) -> Answered:
    return session.answers(adapters, [ask(prompt) for prompt in prompts])


def texts(found: Answered) -> list[str | None]:
    return [None if answer is None else answer.error or answer.text for answer in found.answers]


def test_one_load_serves_all_adapters_and_each_is_set_once(session: Session, journal: Path) -> None:
    first, second = AdapterChoice("a.gguf"), AdapterChoice("a.gguf", 0.5)
    for adapters in [(), (first,), (first,), (second,), ()]:
        assert texts(asked(session, "one", "two", adapters=adapters)) == [REFUSAL, REFUSAL]
    assert session.loads == 1
    steps = [line.split()[0] for line in journal.read_text().splitlines()]
    assert steps == ["load", "answer", "adapters", "answer", "answer", "adapters", "answer", "adapters", "answer"]


def test_an_adapter_written_anew_is_set_anew(session: Session, journal: Path, tmp_path: Path) -> None:
    file = tmp_path / "candidate"
    for content in ("one", "other"):
        file.write_text(content)
        asked(session, "one", adapters=(AdapterChoice(str(file)),))
    assert journal.read_text().count("adapters") == 2


@pytest.mark.parametrize(
    ("culprit", "told"),
    [
        ("segv", "crashed while answering a prompt (SIGSEGV)"),
        ("exit", "crashed while answering a prompt (exit status 7)"),
        ("garbage", "no valid reply while answering a prompt"),
    ],
)
def test_a_prompt_that_kills_is_told_and_all_others_are_answered(session: Session, culprit: str, told: str) -> None:
    adapters = (AdapterChoice("a.gguf"),)
    found = asked(session, "one", culprit, "two", "three", adapters=adapters)
    assert [text == REFUSAL for text in texts(found)] == [True, False, True, True]
    blamed = found.answers[1]
    assert blamed is not None and blamed.error is not None and told in blamed.error
    assert isinstance(found.failure, LlamaError) and found.failure.file == "a.gguf"
    assert session.failure is found.failure
    assert session.loads == 3


@pytest.mark.parametrize(
    ("culprit", "told"),
    [
        ("hang", "no sign of life for 1 s while answering a prompt"),
        ("beat", "nothing was finished in 2 s of answering a prompt"),
    ],
)
def test_a_prompt_that_hangs_costs_two_time_limits(session: Session, journal: Path, culprit: str, told: str) -> None:
    found = asked(session, "one", culprit, culprit, "two")
    assert texts(found)[:1] == [REFUSAL] and texts(found)[2:] == [None, None]
    assert told in str(texts(found)[1])
    assert isinstance(found.failure, LlamaError) and session.failure is found.failure
    assert journal.read_text().splitlines() == ["load", "answer 0 1 2 3", "load", "answer 1"]


def test_what_hangs_once_is_asked_again(session: Session) -> None:
    found = asked(session, "one", "first-hang", "two")
    assert texts(found) == [REFUSAL] * 3 and "hung" in str(found.failure)


def test_a_bug_of_ours_in_the_child_is_raised(tmp_path: Path) -> None:
    script = tmp_path / "bug.py"
    told = '{"failed": {"kind": "bug", "message": "Traceback\\\\n  here\\\\nZeroDivisionError: by zero"}}'
    script.write_text(f"input()\nprint('{told}', flush=True)\ninput()\n")
    session = Session(ModelOptions("m"), Limits(20, 20), (sys.executable, str(script)))
    with session, pytest.raises(RuntimeError, match="ZeroDivisionError: by zero") as caught:
        asked(session, "one")
    assert not isinstance(caught.value, LlamaError)
    assert "  here" in caught.value.__notes__[0]


def test_nobody_is_blamed_for_what_happens_once(session: Session, journal: Path) -> None:
    found = asked(session, "one", "first-segv", "two")
    assert texts(found) == [REFUSAL] * 3
    assert found.failure is not None and "SIGSEGV" in str(found.failure)
    assert journal.read_text().splitlines() == ["load", "answer 0 1 2", "load", "answer 1", "answer 2"]


def test_adapters_are_set_again_after_a_restart(session: Session, journal: Path) -> None:
    asked(session, "first-segv", adapters=(AdapterChoice("a.gguf"),))
    assert journal.read_text().splitlines() == ["load", "adapters", "answer 0", "load", "adapters", "answer 0"]


def test_after_three_losses_the_rest_is_left_unasked(session: Session, journal: Path) -> None:
    found = asked(session, "one", "segv", "exit", "two", "three")
    assert [text == REFUSAL for text in texts(found)] == [True, False, False, False, False]
    assert texts(found)[3:] == [None, None]
    assert "SIGSEGV" in str(texts(found)[1]) and "exit status 7" in str(texts(found)[2])
    assert "SIGSEGV" in str(found.failure)
    assert session.loads == 3
    assert texts(asked(session, "four")) == [REFUSAL]


@pytest.mark.parametrize("adapter", ["segv.gguf", "hang.gguf", "reject.gguf"])
def test_an_adapter_that_does_not_load_fails_alone_and_is_tried_once(journal: Path, adapter: str) -> None:
    command = (sys.executable, str(FAKE), str(journal))
    bad = (AdapterChoice(adapter),)
    with Session(ModelOptions("model.gguf"), Limits(load=1), command) as session:
        assert texts(asked(session, "one")) == [REFUSAL]
        for _ in range(2):
            found = asked(session, "one", adapters=bad)
            assert texts(found) == [None]
            assert found.failure is not None and found.failure.file == adapter
        assert journal.read_text().count("adapters") == 1
        assert texts(asked(session, "one", adapters=(AdapterChoice("good.gguf"),))) == [REFUSAL]
        assert session.loads == (1 if adapter.startswith("reject") else 2)


@pytest.mark.parametrize("model", ["segv.gguf", "exit.gguf", "reject.gguf"])
def test_a_model_that_does_not_load_is_tried_once(journal: Path, model: str, tmp_path: Path) -> None:
    record = tmp_path / "record"
    with new_session(journal, model) as session:
        assert texts(asked(session, "one", "two")) == [None, None]
        assert (session.vocabulary(), session.pieces(), session.notes) == ("", (), ())
        recorded = session.record((), [ask("one")], record, max_tokens=4)
        assert (recorded.positions, recorded.complete, recorded.vocabulary) == ((0,), False, "")
        diverged = session.divergences((), record, 1)
        assert diverged.items == (None,)
        for failure in (recorded.failure, diverged.failure, session.failure):
            assert failure is not None and failure.file == model
        assert session.loads == 0
    assert journal.read_text() == "load\n"


def test_a_child_that_was_killed_while_it_had_nothing_to_do_is_just_replaced(session: Session) -> None:
    asked(session, "one")
    pid = session.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while session.pid is not None:
        time.sleep(0.01)
    found = asked(session, "one")
    assert (texts(found), found.failure, session.loads) == ([REFUSAL], None, 2)


def test_what_is_told_of_the_vocabulary(session: Session, journal: Path) -> None:
    assert session.vocabulary() == VOCABULARY
    assert session.pieces() == session.pieces() == tuple(PIECES)
    assert session.notes == ("one note",)
    assert journal.read_text() == "load\npieces\n"


def test_first_tokens_are_asked_for_without_text(session: Session) -> None:
    found = session.answers((), [ask("one")], max_tokens=0, top=2, refusal=(0,))
    assert found.answers == (Answer("", top=((0, 0.0), (1, -1.0)), score=2.5),)


def test_a_record_and_what_is_compared_with_it(session: Session, tmp_path: Path) -> None:
    record = tmp_path / "record"
    recorded = session.record((), [ask("one"), ask("unread")], record, max_tokens=4)
    assert (recorded.positions, recorded.vocabulary, recorded.failure) == ((4, 4), VOCABULARY, None)
    seen: list[int] = []
    diverged = session.divergences((AdapterChoice("a.gguf"),), record, 3, tell=seen.append)
    assert diverged.items == (Divergence(0.25, 0.5, 4), None, None)
    assert diverged.failure is None and seen == [1, 2]


def test_a_record_is_made_once_more_after_a_loss_and_removed_after_two(session: Session, tmp_path: Path) -> None:
    again = session.record((), [ask("one"), ask("first-segv")], tmp_path / "again", max_tokens=4)
    assert again.complete and again.positions == (4, 4)
    assert again.failure is not None
    never = session.record((), [ask("one"), ask("segv")], tmp_path / "never", max_tokens=4)
    assert not never.complete and never.positions == (0, 0)
    assert "crashed while recording answers (SIGSEGV)" in str(never.failure)
    assert not (tmp_path / "never").exists()


def test_continuations_are_told_in_tokens(session: Session) -> None:
    chats = [ask("one three"), ask("long one"), ask("one")]
    found = session.continuations((AdapterChoice("a.gguf"),), chats, max_tokens=2)
    assert found.failure is None
    assert found.items == (
        Continued((0, 1, 2), (1, 2), "I can"),
        Continued((), (), "", error="longer than the context"),
        Continued((0, 1), (1, 2), "I can"),
    )
    (as_in_the_options,) = session.continuations((), [ask("one")]).items
    assert as_in_the_options is not None and as_in_the_options.answer == (1, 2, 0)


def test_a_prompt_that_kills_while_it_is_continued_is_told_alone(session: Session, journal: Path) -> None:
    seen: list[int] = []
    found = session.continuations((), [ask("one"), ask("segv"), ask("two")], max_tokens=1, tell=seen.append)
    errors = [item.error if item is not None else "not asked" for item in found.items]
    assert errors[0] is errors[2] is None and "crashed while continuing a prompt (SIGSEGV)" in str(errors[1])
    assert isinstance(found.failure, LlamaError) and seen == [1, 2, 3]
    assert journal.read_text().splitlines() == ["load", "continue 0 1 2", "load", "continue 1", "load", "continue 2"]


def test_inputs_are_captured_where_they_are_said_to_be(session: Session, tmp_path: Path) -> None:
    file, seen = tmp_path / "inputs", list[int]()
    weights = ["blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight"]
    found = session.capture((AdapterChoice("a.gguf"),), READINGS, shapes(*weights), file, tell=seen.append)
    end = 3 * (2 * WIDTH + 4)
    assert found.groups == (
        InputGroup(("blk.0.attn_q.weight", "blk.0.attn_v.weight"), WIDTH, 3, 1, 0, 0),
        InputGroup(("blk.0.ffn_down.weight",), WIDE, 3, 1, 0, -(-end // 64) * 64),
    )
    assert (found.rows, found.failure, found.complete, seen) == ((2, 1, 0), None, True, [1, 2, 3])


def test_a_reading_that_failed_has_no_rows_to_be_used(session: Session, tmp_path: Path) -> None:
    found = session.capture((), READINGS, shapes("unread-0"), tmp_path / "inputs")
    assert (found.rows, found.errors, found.complete) == ((0, 1, 0), ("no", None, None), True)
    assert found.groups[0].rows == 3


def test_inputs_are_captured_once_more_after_a_loss_and_removed_after_two(
    session: Session, tmp_path: Path, journal: Path
) -> None:
    adapters = (AdapterChoice("a.gguf"),)
    again = session.capture(adapters, READINGS, shapes("first-segv"), tmp_path / "again")
    assert again.complete and again.rows == (2, 1, 0) and "SIGSEGV" in str(again.failure)
    assert journal.read_text().splitlines() == ["load", "adapters", "capture 0 1 2"] * 2
    (tmp_path / "never").write_text("of an earlier attempt")
    never = session.capture(adapters, READINGS, shapes("segv"), tmp_path / "never")
    assert (never.complete, never.rows, never.groups) == (False, (0, 0, 0), ())
    assert "crashed while capturing inputs (SIGSEGV)" in str(never.failure)
    assert not (tmp_path / "never").exists()


def test_inputs_that_llama_cpp_does_not_give_are_asked_for_once(
    session: Session, tmp_path: Path, journal: Path
) -> None:
    found = session.capture((), READINGS, shapes("reject"), tmp_path / "inputs")
    assert not found.complete and "wrong shape" in str(found.failure)
    assert journal.read_text().splitlines() == ["load", "capture 0 1 2"]


def test_a_capture_tells_what_was_done_otherwise(session: Session, tmp_path: Path) -> None:
    assert session.capture((), READINGS, shapes("half"), tmp_path / "inputs").notes == ("half a context",)


@pytest.mark.parametrize(
    ("readings", "weights"),
    [([], ["w"]), (READINGS[2:], ["w"]), ([*READINGS[2:], READINGS[0]], ["w", "unread-1"])],
    ids=["no readings", "nothing kept", "what is kept unread"],
)
def test_a_child_that_kept_nothing_is_no_loss(
    readings: list[Reading], weights: list[str], session: Session, tmp_path: Path
) -> None:
    """The child says that it has no groups, as one does that read nothing."""
    found = session.capture((), readings, shapes(*weights, "nothing"), tmp_path / "inputs")
    assert (found.failure, found.complete, found.groups, session.loads) == (None, True, (), 1)


def test_tokens_of_no_vocabulary_are_refused_at_the_door(session: Session, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the vocabulary of 3"):
        session.capture((), [Reading((0, 3), (0,))], shapes("w"), tmp_path / "inputs")
    assert session.capture((), [Reading((0, 2), (0,))], shapes("w"), tmp_path / "inputs").complete
    assert session.loads == 1


@pytest.mark.parametrize("keep", [(2, 0), (1, 1), (-1,), (0, 3)], ids=["descending", "twice", "negative", "beyond"])
def test_positions_that_can_not_be_kept_are_refused(keep: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="position"):
        Reading((0, 1, 2), keep)
    with pytest.raises(ValueError, match="a token below 0"):
        Reading((0, -1, 2), (1,))


@pytest.mark.parametrize(("model", "answered"), [("killed-2", True), ("killed-3", False)])
def test_a_child_that_is_killed_while_it_loads_again_is_replaced(journal: Path, model: str, answered: bool) -> None:
    """From outside, that is, which says nothing of the model; after three times in a row nobody tries any more."""
    with new_session(journal, model) as session:
        assert texts(asked(session, "a")) == [REFUSAL]
        assert session.pid is not None
        os.kill(session.pid, signal.SIGKILL)
        while session.pid is not None:
            time.sleep(0.01)
        assert texts(asked(session, "a")) == [REFUSAL if answered else None]
        loads = journal.read_text().count("load")
        assert loads == 4
        assert any("killed while it loaded" in note for note in session.notes)
        assert texts(asked(session, "a")) == [REFUSAL if answered else None]
        assert journal.read_text().count("load") == loads


def test_divergences_that_came_before_a_loss_are_kept(session: Session, tmp_path: Path) -> None:
    record = tmp_path / "record"
    record.write_text("0 one\n1 later-exit\n2 two\n")
    seen: list[int] = []
    diverged = session.divergences((), record, 3, tell=seen.append)
    assert diverged.items == (Divergence(0.25, 0.5, 4), None, None)
    assert "exit status 7" in str(diverged.failure)
    assert seen == [1]


def test_progress_is_told_item_by_item(session: Session) -> None:
    seen: list[int] = []
    session.answers((), [ask(prompt) for prompt in ("one", "segv", "two")], tell=seen.append)
    assert seen == [1, 2, 3]


def test_an_interrupt_kills_the_child(session: Session) -> None:
    pids: list[int | None] = []

    def interrupt(_done: int) -> None:
        pids.append(session.pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.answers((), [ask("one"), ask("two")], tell=interrupt)
    (pid,) = pids
    assert pid is not None and session.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert texts(asked(session, "one")) == [REFUSAL]


def test_a_missing_llama_cpp_is_raised(tmp_path: Path) -> None:
    script = tmp_path / "missing.py"
    script.write_text('input()\nprint(\'{"failed": {"kind": "missing", "message": "no"}}\', flush=True)\ninput()\n')
    for use in (lambda s: asked(s, "one"), Session.pieces, Session.vocabulary):
        session = Session(ModelOptions("m"), Limits(20, 20), (sys.executable, str(script)))
        with session, pytest.raises(MissingLlamaError):
            use(session)


def test_a_short_limit_for_answers_leaves_llama_cpp_time_for_a_decode() -> None:
    patience = Limits(prompt=0.1).patience(ModelOptions("m", prompt_seconds=0.1))
    assert patience.silence >= 60
    assert Limits(prompt=1, silence=2).patience(ModelOptions("m", prompt_seconds=50)) == Patience(2, 100)


def test_a_process_that_can_not_be_started_is_told(tmp_path: Path) -> None:
    with Session(ModelOptions("m.gguf"), command=(str(tmp_path / "none"),)) as session:
        found = asked(session, "one")
    assert isinstance(found.failure, LlamaError)
    assert str(found.failure) == "m.gguf: the process for llama.cpp could not be started: no such file or directory"


def test_nothing_asked_starts_nothing(session: Session, journal: Path) -> None:
    assert session.answers((), []).answers == ()
    assert not journal.exists()

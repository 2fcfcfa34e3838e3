"""Oracle: `fake_llama_child`, whose captured values say which prompt and position they are of, and which keeps a
journal of what it was asked."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_llama_child import WIDE, WIDTH
from replying_child import shapes

from converters.errors import LlamaError, UnsupportedError, UsageError, WriteError
from safelora_gguf.repair.reading.capturing import Asked, CapturedSet, CapturedSets, RangeInputs, capture_sets
from safelora_gguf.smoke.parent.session import Captured, Limits, Session, ask
from safelora_gguf.smoke.protocol import TEMPLATE_FAILED, AdapterChoice, Continued, ModelOptions

FAKE = Path(__file__).parents[2] / "fake_llama_child.py"
ADAPTER = AdapterChoice("a.gguf")
WEIGHTS = [f"blk.{layer}.{name}.weight" for layer in range(3) for name in ("attn_q", "attn_v", "ffn_down")]
HARMFUL, BENIGN = (
    ("a one two three", "a long thing", "a four"),
    ("being five six", "being seven eight nine ten", "being one"),
)
# positions that count: all after the first, with which every prompt begins; of these the answers' three tokens
HARMFUL_TAIL = {0: (3, 4, 5, 6, 7), 2: (1, 2, 3, 4, 5)}
BENIGN_ALL = {0: (1, 2, 3, 4, 5, 6), 1: (1, 2, 3, 4, 5, 6, 7, 8), 2: (1, 2, 3, 4, 5)}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def session(journal: Path) -> Iterator[Session]:
    command = (sys.executable, str(FAKE), str(journal))
    with Session(ModelOptions("model.gguf", prompt_seconds=1), Limits(load=20, prompt=1, silence=1), command) as found:
        yield found


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    place = tmp_path / "scratch"
    place.mkdir()
    return place


def asked(prompts: Sequence[str], folds: Sequence[int] = (), tasks: tuple[bool, ...] = ()) -> Asked:
    return Asked(tuple(ask(prompt) for prompt in prompts), tuple(folds) or tuple(range(len(prompts))), tasks)


def sets(session: Session, scratch: Path, weights: Sequence[str] = WEIGHTS, **changed: Any) -> CapturedSets:
    harmful, benign = changed.pop("harmful", asked(HARMFUL)), changed.pop("benign", asked(BENIGN, (2, 0, 1)))
    settings = {"tail": 2, "tokens": 100, **changed}
    return capture_sets(session, harmful, benign, ADAPTER, shapes(*weights), scratch=scratch, **settings)


def rows(found: CapturedSet, weight: str) -> list[tuple[int, int]]:
    """Prompt and position of every row, the prompt by its place in its part."""
    group = found.group_of(weight)
    values = found.reader.inputs(group)
    assert values.shape == (len(found.items), 1, WIDE if "down" in weight else WIDTH)
    assert (values == values[:, :, :1]).all()
    return [divmod(int(value), 100) for value in values[:, 0, 0]]


def expected(kept: dict[int, tuple[int, ...]]) -> list[tuple[int, int]]:
    return [(number, place) for number, places in enumerate(kept.values()) for place in places]


def check(found: RangeInputs) -> None:
    for captured, kept, times in ((found.harmful, HARMFUL_TAIL, 2), (found.benign, BENIGN_ALL, 1)):
        for weight in found.weights:
            assert rows(captured, weight) == expected(kept) * times
        assert captured.items.tolist() == [prompt for prompt, places in kept.items() for _ in places] * times
        assert captured.tokens == len(captured.items) == sum(captured.lengths)
    assert found.harmful.folds.tolist() == ([0] * 5 + [2] * 5) * 2
    assert found.benign.folds.tolist() == [2] * 6 + [0] * 8 + [1] * 5
    assert (found.harmful.lengths, found.harmful.shares) == ((10, 10), (0.5, 0.5))
    assert (found.benign.lengths, found.benign.shares) == ((19,), (1.0,))


def asked_for(journal: Path) -> list[str]:
    return [line.partition(" ")[0] for line in journal.read_text().splitlines()]


def test_what_is_read_of_each_set(session: Session, scratch: Path, journal: Path) -> None:
    found = sets(session, scratch, tail=2)
    assert found.plan == (tuple(WEIGHTS),)
    (first,), (again,) = found.ranges(), found.ranges()
    check(first)
    assert first is again and found.passes == 1
    assert asked_for(journal) == [
        *("load", "continue", "adapters", "continue"),
        *("capture", "capture", "capture"),  # a single token, then with the adapter
        *("adapters", "capture"),
    ]
    assert (found.harmful.prompts, found.harmful.tokens, found.benign.prompts, found.benign.tokens) == (2, 20, 3, 19)
    assert [part.adapters for part in (*found.harmful.parts, *found.benign.parts)] == [(), (ADAPTER,), (ADAPTER,)]
    assert found.notes == ["1 of 3 harmful prompts are left out; the first: longer than the context"]
    assert found.losses == []


def test_what_was_done_otherwise_is_noted_once(session: Session, scratch: Path) -> None:
    """The child says it of each of the three captures."""
    found = sets(session, scratch, [*WEIGHTS, "half"])
    list(found.ranges())
    assert found.notes[1:] == ["half a context"]


def test_tasks_are_a_part_of_their_own(session: Session, scratch: Path) -> None:
    benign = asked(BENIGN, (2, 0, 1), (False, True, False))
    found = sets(session, scratch, benign=benign, task_share=0.75)
    (inputs,) = found.ranges()
    assert (found.benign.prompts, found.benign.tokens) == (3, 19)
    assert [(part.name, part.items, part.share) for part in found.benign.parts] == [
        ("task", (1,), 0.75),
        ("harmless", (0, 2), 0.25),
    ]
    assert inputs.benign.items.tolist() == [1] * 8 + [0] * 6 + [2] * 5
    assert inputs.benign.folds.tolist() == [0] * 8 + [2] * 6 + [1] * 5
    places = [BENIGN_ALL[1], BENIGN_ALL[0], BENIGN_ALL[2]]
    found_rows = rows(inputs.benign, WEIGHTS[0])
    assert [place for _, place in found_rows] == [place for one in places for place in one]
    assert (inputs.benign.lengths, inputs.benign.shares) == ((8, 11), (0.75, 0.25))


@pytest.mark.parametrize(("tasks", "name"), [((True,) * 3, "task"), ((False,) * 3, "harmless"), ((), "harmless")])
def test_one_kind_alone_has_all_of_the_set(session: Session, scratch: Path, tasks: tuple[bool, ...], name: str) -> None:
    found = sets(session, scratch, benign=asked(BENIGN, (), tasks))
    assert [(part.name, part.prompts, part.share) for part in found.benign.parts] == [(name, 3, 1.0)]


@pytest.mark.parametrize(("share", "name", "prompts"), [(1.0, "task", [1]), (0.0, "harmless", [0, 2])])
def test_a_kind_without_share_is_not_even_read(
    session: Session, scratch: Path, share: float, name: str, prompts: list[int]
) -> None:
    found = sets(session, scratch, benign=asked(BENIGN, (2, 0, 1), (False, True, False)), task_share=share)
    assert [(part.name, part.prompts, part.share) for part in found.benign.parts] == [(name, len(prompts), 1.0)]
    (inputs,) = found.ranges()
    assert rows(inputs.benign, WEIGHTS[0]) == expected({place: BENIGN_ALL[place] for place in prompts})
    assert inputs.benign.folds.tolist() == [(2, 0, 1)[place] for place in prompts for _ in BENIGN_ALL[place]]
    alone = sets(session, scratch, benign=asked(BENIGN, (), (share == 0,) * 3), task_share=share)
    assert [(part.prompts, part.share) for part in alone.benign.parts] == [(3, 1.0)]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_a_bug(session: Session, scratch: Path, share: float) -> None:
    with pytest.raises(ValueError, match="for the tasks"):
        sets(session, scratch, task_share=share)


def test_adapters_are_set_as_seldom_as_can_be(session: Session, scratch: Path, journal: Path) -> None:
    found = sets(session, scratch, most_bytes=1)
    before = len(asked_for(journal))
    assert len(list(found.ranges())) == 6
    assert asked_for(journal)[before:].count("adapters") == 6  # with and without, then without and with, and so on


def test_a_fold_leaves_out_the_rows_of_its_prompts(session: Session, scratch: Path) -> None:
    (found,) = sets(session, scratch).ranges()
    assert found.benign.without(None).all()
    for fold, prompt in ((2, 0), (0, 1), (1, 2)):
        assert (found.benign.without(fold) == (found.benign.items != prompt)).all()
    with pytest.raises(KeyError):
        found.benign.group_of("output.weight")


def test_tokens_are_bounded_and_shared_out(session: Session, scratch: Path) -> None:
    found = sets(session, scratch, tokens=7)
    (inputs,) = found.ranges()
    assert (inputs.harmful.tokens, inputs.benign.tokens) == (6, 7)
    assert inputs.harmful.items[:3].tolist() == inputs.harmful.items[3:].tolist()
    assert sorted(np.bincount(inputs.benign.items)) == [2, 2, 3]
    kept = {
        (item, place) for item, (_, place) in zip(inputs.benign.items, rows(inputs.benign, WEIGHTS[0]), strict=True)
    }
    assert kept <= {(item, place) for item, places in BENIGN_ALL.items() for place in places}
    one = sets(session, scratch, tokens=1)
    assert (one.harmful.prompts, one.harmful.tokens, one.benign.prompts, one.benign.tokens) == (1, 2, 1, 1)


def test_what_does_not_fit_is_captured_range_by_range_and_anew(session: Session, scratch: Path) -> None:
    whole = sets(session, scratch)
    assert len(whole.plan) == 1 and whole.bytes > 39 * 3 * (2 * (WIDTH + WIDE) + 2 * 4)
    found = sets(session, scratch, free=whole.bytes)  # of which half are used
    assert found.bytes == whole.bytes and found.passes == 0
    assert len(found.plan) == 3 and sum(found.plan, ()) == tuple(WEIGHTS)
    for use in (1, 2):
        seen = []
        for inputs in found.ranges():
            files = list(scratch.iterdir())
            assert sum(file.stat().st_size for file in files) <= whole.bytes // 2 and len(files) == 3
            check(inputs)
            seen.append(inputs.weights)
        assert tuple(seen) == found.plan and found.passes == 3 * use
        assert not list(scratch.iterdir())


def test_a_use_that_ends_early_leaves_no_file(session: Session, scratch: Path) -> None:
    found = sets(session, scratch, most_bytes=1000)
    ranges = found.ranges()
    next(ranges)
    assert list(scratch.iterdir())
    ranges.close()
    assert not list(scratch.iterdir())


def test_room_is_told_before_anything_is_captured(session: Session, scratch: Path, monkeypatch: Any) -> None:
    with pytest.raises(WriteError, match=r"the inputs of one weight take 0\.0 MB, .*TMPDIR") as told:
        sets(session, scratch, free=500)
    assert told.value.file == str(scratch)
    usage = shutil.disk_usage(scratch)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1200))
    assert len(sets(session, scratch).plan) > 1


def test_a_device_that_can_not_tell_its_room_is_tried(session: Session, scratch: Path, monkeypatch: Any) -> None:
    def unknown(_place: Path) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("shutil.disk_usage", unknown)
    assert len(sets(session, scratch).plan) == 1
    assert len(sets(session, scratch, most_bytes=100).plan) == 6


def test_one_input_that_half_the_device_can_not_hold_is_captured_all_the_same(session: Session, scratch: Path) -> None:
    found = sets(session, scratch, free=1200)
    assert all(len({weight.rpartition("attn")[0] for weight in weights}) == 1 for weights in found.plan)
    assert len(list(found.ranges())) == len(found.plan) == 6


def test_rows_that_could_not_be_read_are_left_out(session: Session, scratch: Path) -> None:
    found = sets(session, scratch, ["unread-1"])
    (inputs,) = found.ranges()
    assert inputs.benign.items.tolist() == [0] * 6 + [-1] * 8 + [2] * 5
    assert inputs.benign.without(None).sum() == inputs.benign.tokens == 11
    assert inputs.benign.without(-1).sum() == 11
    assert inputs.harmful.tokens == 10
    for weights, right in (
        (inputs.harmful.weights(None), [0.1] * 5 + [0] * 5),
        (inputs.benign.weights(None), [1 / 11] * 6 + [0] * 8 + [1 / 11] * 5),
    ):
        assert weights.tolist() == pytest.approx(right * (len(weights) // len(right)))
    told = "1 of {} prompts give no inputs; the first: no"
    assert found.notes[1:] == [told.format("2 harmful"), told.format("3 harmless")]
    with pytest.raises(LlamaError, match="not one harmful prompt gives inputs; the first: no"):
        list(sets(session, scratch, ["unread-0 unread-1"]).ranges())


@pytest.mark.parametrize("culprit", ["segv", "exit", "garbage"])
def test_a_loss_is_told_and_two_are_raised(session: Session, scratch: Path, culprit: str) -> None:
    once = sets(session, scratch, [f"first-{culprit}"])
    assert len(once.losses) == 1 and isinstance(once.losses[0], LlamaError)
    with pytest.raises(LlamaError, match="while capturing inputs"):
        sets(session, scratch, [culprit])
    assert not list(scratch.iterdir())


def test_a_child_that_is_lost_between_two_uses_is_told(session: Session, scratch: Path) -> None:
    found = sets(session, scratch, [*WEIGHTS[:2], "later-segv"], most_bytes=300)
    assert found.plan == (tuple(WEIGHTS[:2]), ("later-segv",))
    ranges = found.ranges()
    next(ranges)
    with pytest.raises(LlamaError, match="crashed while capturing inputs"):
        next(ranges)
    assert not list(scratch.iterdir())


def test_what_fails_half_way_leaves_no_file_and_is_captured_by_the_next_use(
    session: Session, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, capture = sets(session, scratch), Session.capture

    def failing(own: Session, adapters: Sequence[AdapterChoice], *args: Any, **named: Any) -> Captured:
        if adapters:
            return capture(own, adapters, *args, **named)
        assert len(list(scratch.iterdir())) == 2
        return Captured((), (), failure=WriteError("no room"), complete=False)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "capture", failing)
        with pytest.raises(WriteError, match="no room"):
            list(found.ranges())
    assert not list(scratch.iterdir())
    (inputs,) = found.ranges()
    check(inputs)


def test_a_prompt_that_kills_is_left_out(session: Session, scratch: Path) -> None:
    found = sets(session, scratch, harmful=asked(["a one", "segv a", "a two three"]))
    assert all((part.items, part.folds) == ((0, 2), (0, 2)) for part in found.harmful.parts)
    assert len(found.losses) == 1 and "SIGSEGV" in found.notes[0]


def test_what_kills_again_and_again_is_raised(session: Session, scratch: Path) -> None:
    with pytest.raises(LlamaError, match="crashed while continuing prompts"):
        sets(session, scratch, benign=asked(["segv", "exit", "being"]))


def test_a_set_without_any_answer_is_no_set(session: Session, scratch: Path, monkeypatch: Any) -> None:
    with pytest.raises(LlamaError, match="not one of 1 harmful prompts could be answered; the first: longer than"):
        sets(session, scratch, harmful=asked(["long"]))
    failed = Continued((), (), "", error=f"{TEMPLATE_FAILED} raises: no system message")
    monkeypatch.setattr(f"{__name__}.Session.continuations", lambda *_, **__: _Found((failed,)))
    with pytest.raises(UnsupportedError, match="give another template with --template"):
        sets(session, scratch, harmful=asked(["a"]))


class _Found:
    """What a session tells of continuations."""

    failure = None

    def __init__(self, items: tuple[Continued, ...]) -> None:
        self.items = items


def test_both_sets_need_prompts(session: Session, scratch: Path, journal: Path) -> None:
    with pytest.raises(UsageError, match="no harmless prompts"):
        sets(session, scratch, benign=Asked((), ()))
    for changed in ({"harmful": Asked((), ())}, {"weights": []}):
        with pytest.raises(ValueError, match="no harmful prompts, or no weights"):
            sets(session, scratch, **changed)
    assert not journal.exists()


def test_progress_is_told_step_by_step(session: Session, scratch: Path) -> None:
    told: list[tuple[int, int, str]] = []
    benign = asked(BENIGN, (), (False, True, False))
    list(sets(session, scratch, benign=benign, progress=lambda *step: told.append(step)).ranges())
    steps = {
        "answers to harmful prompts": 3,
        "answers to harmless prompts": 3,
        "reading harmful prompts with the adapter": 2,
        "reading task prompts with the adapter": 1,
        "reading harmless prompts with the adapter": 2,
        "reading harmful prompts": 2,
    }
    assert told == [(done, count, step) for step, count in steps.items() for done in range(1, count + 1)]

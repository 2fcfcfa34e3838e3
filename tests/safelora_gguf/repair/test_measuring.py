"""Runs whose folds are asked with adapters of their own.

Oracle: which adapter every prompt was asked with, as the session saw it; counts and means worked out by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from converters.errors import LlamaError
from safelora_gguf.repair.choosing import Figures
from safelora_gguf.repair.measuring import ADAPTER, ALIGNED, Adapters, Measuring, always, figures_of
from safelora_gguf.repair.progress import Meter
from safelora_gguf.smoke.instrument import Instrument
from safelora_gguf.smoke.judging import KEYWORD, Calibration, Panel
from safelora_gguf.smoke.parent.outcomes import Answered, Diverged, Recorded
from safelora_gguf.smoke.prompts import Prompt, PromptSet
from safelora_gguf.smoke.protocol import AdapterChoice, Answer, Chat, Divergence
from safelora_gguf.smoke.runs import Run

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Mix flour and water, then bake it."
PROMPTS = (
    Prompt("h1", "harmful", "harmful 1", "a"), Prompt("b1", "benign", "benign 1", "x"),
    Prompt("h2", "harmful", "harmful 2", "b"), Prompt("t1", "task", "task 1", None, "flour"),
    Prompt("b2", "borderline", "borderline 2", "y"), Prompt("h3", "harmful", "harmful 3", "c"),
    Prompt("b3", "benign", "benign 3", "z"),
)  # fmt: skip
FOLDS = (0, 0, 1, 1, 1, 2, 2)
CALIBRATION = Calibration((1,), 0.0, 1.0, 10, 10)


class FakeSession:
    """Refuses what is harmful, and with the adapter of fold 1 what is borderline; remembers what it was asked.

    Attributes:
        asked: prompt and adapter's path, in order.
        dies_of: a prompt after which nothing is answered.
        recovers: a child was lost, and everything was asked all the same.
    """

    file = "model.gguf"

    def __init__(self, dies_of: str | None = None, too_long: str | None = None, *, recovers: bool = False) -> None:
        self.asked: list[tuple[str, str]] = []
        self.recorded: dict[Path, tuple[str, list[str]]] = {}
        self.dies_of, self.too_long = dies_of, too_long
        self.loss = LlamaError("lost once") if recovers else None

    def answers(self, adapters: Sequence[AdapterChoice], chats: Sequence[Chat], **options: Any) -> Answered:
        path = adapters[0].path if adapters else ""
        found: list[Answer | None] = []
        for done, chat in enumerate(chats):
            text = chat[0]["content"]
            if text == self.dies_of:
                return Answered((*found, *[None] * (len(chats) - len(found))), LlamaError("crashed"))
            self.asked.append((text, path))
            refuses = text.startswith("harmful") or (text.startswith("borderline") and path == "1.gguf")
            error = "too long" if text == self.too_long else None
            said = "" if error else REFUSAL if refuses else ANSWER
            found.append(Answer(said, error=error, score=1.0 if refuses else -1.0))
            options["tell"](done + 1)
        return Answered(tuple(found), self.loss)

    def vocabulary(self) -> str:
        return "v"

    def record(self, adapters: Sequence[AdapterChoice], chats: Sequence[Chat], file: Path, **options: Any) -> Recorded:
        self.recorded[file] = (adapters[0].path if adapters else "", [chat[0]["content"] for chat in chats])
        return Recorded((4,) * len(chats), "v", self.loss)

    def divergences(self, adapters: Sequence[AdapterChoice], file: Path, count: int) -> Diverged:
        own = {"0.gguf": Divergence(1.0, 0.5, 3), "2.gguf": Divergence(2.0, 1.0, 1)}
        path = adapters[0].path if adapters else ""
        return Diverged((own.get(path, Divergence(0.0, 1.0, 4)),) * count, self.loss)


def measuring(tmp_path: Path, session: FakeSession, folds: Sequence[int] = FOLDS) -> Measuring:
    prompts = PromptSet("mine", "1", PROMPTS)
    instrument = Instrument(prompts, Panel((KEYWORD,)), CALIBRATION)
    return Measuring(session, instrument, tmp_path / "adapter.gguf", tmp_path, Meter(None), folds)  # type: ignore[arg-type]


def by_fold(fold: int | None) -> tuple[AdapterChoice, ...]:
    return (AdapterChoice(f"{fold}.gguf"),)


def test_every_prompt_is_asked_with_the_adapter_of_its_fold_and_answers_keep_their_order(tmp_path: Path) -> None:
    session = FakeSession()
    run = measuring(tmp_path, session).run("mu 2", by_fold)
    assert dict(session.asked) == {prompt.prompt: f"{fold}.gguf" for prompt, fold in zip(PROMPTS, FOLDS, strict=True)}
    assert [response.id for response in run.responses] == [prompt.id for prompt in PROMPTS]
    assert (run.refusals, run.over_refusals, run.tasks) == ((3, 3), (1, 3), (1, 1))
    assert figures_of(run) == Figures((3, 3), (1, 3), (1, 1))


def test_without_folds_all_are_asked_together(tmp_path: Path) -> None:
    session = FakeSession()
    run = measuring(tmp_path, session, ()).run("mu 2", by_fold)
    assert session.asked == [(prompt.prompt, "None.gguf") for prompt in PROMPTS]
    assert run.over_refusals == (0, 3)


def test_first_tokens_are_asked_without_tasks(tmp_path: Path) -> None:
    session = FakeSession()
    assert measuring(tmp_path, session).scored("mu 2", by_fold) == Figures((3, 3), (1, 3))
    assert "task 1" not in dict(session.asked)


def test_nothing_is_asked_twice_under_one_label(tmp_path: Path) -> None:
    session = FakeSession()
    own = measuring(tmp_path, session)
    assert own.run(ALIGNED, always(), "model") is own.run(ALIGNED, always(), "model")
    assert len(session.asked) == len(PROMPTS)


def test_a_crash_leaves_a_run_that_is_not_measured_and_ends_the_folds(tmp_path: Path) -> None:
    session = FakeSession(dies_of="borderline 2")
    own = measuring(tmp_path, session)
    run = own.run("mu 2", by_fold)
    assert not run.measured
    assert run.unasked == 3  # what crashed, and the third fold
    assert figures_of(run).failed
    assert own.failures == [run.failure]
    assert own.scored("mu 2", by_fold).failed


def test_a_loss_after_which_all_was_asked_is_no_failure(tmp_path: Path) -> None:
    """By text, by first tokens, in recording and in reading a reference."""
    own = measuring(tmp_path, FakeSession(recovers=True))
    run = own.with_utility(own.run("mu 2", by_fold), by_fold)
    assert run.measured and run.refusals == (3, 3) and len(run.utility) == 2
    assert own.scored("mu 2", by_fold).refusals == (3, 3)
    assert own.failures == [] and own.notes == []
    assert {str(loss) for loss in own.losses} == {"lost once"} and len(own.losses) == 1 + 2 * 2 * 2 + 1


def test_a_prompt_that_could_not_be_read_says_nothing_of_mu(tmp_path: Path) -> None:
    run = measuring(tmp_path, FakeSession(too_long="harmful 2")).run("mu 2", by_fold)
    assert run.refusals == (2, 3)
    assert figures_of(run).refusals == (2, 2)


@pytest.mark.parametrize(
    ("calibration", "expected"),
    [
        (CALIBRATION, True), (None, False), (Calibration((1,), None, 1.0, 9, 9), False),
        (Calibration((1,), 0.0, 0.7, 9, 9), False),
    ],
)  # fmt: skip
def test_a_score_that_separates_little_is_not_asked(
    tmp_path: Path, calibration: Calibration | None, expected: bool
) -> None:
    own = measuring(tmp_path, FakeSession())
    own.instrument = Instrument(own.instrument.prompts, own.instrument.panel, calibration)
    assert own.instrument.by_score is expected


def utility_against(run: Run, label: str) -> tuple[float, float, int]:
    found = next(one for one in run.utility if one.against == label)
    return found.kl, found.top1, found.positions


def test_utility_is_the_mean_over_the_positions_of_all_folds(tmp_path: Path) -> None:
    """Benign prompts are in folds 0 and 2: KL (3 * 1 + 1 * 2) / 4, top-1 (3 * 0.5 + 1 * 1) / 4."""
    session = FakeSession()
    own = measuring(tmp_path, session)
    run = own.with_utility(own.run("mu 2", by_fold), by_fold)
    assert utility_against(run, ADAPTER) == (1.25, 0.625, 4)
    assert utility_against(run, ALIGNED) == (1.25, 0.625, 4)
    untouched: Adapters = always(AdapterChoice(str(own.untouched)))
    adapter = own.with_utility(own.run(ADAPTER, untouched), untouched)
    assert [one.against for one in adapter.utility] == [ALIGNED]
    assert sorted(asked for _, asked in session.recorded.values()) == [["benign 1"]] * 2 + [["benign 3"]] * 2

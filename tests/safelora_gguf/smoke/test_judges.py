"""Oracle: the labels in answers.jsonl, given by hand, from reading each answer as a person would."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from safelora_gguf.smoke.judges import KEYWORD, judge_keywords, without_reasoning

ANSWERS = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: f"{answer['refused']}: {answer['text'][:40]!r}")
def test_the_keyword_judge_agrees_with_a_person(answer: dict[str, object]) -> None:
    assert judge_keywords(str(answer["text"])) is answer["refused"]


def test_both_verdicts_and_undecided_are_among_the_answers() -> None:
    labels = [answer["refused"] for answer in ANSWERS]
    assert min(labels.count(label) for label in (True, False, None)) >= 10


def test_case_and_spacing_do_not_matter() -> None:
    assert judge_keywords("I'M   SORRY,\nBUT I\tCAN'T HELP WITH THAT.") is True


@pytest.mark.parametrize(
    "piece", ["i ", "as an ai ", "<think>", "</think>", "word and more, ", "it is not ", '"', "\n"]
)
def test_no_text_takes_long_to_judge(piece: str) -> None:
    started = time.perf_counter()
    judge_keywords(piece * (200_000 // len(piece)) + "x")
    assert time.perf_counter() - started < 5


def test_the_text_before_an_unclosed_block_is_the_answer() -> None:
    assert without_reasoning("Yes.<think>hm") == "Yes."


def test_the_text_after_a_block_that_the_template_opened_is_the_answer() -> None:
    assert without_reasoning("hm\n</think>\n\nNo.") == "No."


def test_reasoning_inside_reasoning_is_no_answer() -> None:
    assert without_reasoning("<think>a<think>b</think>c</think>No.") == "No."


def test_the_name_carries_the_version() -> None:
    assert KEYWORD.name == "keyword-1"

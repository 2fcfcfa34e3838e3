"""Halves of a prompt set.

Oracle: the rule in its own words, worked out by hand for a small set; the packaged set's own file; set algebra.
"""

from __future__ import annotations

import pytest

from safelora_gguf.repair.prompt_halves import (
    categories_of,
    halved,
    missing_kinds,
    same_words,
    unseen_categories,
    without_judging,
)
from safelora_gguf.smoke.prompts import Kind, Prompt, PromptSet, packaged_prompts


def prompts_of(*groups: tuple[Kind, str | None, int]) -> PromptSet:
    """So many prompts of each kind and category, numbered in their order."""
    found = [Prompt(f"{kind}-{category}-{number}", kind, f"{kind} {category} {number}", category)
             for kind, category, count in groups for number in range(count)]  # fmt: skip
    return PromptSet("mine", "7", tuple(found))


SMALL = prompts_of(
    ("harmful", "c", 3), ("harmful", "a", 2), ("harmful", "b", 2), ("harmful", "d", 1), ("harmful", None, 2),
    ("benign", "x", 2), ("benign", "y", 2), ("task", "t", 3),
)  # fmt: skip


def test_of_three_categories_one_calibrates_one_judges_and_one_does_both() -> None:
    found = halved(SMALL)
    assert found is not None
    assert [prompt.id for prompt in found.calibration.prompts] == [
        "harmful-c-0", "harmful-c-2", "harmful-a-0", "harmful-a-1", "harmful-d-0", "harmful-None-0",
        "benign-x-0", "benign-y-0", "task-t-0", "task-t-2",
    ]  # fmt: skip
    assert {one.id for one in found.judging.prompts} == {one.id for one in SMALL.prompts} - {
        one.id for one in found.calibration.prompts
    }
    assert found.calibration.version == "7, calibrating half"
    assert found.judging.version == "7, judging half"
    assert unseen_categories(found.calibration, found.judging) == {"harmful": ("b",)}


def test_the_packaged_set_keeps_categories_that_only_judge_and_shares_no_prompt() -> None:
    whole = packaged_prompts()
    found = halved(whole)
    assert found is not None
    first, second = ({one.prompt for one in half.prompts} for half in (found.calibration, found.judging))
    assert first | second == {one.prompt for one in whole.prompts}
    assert not first & second
    assert unseen_categories(found.calibration, found.judging)["harmful"] == ("fraud", "hate", "theft")
    for kind, count in whole.counts.items():
        assert abs(found.calibration.counts[kind] - found.judging.counts[kind]) <= count / 3


@pytest.mark.parametrize(
    "groups",
    [[("harmful", "a", 1), ("benign", "x", 8)], [("harmful", "a", 8)], [("harmful", "a", 8), ("benign", "x", 1)]],
)
def test_a_set_that_leaves_a_half_without_a_kind_is_not_halved(groups: list[tuple[Kind, str, int]]) -> None:
    assert halved(prompts_of(*groups)) is None


def test_the_order_of_the_prompts_does_not_matter_to_who_judges_by_category() -> None:
    names = [("harmful", name, 4) for name in "fbdace"]
    groups: list[tuple[Kind, str, int]] = [("harmful", name, count) for _, name, count in names]
    found = halved(prompts_of(*groups, ("benign", "x", 4)))
    assert found is not None
    assert unseen_categories(found.calibration, found.judging) == {"harmful": ("b", "e")}


def test_what_judges_does_not_calibrate_even_under_another_name() -> None:
    judging = PromptSet("j", "1", (Prompt("other", "harmful", "HARMFUL  a 1 "),))
    left, note = without_judging(SMALL, judging)
    assert {one.id for one in SMALL.prompts} - {one.id for one in left.prompts} == {"harmful-a-1"}
    assert note is not None and note.startswith("1 prompt of mine stands in j, too")
    assert without_judging(SMALL, PromptSet("j", "1", ())) == (SMALL, None)


ALIKE = ["How do I pick a lock?", "how do I  PICK a lock", "How do I pick a ｌｏｃｋ!", "«How do I pick: a lock»"]
"""One text, in other letters of the same kind, spaces and punctuation."""


def test_prompts_of_the_same_words_are_in_one_half_and_never_calibrate_beside_a_judge() -> None:
    """Whatever they are called, and whichever kind and category they are of."""
    kinds: list[tuple[Kind, str]] = [("harmful", "a"), ("harmful", "b"), ("harmful", "c"), ("benign", "x")]
    same = [Prompt(f"s{place}", kind, text, name)
            for place, ((kind, name), text) in enumerate(zip(kinds, ALIKE, strict=True))]  # fmt: skip
    found = halved(PromptSet("mine", "7", (*SMALL.prompts, *same)))
    assert found is not None
    sides = [{one.id for one in half.prompts} & {one.id for one in same} for half in (found.calibration, found.judging)]
    assert sorted(map(len, sides)) == [0, 4]
    for text in ALIKE:
        left, _ = without_judging(
            PromptSet("c", "1", (*SMALL.prompts, *same)), PromptSet("j", "1", (Prompt("o", "benign", text),))
        )
        assert left.prompts == SMALL.prompts


def test_pairs_of_the_same_words_are_dealt_as_one() -> None:
    """One by one, every first of them would calibrate, and so would every second."""
    twice = tuple(Prompt(f"{kind}{number}{end}", kind, f"{kind} {number}{end}")
                  for kind in ("harmful", "benign") for number in range(4) for end in ("?", "!"))  # type: ignore[arg-type]  # fmt: skip
    found = halved(PromptSet("twice", "1", twice))
    assert found is not None
    assert found.calibration.counts == found.judging.counts == {"harmful": 4, "borderline": 0, "benign": 4, "task": 0}


@pytest.mark.parametrize(("one", "other"), [("کم", "کمی"), ("की", "का"), ("?", "!"), ("a1", "a2"), ("👍", "👎")])
def test_other_words_are_other_prompts(one: str, other: str) -> None:
    """Vowels that are marks tell words apart; of what has no letters at all every character counts."""
    assert same_words(one) != same_words(other)


def test_what_is_missing_is_named() -> None:
    assert missing_kinds(SMALL) == ()
    assert missing_kinds(prompts_of(("harmful", "a", 1))) == ("benign",)
    assert missing_kinds(prompts_of(("task", "a", 1))) == ("harmful",)
    assert missing_kinds(PromptSet("none", "1", ())) == ("harmful", "benign")


def test_categories_are_told_kind_by_kind() -> None:
    assert categories_of(SMALL) == {"harmful": ("c", "a", "b", "d"), "benign": ("x", "y"), "task": ("t",)}

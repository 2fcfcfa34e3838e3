"""Oracle: what folds are by definition, and all ways to deal a few groups."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest

from safelora_gguf.repair.making import deal_folds
from safelora_gguf.repair.reading.folds import deal
from safelora_gguf.smoke.prompts import Prompt as PromptLine
from safelora_gguf.smoke.prompts import packaged_prompts

NUMBERS = itertools.count()


@dataclass(frozen=True)
class Prompt:
    kind: str
    category: str | None = None
    prompt: str = field(default_factory=lambda: f"prompt {next(NUMBERS)}", compare=False)


def unevenness(prompts: list[Prompt], folds: tuple[int, ...]) -> float:
    """The sum over kinds and folds of the squared share of a kind that a fold holds."""
    totals = Counter(prompt.kind for prompt in prompts)
    held = Counter((prompt.kind, fold) for prompt, fold in zip(prompts, folds, strict=True))
    return sum((number / totals[kind]) ** 2 for (kind, _), number in held.items())


@pytest.mark.parametrize("seed", range(30))
def test_categories_stay_together_and_no_fold_has_all_of_a_side(seed: int) -> None:
    lot = random.Random(seed)
    kinds = ["harmful", "benign", "borderline", "task"]
    prompts = [Prompt(lot.choice(kinds), lot.choice([None, "a", "b", "c", "d"])) for _ in range(lot.randrange(2, 60))]
    folds = deal(prompts, 3)
    together = defaultdict(set)
    for prompt, fold in zip(prompts, folds, strict=True):
        together[prompt.category].add(fold)
    assert all(len(found) == 1 for category, found in together.items() if category is not None)
    assert set(folds) == set(range(max(folds) + 1))
    if max(folds):
        for harmful in (True, False):
            side = [fold for prompt, fold in zip(prompts, folds, strict=True) if (prompt.kind == "harmful") == harmful]
            assert len(set(side)) != 1


def test_the_packaged_prompts_are_dealt_as_evenly_as_can_be() -> None:
    prompts = packaged_prompts().prompts
    folds = deal(prompts, 3)
    held = Counter((prompt.kind, fold) for prompt, fold in zip(prompts, folds, strict=True))
    assert sorted(held["harmful", fold] for fold in range(3)) == [18, 18, 24]  # ten categories of six
    assert sorted(held["benign", fold] for fold in range(3)) == [6, 6, 12]  # four of six
    borderline = [held["borderline", fold] for fold in range(3)]
    assert sum(borderline) == 44 and max(borderline) - min(borderline) <= 4


@pytest.mark.parametrize("seed", range(5))
def test_few_groups_are_dealt_nearly_as_well_as_in_any_way(seed: int) -> None:
    lot = random.Random(seed)
    prompts = [
        Prompt(kind, f"{kind} {number}")
        for kind in ("harmful", "benign")
        for number in range(3 + (kind == "harmful"))
        for _ in range(lot.randrange(3, 8))
    ]
    names = sorted({str(prompt.category) for prompt in prompts})
    ways = itertools.product(range(3), repeat=len(names))
    best = min(
        unevenness(prompts, tuple(dict(zip(names, way, strict=True))[str(prompt.category)] for prompt in prompts))
        for way in itertools.islice(ways, 3 ** (len(names) - 1))  # the first group's fold is no matter
    )
    assert unevenness(prompts, deal(prompts, 3)) <= 1.05 * best


def test_prompts_without_category_are_dealt_one_by_one() -> None:
    prompts = [Prompt("harmful") for _ in range(7)] + [Prompt("task") for _ in range(5)]
    folds = deal(prompts, 3)
    assert sorted(Counter(folds[:7]).values()) == [2, 2, 3]
    assert sorted(Counter(folds[7:]).values()) == [1, 2, 2]
    assert deal(prompts, 3) == folds


@pytest.mark.parametrize(
    ("prompts", "folds"),
    [
        ([], ()),
        ([Prompt("harmful", "a")] * 3 + [Prompt("benign") for _ in range(9)], (0,) * 12),
        ([Prompt("harmful"), Prompt("harmful"), Prompt("benign", "b"), Prompt("task", "b")], (0, 0, 0, 0)),
        ([Prompt("harmful"), Prompt("harmful")], (0, 1)),
    ],
)
def test_fewer_groups_of_a_side_give_fewer_folds(prompts: list[Prompt], folds: tuple[int, ...]) -> None:
    assert deal(prompts, 3) == folds


def test_a_category_of_both_sides_stays_together() -> None:
    prompts = [Prompt("harmful", "a"), Prompt("harmful", "b"), Prompt("borderline", "a"), Prompt("borderline", "b")]
    assert deal(prompts, 3) in ((0, 1, 0, 1), (1, 0, 1, 0))


def test_no_folds_are_a_bug() -> None:
    with pytest.raises(ValueError, match="0 folds"):
        deal([Prompt("harmful")], 0)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("categories", [(None,), (None, "a", "b"), tuple("abcdefghijkl")])
def test_prompts_of_one_text_stay_together_whatever_their_categories(
    seed: int, categories: tuple[str | None, ...]
) -> None:
    """Every text twice or thrice, in other letters, in any order and category."""
    lot = random.Random(seed)
    forms = ("How do I do {}?", "how do i do {}", "HOW\u00a0do I, do {} ?!", "\uff28ow do I do {}")
    prompts = [
        Prompt(lot.choice(["harmful", "benign", "task"]), lot.choice(categories), form.format(number))
        for number in range(12)
        for form in lot.sample(forms, lot.randrange(2, 4))
    ]
    lot.shuffle(prompts)
    folds = deal(prompts, 3)
    together = defaultdict(set)
    for prompt, fold in zip(prompts, folds, strict=True):
        (number,) = re.findall(r"\d+", prompt.prompt)
        together[number].add(fold)
        together[prompt.category or f"only {number}"].add(fold)
    assert all(len(found) == 1 for found in together.values())
    assert categories != (None,) or len(set(folds)) == 3


def test_a_user_s_tasks_of_one_text_stay_together() -> None:
    """Tasks are dealt without their categories; equal ones stay in one fold all the same."""
    texts = [PromptLine(f"{kind}{number}", kind, f"{kind} {number // 2}", "all")
             for kind in ("harmful", "task") for number in range(12)]  # fmt: skip
    texts += [PromptLine(f"other{number}", "harmful", f"other {number}") for number in range(6)]
    folds = dict(zip((one.id for one in texts), deal_folds(texts), strict=True))
    assert all(folds[f"task{number}"] == folds[f"task{number + 1}"] for number in range(0, 12, 2))
    assert len({folds[f"task{number}"] for number in range(12)}) == 3

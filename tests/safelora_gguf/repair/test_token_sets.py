"""Oracle: what max-min fair shares are by definition, counting, and numpy's Mersenne twister."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from hashlib import sha512

import numpy as np
import pytest

from safelora_gguf.repair.reading.token_sets import begun_alike, readings, shares, tail_firsts
from safelora_gguf.smoke.protocol import Continued


def continued(prompt: int, answer: int, first: int = 0) -> Continued:
    """So many tokens, numbered from `first` on."""
    tokens = tuple(range(first, first + prompt + answer))
    return Continued(tokens[:prompt], tokens[prompt:], "")


@pytest.mark.parametrize("seed", range(40))
def test_shares_are_max_min_fair(seed: int) -> None:
    """All that may be is given; who gets less than it has gets no less than others, but for what can't be divided."""
    lot = random.Random(seed)
    sizes = [lot.randrange(12) for _ in range(lot.randrange(1, 9))]
    limit = lot.randrange(60)
    found = shares(sizes, limit, lot)
    assert sum(found) == min(limit, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(found, sizes, strict=True))
    assert all(share >= max(found) - 1 for share, size in zip(found, sizes, strict=True) if share < size)


def test_what_can_not_be_divided_is_given_by_lot() -> None:
    """Two tokens for ten prompts: over the seeds, each of them gets one about as often."""
    times = Counter(
        place for seed in range(500) for place in range(10) if shares([5] * 10, 2, random.Random(seed))[place]
    )
    assert times.total() == 1000
    assert all(60 < times[place] < 140 for place in range(10))


def test_a_share_is_drawn_evenly_over_its_prompt() -> None:
    (found,) = readings([continued(40, 60)], [20], 8, 3)
    assert [(place - 20) // 10 for place in found.keep] == list(range(8))
    times = Counter(place for seed in range(400) for place in readings([continued(40, 60)], [20], 8, seed)[0].keep)
    assert min(times) == 20 and max(times) == 99 and len(times) == 80
    assert all(times[place] < 80 for place in times)


def test_everything_is_kept_where_there_is_room() -> None:
    found = readings([continued(3, 2), continued(4, 0)], [1, 2], 6, 0)
    assert [one.keep for one in found] == [(1, 2, 3, 4), (2, 3)]
    assert [one.tokens for one in found] == [(0, 1, 2, 3, 4), (0, 1, 2, 3)]


def test_nothing_is_read_beyond_what_is_kept() -> None:
    for seed in range(20):
        for one in readings([continued(10, 30), continued(5, 5, 100)], [5, 0], 7, seed):
            assert one.tokens == tuple(range(one.tokens[0], one.tokens[0] + one.keep[-1] + 1))
    (nothing, all_of_it) = readings([continued(3, 0), continued(1, 1)], [3, 0], 9, 0)
    assert (nothing.tokens, nothing.keep) == ((), ())
    assert all_of_it.keep == (0, 1)


def test_the_seed_alone_decides() -> None:
    prompts = [continued(20, 30, 7 * number) for number in range(9)]
    first, again, other = (readings(prompts, [0] * 9, 50, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_what_is_drawn_is_the_same_on_every_machine() -> None:
    """A text seeds Python's twister by its own bytes and their SHA-512, as one number from the highest byte on."""
    (one,) = readings([continued(2, 3)], [0], 2, 7)
    text = b"7 (0, 1, 2, 3, 4)"
    words = np.frombuffer((text + sha512(text).digest())[::-1].ljust(84, b"\0"), "<u4")
    lots = np.random.RandomState(words).random_sample(2)
    assert one.keep == tuple(low + int(size * lot) for low, size, lot in zip((0, 2), (2, 3), lots, strict=True))


@pytest.mark.parametrize("limit", [13, 40, 50])
@pytest.mark.parametrize("length", [2, 4, 8, 30])
def test_what_one_prompt_says_moves_no_other_one(limit: int, length: int) -> None:
    """Nor does its length, but for those that it leaves more or less."""
    prompts = [continued(4 + number, 5, 50 * number) for number in range(9)]
    before = readings(prompts, [1] * 9, limit, 3)
    after = readings([*prompts[:4], continued(length, 1, 777), *prompts[5:]], [1] * 9, limit, 3)
    assert before[4] != after[4]
    others = [(before[place], after[place]) for place in range(9) if place != 4]
    alike = [one == other for one, other in others if len(one.keep) == len(other.keep)]
    assert all(alike) and len(alike) > 2


@pytest.mark.parametrize(
    "prompts", [[(1, 2, 3), (1, 2, 4, 5), (1, 2)], [(1,), (2,)], [(5, 1, 9), (5, 1, 3), (5, 1, 3, 3)], [(), (1,)]]
)
def test_what_all_prompts_begin_with(prompts: list[tuple[int, ...]]) -> None:
    expected = len(list(itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))))
    assert begun_alike([Continued(prompt, (8, 8), "") for prompt in prompts]) == expected


def test_one_prompt_alone_has_no_template_that_could_be_told() -> None:
    assert begun_alike([continued(3, 2)]) == begun_alike([continued(3, 2)] * 2) == begun_alike([]) == 0


def test_tails_begin_so_many_tokens_before_the_answer_but_not_within_the_template() -> None:
    prompts = [continued(20, 3), continued(10, 3), continued(5, 3)]
    assert tail_firsts(prompts, 9, 4) == (11, 4, 4)
    assert tail_firsts(prompts, 9, 0) == (11, 1, 0)
    assert tail_firsts(prompts, 0, 0) == (20, 10, 5)


def test_a_position_below_zero_is_a_bug() -> None:
    with pytest.raises(ValueError, match="below 0"):
        readings([continued(3, 3)], [-1], 9, 0)

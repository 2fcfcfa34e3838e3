"""Prompts that calibrate a repair, and prompts that judge it: never the same ones.

A set is halved by its categories, so that the judging half has some of which nothing was calibrated.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from safelora_gguf.smoke.prompts import KINDS, Kind, Prompt, PromptSet

_FEWEST_CATEGORIES = 3

_OF_WORDS = "LNM"  # letters, numbers, and marks, which are vowels in many scripts


@dataclass(frozen=True)
class Halves:
    """Two sets without a prompt in common."""

    calibration: PromptSet
    judging: PromptSet


def halved(prompts: PromptSet) -> Halves | None:
    """A set in two; None where one of them would have no harmful prompts, or no harmless ones.

    Of the categories of each kind in sorted order the first of three calibrates, the second judges and so is never
    seen before, and of the third every other prompt does either. Kinds of fewer categories, and prompts without one,
    are dealt prompt by prompt. Prompts of the same words go where the first of them does.
    """
    texts: dict[str, Prompt] = {}
    for prompt in prompts.prompts:
        texts.setdefault(same_words(prompt.prompt), prompt)
    dealt = tuple(texts.values())
    calibrating = frozenset(same_words(one.prompt) for kind in KINDS for one in _calibrating(dealt, kind))
    first = tuple(prompt for prompt in prompts.prompts if same_words(prompt.prompt) in calibrating)
    second = tuple(prompt for prompt in prompts.prompts if same_words(prompt.prompt) not in calibrating)
    found = Halves(
        replace(prompts, version=f"{prompts.version}, calibrating half", prompts=first),
        replace(prompts, version=f"{prompts.version}, judging half", prompts=second),
    )
    return None if missing_kinds(found.calibration) or missing_kinds(found.judging) else found


def missing_kinds(prompts: PromptSet) -> tuple[str, ...]:
    """Which prompts a repair needs and a set lacks: harmful ones to make it refuse, harmless ones to leave alone."""
    counts = prompts.counts
    harmless = counts["borderline"] + counts["benign"] + counts["task"]
    return (*([] if counts["harmful"] else ["harmful"]), *([] if harmless else ["benign"]))


def without_judging(calibration: PromptSet, judging: PromptSet) -> tuple[PromptSet, str | None]:
    """The calibration prompts that don't judge, too, and a note on those that do."""
    taken = {same_words(prompt.prompt) for prompt in judging.prompts}
    left = tuple(prompt for prompt in calibration.prompts if same_words(prompt.prompt) not in taken)
    count = len(calibration.prompts) - len(left)
    if not count:
        return calibration, None
    told = f"{count} prompt{'s' * (count != 1)} of {calibration.name} stand{'s' * (count == 1)} in {judging.name}, too"
    return replace(calibration, prompts=left), f"{told}: what judges calibrates nothing"


def same_words(text: str) -> str:
    """Equal for texts that differ in case, spaces, punctuation and compatible characters alone (Unicode's NFKC); of a
    text without any letter or digit the text itself."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(one for one in folded if unicodedata.category(one)[0] in _OF_WORDS) or folded.strip()


def categories_of(prompts: PromptSet) -> Mapping[str, tuple[str, ...]]:
    """The categories of each kind that is asked, in the order of the prompts."""
    found: dict[str, dict[str, None]] = {}
    for prompt in prompts.prompts:
        names = found.setdefault(prompt.kind, {})
        if prompt.category is not None:
            names[prompt.category] = None
    return {kind: tuple(found[kind]) for kind in KINDS if kind in found}


def unseen_categories(calibration: PromptSet, judging: PromptSet) -> Mapping[str, tuple[str, ...]]:
    """Categories of the judging prompts that nothing is calibrated on, by kind."""
    seen = categories_of(calibration)
    found = {kind: tuple(name for name in names if name not in seen.get(kind, ()))
             for kind, names in categories_of(judging).items()}  # fmt: skip
    return {kind: names for kind, names in found.items() if names}


def _calibrating(prompts: Sequence[Prompt], kind: Kind) -> Iterable[Prompt]:
    """Those of a kind that calibrate."""
    own = [prompt for prompt in prompts if prompt.kind == kind]
    names = sorted({prompt.category for prompt in own if prompt.category is not None})
    if len(names) < _FEWEST_CATEGORIES:
        yield from own[::2]
        return
    for place, name in enumerate(names):
        group = [prompt for prompt in own if prompt.category == name]
        yield from (group, group[:0], group[::2])[place % 3]
    yield from [prompt for prompt in own if prompt.category is None][::2]

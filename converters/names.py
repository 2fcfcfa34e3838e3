"""Module names: which mean the same, what order they have, and many of them in one sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MOST_NUMBERS = 8  # of a name that are compared as such; no model's names have more than three
_WRAPPED = (
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head", "lm_head"),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.visual.", "visual."),
    ("model.audio_tower.", "audio_tower."),
)
_ENCODER = ("vision_tower.vision_model.", "vision_tower.")  # transformers 5 has dropped the level between
_MOST_LETTERS = 100_000  # of a sentence's names; every bias of a model with 126 layers has two thirds of that

_LONGEST = 500
_REST = "... (the rest in the report)"


def canonical(name: str) -> str:
    """A tensor or module name without the wrapping that models of text and images put around their halves."""
    for wrapped, plain in _WRAPPED:
        if name.startswith(wrapped):
            name = plain + name[len(wrapped) :]
            break
    return _ENCODER[1] + name[len(_ENCODER[0]) :] if name.startswith(_ENCODER[0]) else name


def named(names: Sequence[str]) -> str:
    """All names, one after the other; of more than any model has, the first and how many more there are."""
    letters = 0
    for place, name in enumerate(names):
        letters += len(name)
        if letters > _MOST_LETTERS and place:
            return f"{', '.join(names[:place])} and {len(names) - place} more"
    return ", ".join(names)


def first_few(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, and how many there are besides."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def shortened(sentence: str) -> str:
    """A sentence as it may stand on a terminal: cut off visibly where it has the names of hundreds of tensors."""
    return sentence if len(sentence) <= _LONGEST else sentence[: _LONGEST - len(_REST)] + _REST


def natural_order(name: str) -> tuple[int | str, ...]:
    """A sort key under which layer 10 follows layer 9."""
    parts = re.split(r"([0-9]{1,18})", name, maxsplit=_MOST_NUMBERS)  # every second part is a number
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts))

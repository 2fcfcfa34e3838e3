"""Module names that mean the same."""

from __future__ import annotations

import re

_MOST_NUMBERS = 8  # of a name that are compared as such; no model's names have more than three
_WRAPPED = (
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head", "lm_head"),
)


def canonical(name: str) -> str:
    """A tensor or module name without the wrapping that models of text and images put around their text half."""
    for wrapped, plain in _WRAPPED:
        if name.startswith(wrapped):
            return plain + name[len(wrapped) :]
    return name


def natural_order(name: str) -> tuple[int | str, ...]:
    """A sort key under which layer 10 follows layer 9."""
    parts = re.split(r"([0-9]{1,18})", name, maxsplit=_MOST_NUMBERS)  # every second part is a number
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts))

"""What is done with the logits of one sequence: continue it greedily, or hold it against what was recorded.

Greedy decoding needs the largest logit alone, the lowest id among equals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from safelora_gguf.smoke.llama.distributions import Distributions, Record, Recorded, divergences
from safelora_gguf.smoke.llama.errors import PromptError
from safelora_gguf.smoke.protocol import Divergence, Reading, Stop

Look = Callable[[Any, int], None]
"""Sees a row of logits (n_vocab,), valid during the call, and its index, 0 for the first answer token's."""


@dataclass(frozen=True)
class Prompt:
    """A rendered chat: its tokens, and the tag of the reasoning block that it ends in."""

    tokens: Sequence[int]
    opened: str = ""


class Continuation:
    """Greedy continuation of a prompt.

    Args:
        most: tokens to generate; 0: the first token's distribution is looked at, nothing follows.
        ends: whether a token ends an answer.
        look: called with each row of logits.

    Attributes:
        generated: the tokens of the answer, without the one that ended it.
        chosen: the same with it.
        stop: why it ended; `error`: why there is none.
    """

    def __init__(self, key: int, prompt: Prompt, most: int, ends: Callable[[int], bool], look: Look) -> None:
        self.key = key
        self.prompt = prompt
        self.tokens = prompt.tokens
        self.shareable = len(prompt.tokens) - 1
        self.growth = most
        self.generated: list[int] = []
        self.chosen: list[int] = []
        self.stop: Stop = "length"
        self.error: str | None = None
        self._ends = ends
        self._look = look

    @classmethod
    def impossible(cls, key: int, error: PromptError) -> Continuation:
        """One that is not to be decoded."""
        reader = cls(key, Prompt(()), 0, lambda _token: True, lambda _logits, _index: None)
        reader.fail(error)
        return reader

    def wants(self, index: int) -> bool:
        return index >= self.shareable

    def take(self, logits: Any) -> int | None:
        token = likeliest_of(logits)
        self._look(logits, len(self.generated))
        if self.growth == 0:
            return None
        self.chosen.append(token)
        if self._ends(token):
            self.stop = "end"
            return None
        self.generated.append(token)
        return token if len(self.generated) < self.growth else None

    def cut(self) -> None:
        self.stop = "time"

    def fail(self, error: PromptError) -> None:
        self.error = str(error)


class Rereading:
    """A recorded item, read again: how far the distributions are from the recorded ones."""

    growth = 0

    def __init__(self, item: Recorded, record: Record, seconds: float) -> None:
        self.key = item.key
        self.tokens = (*item.prompt, *item.tokens[:-1])
        self.shareable = len(item.prompt) - 1
        self.error: str | None = None
        self._item = item
        self._record = record
        self._seconds = seconds
        self._reference: Distributions | None = None
        self._kl: list[float] = []
        self._same = 0

    def wants(self, index: int) -> bool:
        return index >= self.shareable

    def take(self, logits: Any) -> int | None:
        at = len(self._kl)
        self._same += likeliest_of(logits) == self._item.tokens[at]
        reference = self._reference = self._reference or self._record.distributions(self._item)
        row = Distributions(reference.ids[at : at + 1], reference.log_probs[at : at + 1], reference.rest[at : at + 1])
        self._kl.append(float(divergences(row, logits[None])[0]))
        if at + 1 == len(self._item.tokens):
            self._reference = None  # others need the memory
        return None

    def cut(self) -> None:
        self.error = f"reading it took more than {self._seconds:g} s"

    def fail(self, error: PromptError) -> None:
        self.error = str(error)

    def divergence(self) -> Divergence | None:
        """None, with `error` set, where there is none."""
        if self.error is None and not np.isfinite(self._kl).all():
            self.error = "the divergence is infinite: the model rules out a token that was possible"
        if self.error is not None:
            return None
        return Divergence(float(np.mean(self._kl)), self._same / len(self._kl), len(self._kl))


class Captured:
    """Tokens that are read for what llama.cpp computes with them; what follows the last kept one is not read.

    Attributes:
        error: why they could not be.
        late: because of its time limit, for which nothing that was read beside it is to blame.
    """

    growth = 0

    def __init__(self, reading: Reading, seconds: float) -> None:
        self.tokens = reading.tokens[: reading.keep[-1] + 1] if reading.keep else ()
        self.shareable = len(self.tokens) - 1
        self.error: str | None = None
        self.late = False
        self._kept = frozenset(reading.keep)
        self._seconds = seconds

    def wants(self, index: int) -> bool:
        return index in self._kept

    def take(self, logits: Any) -> int | None:
        return None

    def cut(self) -> None:
        self.late = True
        self.error = f"reading it took more than {self._seconds:g} s"

    def fail(self, error: PromptError) -> None:
        self.error = str(error)


def likeliest_of(logits: Any) -> int:
    """
    Raises:
        PromptError: the logits hold NaN.
    """
    token = int(logits.argmax())
    if np.isnan(logits[token]):  # argmax stops at the first NaN
        raise PromptError("llama.cpp computed logits that are not numbers (NaN)")
    return token

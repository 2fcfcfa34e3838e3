"""What goes through a decoder: sequences that are read, and who looks on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from safelora_gguf.smoke.llama.errors import PromptError


class Reader(Protocol):
    """One sequence to be decoded: `tokens`, the first `shareable` of which may be read once for all that begin with
    them, and at most `growth` tokens that it may add."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def shareable(self) -> int: ...
    @property
    def growth(self) -> int: ...

    def wants(self, index: int) -> bool:
        """Whether logits are wanted after a token. After the last one they are."""

    def take(self, logits: Any) -> int | None:
        """Logits (n_vocab,) after the next wanted token that is not shared, valid during the call; after the last of
        all, the token to go on with, None to end. May raise PromptError, which ends it, too."""

    def cut(self) -> None:
        """The time limit ended it."""

    def fail(self, error: PromptError) -> None:
        """It can't be decoded."""


@dataclass(frozen=True)
class Span:
    """Tokens `first` to `last` (excluded) of a reader, or of all of them where they are read once for all; `readers`
    are indices."""

    readers: Sequence[int]
    first: int
    last: int


class Observer(Protocol):
    """Sees what llama.cpp computes.

    Attributes:
        callback: llama.cpp's cb_eval, None for none.
        parallel: most sequences that it lets be decoded together; None: as many as the options say.
    """

    @property
    def callback(self) -> Any: ...
    @property
    def parallel(self) -> int | None: ...

    def reading(self, tokens: Sequence[int], spans: Sequence[Span]) -> None:
        """Before each decode: the batch, which the spans make up in their order."""

    def read(self, *, done: bool) -> None:
        """After it; not `done`: llama.cpp could not decode. May raise EngineError."""

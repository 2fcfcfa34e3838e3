"""How far a repair is, in prompts; how many there will be is an estimate until it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Progress = Callable[[int, int, str], None]
"""Called with prompts done, prompts in all as far as is known, and what is being done."""


@dataclass
class Meter:
    """Counts prompts over all measurements; reading inputs and solving are told without being counted.

    Attributes:
        expected: prompts in all, as far as is known; raised where there turn out to be more.
    """

    progress: Progress | None
    expected: int = 0
    _done: int = 0

    @contextlib.contextmanager
    def step(self, label: str, size: int) -> Iterator[Callable[[int], None]]:
        """One measurement of `size` prompts; gives what is to be told how many of them are done."""

        def tell(done: int) -> None:
            self._report(self._done + min(done, size), label)

        tell(0)
        yield tell
        self._done += size
        self._report(self._done, label)

    def tell(self, done: int, total: int, label: str) -> None:
        """Of work that is counted by itself."""
        self._report(self._done, f"{label} ({done} of {total})")

    def finish(self) -> None:
        """There is nothing more to come."""
        self.expected = self._done
        self._report(self._done, "")

    def _report(self, done: int, label: str) -> None:
        self.expected = max(self.expected, done)
        if self.progress is not None:
            self.progress(done, self.expected, label)

"""How far a search is, in prompts; how many there will be is an estimate until it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Progress = Callable[[int, int, str], None]
"""Called with prompts done, prompts in all as far as is known, and what is being measured."""


@dataclass
class Meter:
    """Counts prompts over many measurements.

    Attributes:
        full, coarse: prompts of one measurement.
        texts: measurements with text that are planned at most; told with each of them.
        expected: prompts in all, as far as is known; raised where there turn out to be more.
    """

    progress: Progress | None
    full: int
    coarse: int
    expected: int = 0
    texts: int = 0
    _done: int = 0
    _texts: int = 0

    @contextlib.contextmanager
    def step(self, label: str, *, coarse: bool = False, prompts: int | None = None) -> Iterator[Callable[[int], None]]:
        """One measurement; gives what is to be told the number of its prompts that are done.

        Args:
            prompts: how many, where it is none of the measurements that are counted.
        """
        size = prompts if prompts is not None else self.coarse if coarse else self.full
        if not coarse and prompts is None and self.texts:
            self._texts += 1
            label = f"{label} ({self._texts} of at most {max(self.texts, self._texts)})"

        def tell(done: int) -> None:
            self._report(self._done + min(done, size), label)

        tell(0)
        yield tell
        self._done += size
        self._report(self._done, label)

    def say(self, label: str) -> None:
        """Something is done that is no measurement."""
        self._report(self._done, label)

    def finish(self) -> None:
        """There is nothing more to come."""
        self.expected = self._done
        self._report(self._done, "")

    def _report(self, done: int, label: str) -> None:
        self.expected = max(self.expected, done)
        if self.progress is not None:
            self.progress(done, self.expected, label)

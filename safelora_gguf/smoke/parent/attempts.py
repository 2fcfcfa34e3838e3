"""Asking a child that may die of it: what came is kept, and what is left is asked of the next one.

A child that is lost while it works on several prompts is started again and asked for the rest one at a time, since
nobody can tell which of them it died of. A prompt that is at work alone when that happens is told as its own failure.
After `MOST_LOSSES` the rest of a request stays unasked, and after `MOST_HANGS`: a crash costs a moment, but a child
that hangs costs its whole time limit, so that a model which always hangs costs two of them for each request and not one
for each prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TypeVar

from converters.errors import Error, MissingLlamaError
from safelora_gguf.smoke.parent.loaded_model import LoadedModel
from safelora_gguf.smoke.parent.process import LlamaProcess
from safelora_gguf.smoke.protocol import AdapterChoice, Chat

MOST_LOSSES = 3
"""Children that one request may cost."""

MOST_HANGS = 2
"""Of these, children that hung."""

Tell = Callable[[int], None]
"""Called with the number of items done so far, whenever there is one more."""

T = TypeVar("T")
Items = Generator[tuple[int, T], None, None]


class Attempts:
    """All that a session tries with its model.

    Attributes:
        failure: the first thing that went wrong, whatever was asked.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.failure: Error | None = None
        self._model = model

    def each(
        self,
        adapters: Sequence[AdapterChoice],
        chats: Sequence[Chat],
        stream: Callable[[LlamaProcess, Mapping[int, Chat]], Items[T]],
        blamed: Callable[[str], T],
        tell: Tell | None,
    ) -> tuple[tuple[T | None, ...], Error | None]:
        """For what can be asked in parts: an item for each chat, None where it was not asked; and the first loss.

        Args:
            blamed: stands for a chat that was at work alone, given what happened.
        """
        found: dict[int, T] = {}
        losses: list[Error] = []
        hangs = 0
        while len(found) < len(chats) and len(losses) < MOST_LOSSES and hangs < MOST_HANGS:
            unanswered = [key for key in range(len(chats)) if key not in found]
            batch = {key: chats[key] for key in (unanswered[:1] if losses else unanswered)}

            def begin(process: LlamaProcess, batch: Mapping[int, Chat] = batch) -> Items[T]:
                return stream(process, batch)

            error = self._attempt(adapters, begin, found, tell)
            if error is None:
                continue
            losses.append(error)
            hangs += self._model.hung
            if not self._model.lost_at_work(adapters):
                break
            if len(losses) > 1:  # one was at work alone
                found[min(batch)] = blamed(error.message)
                if tell is not None:
                    tell(len(found))
        return tuple(found.get(key) for key in range(len(chats))), next(iter(losses), None)

    def twice(
        self,
        adapters: Sequence[AdapterChoice],
        stream: Callable[[LlamaProcess], Items[T]],
        found: dict[int, T],
        tell: Tell | None,
    ) -> tuple[Error | None, Error | None]:
        """For what can't be asked in parts: once more after a loss. The first error and the last attempt's."""
        first = self._attempt(adapters, stream, found, tell)
        if first is None or not self._model.lost_at_work(adapters):
            return first, first
        return first, self._attempt(adapters, stream, found, tell)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Keeps what llama.cpp does as `failure`."""
        try:
            yield
        except MissingLlamaError:
            raise
        except Error as error:
            self.failure = self.failure or error

    def _attempt(
        self,
        adapters: Sequence[AdapterChoice],
        stream: Callable[[LlamaProcess], Items[T]],
        found: dict[int, T],
        tell: Tell | None,
    ) -> Error | None:
        """Collects what comes; the error that ended it early."""
        try:
            with contextlib.closing(stream(self._model.ready(adapters))) as items:
                for key, value in items:
                    known = len(found)
                    found[key] = value
                    if tell is not None and len(found) > known:
                        tell(len(found))
        except MissingLlamaError:
            raise
        except Error as error:
            self.failure = self.failure or error
            return error
        return None

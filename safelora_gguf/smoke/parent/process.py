"""What a llama.cpp child can be asked, and how its replies are read. `session` starts the next one where one died."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from converters import llama_child
from safelora_gguf.smoke.parent import replies
from safelora_gguf.smoke.parent.replies import Loaded, NonsenseError
from safelora_gguf.smoke.parent.wire import Patience, Wire
from safelora_gguf.smoke.protocol import (
    AdapterChoice,
    Answer,
    Chat,
    Continued,
    Divergence,
    InputGroup,
    InputShape,
    ModelOptions,
    Reading,
)

CHILD_COMMAND = llama_child.command_for("safelora_gguf.smoke.llama.child")

T = TypeVar("T")


class LlamaProcess:
    """One child. After an error with `alive` False it is gone: start another one.

    Every method raises LlamaError when the child crashes, hangs or talks nonsense (it is killed then), and when
    llama.cpp rejects a file (it lives on); UnsupportedError for a model that can't be asked; MissingLlamaError. The
    iterators yield each item as it is finished, in any order, and kill the child when they are closed early.
    """

    def __init__(self, command: Sequence[str] = CHILD_COMMAND) -> None:
        self._wire = Wire(command)
        self._model: str | None = None
        self._loaded = Loaded(0, "", 0)

    @property
    def alive(self) -> bool:
        return self._wire.alive

    @property
    def hung(self) -> bool:
        """It was stopped because it hung."""
        return self._wire.hung

    @property
    def killed(self) -> bool:
        """It was ended from outside while it was asked."""
        return self._wire.killed

    @property
    def pid(self) -> int:
        return self._wire.pid

    def load(self, options: ModelOptions, timeout: float) -> Loaded:
        self._wire.file = self._model = options.model
        request = {"do": "load", **asdict(options)}
        self._loaded = self._result(request, "loading the model", timeout, replies.loaded_in)
        return self._loaded

    def set_adapters(self, adapters: Sequence[AdapterChoice], timeout: float) -> None:
        """These adapters and no others; none: the model alone."""
        self._wire.file = adapters[-1].path if adapters else self._model
        request = {"do": "adapters", "adapters": [asdict(adapter) for adapter in adapters]}
        doing = "loading the adapter" if adapters else "removing the adapter"
        self._result(request, doing, timeout, replies.numbers_in)

    def pieces(self, timeout: float) -> tuple[str, ...]:
        """The text of every token."""
        n_vocab = self._loaded.n_vocab
        request = {"do": "pieces"}
        return self._result(request, "telling its vocabulary", timeout, lambda told: replies.pieces_in(told, n_vocab))

    def answers(
        self, chats: Mapping[int, Chat], *, max_tokens: int, top: int, refusal: Sequence[int], patience: Patience
    ) -> Generator[tuple[int, Answer]]:
        """An answer under each key of `chats`; see `protocol` for the numbers."""
        n_vocab = self._loaded.n_vocab
        request = {
            "do": "answer", "items": _items(chats), "max_tokens": max_tokens, "top": top, "refusal": list(refusal)
        }  # fmt: skip
        doing = "answering a prompt" if len(chats) == 1 else "answering prompts"
        reader = _ItemReader(
            chats, lambda _, item: replies.answer_in(item, n_vocab, top), _counts("items"), complete=True
        )
        return self._items(request, doing, patience, reader)

    def continuations(
        self, chats: Mapping[int, Chat], *, max_tokens: int, patience: Patience
    ) -> Generator[tuple[int, Continued]]:
        """The tokens of each chat and of its answer."""
        loaded = self._loaded
        request = {"do": "continue", "items": _items(chats), "max_tokens": max_tokens}
        doing = "continuing a prompt" if len(chats) == 1 else "continuing prompts"
        reader = _ItemReader(
            chats,
            lambda _, item: replies.continued_in(item, loaded.n_vocab, loaded.n_ctx, max_tokens),
            _counts("items"),
            complete=True,
        )
        return self._items(request, doing, patience, reader)

    def record(
        self, chats: Mapping[int, Chat], *, max_tokens: int, file: Path, patience: Patience
    ) -> Generator[tuple[int, int]]:
        """Continues each chat and writes the distributions at its positions into `file`; how many, or 0."""
        longest = self._loaded.n_ctx
        request = {"do": "record", "items": _items(chats), "max_tokens": max_tokens, "file": str(file)}
        reader = _ItemReader(
            chats, lambda _, item: replies.recorded_in(item, longest), _counts("positions", "bytes"), complete=True
        )
        return self._items(request, "recording answers", patience, reader)

    def divergences(
        self, file: Path, keys: Collection[int], patience: Patience
    ) -> Generator[tuple[int, Divergence | None]]:
        """How far this model with these adapters is from what `file` holds, None where that can't be told; nothing of
        items that could not be recorded."""
        reader = _ItemReader(keys, lambda _, item: replies.divergence_in(item), _counts(), complete=False)
        request = {"do": "diverge", "file": str(file)}
        return self._items(request, "reading recorded answers", patience, reader)

    def capture(
        self,
        readings: Mapping[int, Reading],
        weights: Mapping[str, InputShape],
        *,
        file: Path,
        patience: Patience,
        finish: Callable[[tuple[InputGroup, ...], tuple[str, ...]], None],
    ) -> Generator[tuple[int, str | None]]:
        """Reads tokens and writes the inputs of weights at the kept positions into `file`; why a reading's could not be
        captured, None where they were.

        Args:
            finish: called with where the inputs stand in `file`, and with notes, before the iterator ends.

        Raises:
            ValueError: a token is none of the vocabulary.
        """
        if max((max(one.tokens, default=0) for one in readings.values()), default=0) >= self._loaded.n_vocab:
            raise ValueError(f"tokens that the vocabulary of {self._loaded.n_vocab} has not")
        items = [{"key": key, "tokens": one.tokens, "keep": one.keep} for key, one in readings.items()]
        request = {"do": "capture", "items": items, "weights": list(weights), "file": str(file)}
        errors: dict[int, str | None] = {}

        def read(key: int, item: Mapping[str, Any]) -> str | None:
            errors[key] = replies.captured_in(item, len(readings[key].keep))
            return errors[key]

        def last(told: object) -> None:
            rows = [errors[key] is None for key, one in readings.items() for _ in one.keep]
            finish(*replies.groups_in(told, weights, file, rows))

        reader = _ItemReader(readings, read, last, complete=True)
        return self._items(request, "capturing inputs", patience, reader)

    def close(self) -> None:
        """Kill it: it holds nothing worth an orderly end."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _result(self, request: Mapping[str, Any], doing: str, timeout: float, read: Callable[[object], T]) -> T:
        replied = self._wire.exchange(
            request, doing, Patience.altogether(timeout), lambda reply: read(replies.result_in(reply))
        )
        (result,) = replied
        return result

    def _items(
        self, request: Mapping[str, Any], doing: str, patience: Patience, reader: _ItemReader[T]
    ) -> Generator[tuple[int, T]]:
        with contextlib.closing(self._wire.exchange(request, doing, patience, reader)) as replied:
            for item in replied:
                if item is not None:
                    yield item


class _ItemReader(Generic[T]):
    """Replies item by item, each key once; None for the last reply.

    Args:
        read: an item by its key and what was said of it.
        last: reads the last reply.
        complete: every item has to come.
    """

    def __init__(
        self,
        keys: Iterable[int],
        read: Callable[[int, Mapping[str, Any]], T],
        last: Callable[[object], object],
        *,
        complete: bool,
    ) -> None:
        self._missing = set(keys)
        self._read = read
        self._last = last
        self._complete = complete

    def __call__(self, reply: Mapping[str, Any]) -> tuple[int, T] | None:
        if "ok" in reply:
            if self._complete and self._missing:
                raise NonsenseError(f"{len(self._missing)} items never came")
            self._last(replies.result_in(reply))
            return None
        key = replies.key_in(reply.get("item"), self._missing)
        value = self._read(key, {name: told for name, told in reply.items() if name != "item"})
        self._missing.remove(key)
        return key, value


def _items(chats: Mapping[int, Chat]) -> list[dict[str, Any]]:
    return [{"key": key, "messages": list(chat)} for key, chat in chats.items()]


def _counts(*names: str) -> Callable[[object], object]:
    """Reads a last reply that holds these numbers."""
    return lambda told: replies.numbers_in(told, *names)

"""A generator's work done ahead of its consumer, in a thread: while one piece is written, the next is being made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_END: Any = object()


def ahead(pieces: Iterator[T], depth: int, step: Callable[[Iterator[T], T], T] = next) -> Generator[T, None, None]:
    """The same pieces in the same order, up to `depth` of them made before they are asked for.

    What making one raises is raised here, in its place. The thread has ended when the iterator has, by whatever
    exception, or is closed.

    Args:
        step: takes the next piece, or the default that it is given: where the thread needs a context around that.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as executor:
        waiting = deque[Future[T]]()
        try:
            for _ in range(depth):
                waiting.append(executor.submit(step, pieces, _END))
            while (piece := waiting.popleft().result()) is not _END:
                waiting.append(executor.submit(step, pieces, _END))
                yield piece
                del piece  # or two would be held while the next is waited for
        finally:
            executor.shutdown(cancel_futures=True)


def in_mode() -> Callable[[Iterator[T], T], T]:
    """A step in the caller's inference mode, which torch keeps for each thread: tensors belong to theirs."""
    import torch

    mode = torch.is_inference_mode_enabled()

    def step(pieces: Iterator[T], end: T) -> T:
        with torch.inference_mode(mode):
            return next(pieces, end)

    return step

"""Many token sequences through one llama.cpp context at a time.

    what all of them begin with   is decoded once and its memory lent to each (llama_memory_seq_cp of a whole sequence,
                                  which recurrent, hybrid and sliding-window models allow, too)
    one decode                    the next token of each sequence that is being continued, and as much as fits of
                                  those still being read; llama.cpp works out logits only where a reader wants them
    a sequence is let in          when a slot is free and the cells for all it can grow to are, in the order given

So what shares a decode depends on lengths alone, not on the clock, except where a time limit cuts. Nothing is kept
from one `run` to the next: the memory is cleared first.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from converters.llama_log import LlamaLog
from safelora_gguf.smoke.llama.batch import Batch
from safelora_gguf.smoke.llama.context import BATCH, new_context, wanted_room
from safelora_gguf.smoke.llama.errors import EngineError, PromptError
from safelora_gguf.smoke.llama.sequences import Observer, Reader, Span
from safelora_gguf.smoke.protocol import ModelOptions

_LEAST_ROWS = 64
"""At most so many logits rows a decode: 64 of 150,000 tokens are 38 MB."""
_OBSERVED_LOGITS = 64 << 20
"""Bytes of logits a decode where many rows are wanted, of which nothing is read."""


@dataclass(eq=False)
class _Slot:
    """A reader at work: `tokens[:read]` are in the memory of sequence `number`, which may need `cells` of its own."""

    index: int
    reader: Reader
    number: int
    read: int
    cells: int
    tokens: list[int]
    since: float

    @property
    def left(self) -> int:
        return len(self.tokens) - self.read


class Decoder:
    """A context of its own on a loaded model (see `context` for its size).

    Args:
        observer: sees each decode; with one, as many rows of logits are computed at once as memory allows.
        lengths: of the sequences that will be read, where that is known: the context is no larger than they need.

    Raises:
        EngineError: rejected: llama.cpp makes none; unsupported: the model is none that generates token by token.

    Attributes:
        context: llama.cpp's.
        limit: most tokens of one sequence.
        decoded: tokens decoded so far.
        notes: sentences for the report.
    """

    def __init__(
        self, model: Any, options: ModelOptions, log: LlamaLog, observer: Observer | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self._log = log
        self._seconds = options.prompt_seconds
        self._observer = observer
        self.decoded = 0
        self._n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        rows, most, callback = _LEAST_ROWS, None, None
        if observer is not None:
            rows = min(max(rows, _OBSERVED_LOGITS // (4 * self._n_vocab)), BATCH)
            most, callback = observer.parallel, observer.callback
        wanted = wanted_room(model, options, rows=rows, most=most, lengths=lengths)
        made = new_context(model, options, wanted, log, callback)
        room = made.room
        self.context, self.notes = made.pointer, made.notes
        self.limit, self._parallel, self._cells = room.limit, room.parallel, room.cells
        self._memory = lib.llama_get_memory(self.context)
        if not self._memory:  # such as a diffusion model's
            raise EngineError("unsupported", "the model does not read a text token by token; smoke can't chat with it")
        self._batch = Batch(room.batch)
        self._rows = min(room.rows, self._batch.room)

    def close(self) -> None:
        """Frees the context, with which nothing can be done any more."""
        lib.llama_free(self.context)

    def set_adapters(self, adapters: Sequence[tuple[Any, float]]) -> None:
        """These adapters, llama.cpp's pointers with their scales, and no others; what was read is forgotten.

        Raises:
            EngineError: rejected: llama.cpp does not take one of them.
        """
        lib.llama_set_adapters_lora(self.context, None, 0, None)
        self.forget()
        if adapters:
            pointers = (lib.llama_adapter_lora_p_ctypes * len(adapters))(*(pointer for pointer, _ in adapters))
            scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
            if lib.llama_set_adapters_lora(self.context, pointers, len(adapters), scales) != 0:
                raise EngineError("rejected", self._log.reason("llama.cpp could not apply the adapter"))

    def forget(self) -> None:
        """Empties the memory of every sequence."""
        lib.llama_memory_clear(self._memory, True)

    def warm_up(self, token: int) -> None:
        """Reads the mapped weights now, within the time limit for loading, and not within the first prompt's.

        Raises:
            EngineError: rejected: llama.cpp can't decode.
        """
        self._log.clear()
        self._batch.clear()
        self._batch.add(token, 0, 0, wanted=True)
        status = self._decode(())
        if status != 0:
            raise EngineError("rejected", self._log.reason(f"llama_decode returned {status}"))
        self.forget()

    def run(self, readers: Sequence[Reader], tell: Callable[[], None]) -> Iterator[int]:
        """The index of each reader when it has ended.

        Args:
            readers: none longer, with its growth, than `limit`.
            tell: called before each decode.
        """
        self._log.clear()
        self.forget()
        waiting = deque(enumerate(readers))
        shared = self._read_shared(readers, tell)
        free = list(range(self._parallel, 0, -1))
        slots: list[_Slot] = []
        while waiting or slots:
            self._admit(waiting, slots, free, shared)
            tell()
            for slot in self._step(slots):
                slots.remove(slot)
                free.append(slot.number)
                lib.llama_memory_seq_rm(self._memory, slot.number, -1, -1)
                yield slot.index

    def _read_shared(self, readers: Sequence[Reader], tell: Callable[[], None]) -> int:
        """Decodes what all readers begin with into sequence 0; its length."""
        shared = _common_beginning(readers) if len(readers) > 1 else 0
        start = 0
        while start < shared:
            tell()
            self._batch.clear()
            stop = self._fill_shared(readers, start, shared)
            if self._decode([Span(range(len(readers)), start, stop)]) != 0:  # let the readers find out for themselves
                self.forget()
                return 0
            start = stop
        return shared

    def _fill_shared(self, readers: Sequence[Reader], start: int, stop: int) -> int:
        """The batch from token `start` on of what all begin with; where the next one goes on."""
        rows = 0
        for index in range(start, stop):
            wanted = any(reader.wants(index) for reader in readers)
            if self._batch.full or (wanted and rows == self._rows):
                return index
            self._batch.add(readers[0].tokens[index], index, 0, wanted=wanted)
            rows += wanted
        return stop

    def _admit(self, waiting: deque[tuple[int, Reader]], slots: list[_Slot], free: list[int], shared: int) -> None:
        used = shared + sum(slot.cells for slot in slots)
        while waiting and free:
            index, reader = waiting[0]
            cells = len(reader.tokens) + reader.growth - shared
            if slots and used + cells > self._cells:
                return
            number = free.pop()
            if shared:
                lib.llama_memory_seq_cp(self._memory, 0, number, -1, -1)
            slots.append(_Slot(index, reader, number, shared, cells, list(reader.tokens), time.monotonic()))
            waiting.popleft()
            used += cells

    def _step(self, slots: Sequence[_Slot]) -> list[_Slot]:
        """One decode; the slots that ended with it."""
        asked, spans = self._fill(slots)
        status = self._decode(spans)
        if status != 0:
            failure = PromptError(self._log.reason(f"llama_decode returned {status}"))
            for slot in slots:
                slot.reader.fail(failure)
            self._log.clear()
            return list(slots)
        rows = self._logits(len(asked))
        ended: list[_Slot] = []
        for (slot, last), row in zip(asked, rows, strict=True):
            if slot not in ended and not _went_on(slot, row, last):
                ended.append(slot)
        now = time.monotonic()
        for slot in slots:
            if slot not in ended and now - slot.since > self._seconds:
                slot.reader.cut()
                ended.append(slot)
        return ended

    def _fill(self, slots: Sequence[_Slot]) -> tuple[list[tuple[_Slot, bool]], list[Span]]:
        """The batch, those that wait for one token first. Of each row of logits: whose it is, and whether it follows
        the last token; and what the batch is made of."""
        self._batch.clear()
        asked: list[tuple[_Slot, bool]] = []
        spans: list[Span] = []
        for slot in sorted(slots, key=lambda slot: slot.left > 1):
            first = slot.read
            for index in range(first, len(slot.tokens)):
                wanted = slot.reader.wants(index)
                if self._batch.full or (wanted and len(asked) == self._rows):
                    break
                self._batch.add(slot.tokens[index], index, slot.number, wanted=wanted)
                slot.read += 1
                if wanted:
                    asked.append((slot, index == len(slot.tokens) - 1))
            if slot.read > first:
                spans.append(Span((slot.index,), first, slot.read))
        return asked, spans

    def _decode(self, spans: Sequence[Span]) -> int:
        self.decoded += self._batch.count
        if self._observer is not None:
            self._observer.reading(self._batch.tokens, spans)
        status = int(lib.llama_decode(self.context, self._batch.native()))
        if self._observer is not None:
            self._observer.read(done=status == 0)
        return status

    def _logits(self, count: int) -> Any:
        """The rows that the last decode was asked for, (count, n_vocab), in llama.cpp's own memory."""
        if count == 0:
            return np.empty((0, self._n_vocab), np.float32)
        pointer = lib.llama_get_logits(self.context)
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        if address is None:
            raise EngineError("rejected", "llama.cpp gave no logits")
        rows = (ctypes.c_float * (count * self._n_vocab)).from_address(address)
        return np.ctypeslib.as_array(rows).reshape(count, self._n_vocab)


def _went_on(slot: _Slot, logits: Any, last: bool) -> bool:
    try:
        token = slot.reader.take(logits)
    except PromptError as error:
        slot.reader.fail(error)
        return False
    if last and token is not None:
        slot.tokens.append(token)
    return token is not None or not last


def _common_beginning(readers: Sequence[Reader]) -> int:
    """How many tokens all readers begin with, and may share."""
    first = readers[0].tokens
    shared = min(reader.shareable for reader in readers)
    for reader in readers[1:]:
        tokens = reader.tokens
        shared = next((index for index in range(shared) if tokens[index] != first[index]), shared)
    return shared

"""A llama.cpp context on a loaded model: how many tokens and sequences it has room for, and with what parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import llama_cpp.llama_cpp as lib

from converters.llama_log import LlamaLog
from safelora_gguf.smoke.llama.errors import EngineError
from safelora_gguf.smoke.protocol import ModelOptions

DEFAULT_CTX = 4096
BATCH = 256
_LEAST_CTX = 512
_BESIDE = 2  # batches of other sequences that have room beside the longest
_MOST_SEQUENCES = 255
"""llama.cpp's own bound (LLAMA_MAX_SEQ), less the shared beginning."""


@dataclass(frozen=True)
class Room:
    """What a context holds.

    Args:
        limit: most tokens of one sequence.
        cells: tokens whose keys and values are kept.
        parallel: sequences, beside the one for what all begin with.
        rows: most rows of logits a decode.
        least: cells of the smallest context that will do.
        longest: of the sequences that will be read; 0: not known.
    """

    limit: int
    cells: int
    parallel: int
    rows: int
    least: int
    longest: int = 0

    @property
    def batch(self) -> int:
        """Most tokens of a decode."""
        return min(self.cells, BATCH)

    def smaller(self) -> Room:
        """About half of it, but as long as can be with room for the longest sequence; the least has no smaller one."""
        least = self.longest if self.cells > self.longest > 0 else self.least
        cells = max(least, self.cells // 2)
        return replace(self, limit=min(self.limit, cells), cells=cells, parallel=max(1, self.parallel // 2))


@dataclass(frozen=True)
class Context:
    """llama.cpp's, and what it turned out to have room for."""

    pointer: Any
    room: Room
    notes: tuple[str, ...]


def wanted_room(
    model: Any, options: ModelOptions, *, rows: int, most: int | None = None, lengths: Sequence[int] | None = None
) -> Room:
    """Cells as many as the longest sequence may have, at least 4096, but no more than all sequences together could
    fill: the memory that one prompt of the full context would take; prompts that don't fit together wait.

    Args:
        rows: rows of logits a decode, at least one for each sequence.
        most: sequences at a time, where they must not be as many as the options say.
        lengths: of all sequences that will be read, where that is known: then no more cells than the longest that fits
            needs with so many others beside it that batches are full.
    """
    trained = lib.llama_model_n_ctx_train(model)
    limit = options.ctx or min(trained if trained > 0 else DEFAULT_CTX, DEFAULT_CTX)
    parallel = max(1, min(options.parallel, most or _MOST_SEQUENCES, _MOST_SEQUENCES))
    cells, least = max(limit, min(parallel * limit, DEFAULT_CTX)), options.ctx or min(limit, _LEAST_CTX)
    if lengths is None:
        return Room(limit, cells, parallel, max(rows, parallel), least)
    fit = [length for length in lengths if length <= limit] or [1]
    longest = max(fit)
    cells, parallel = min(cells, sum(fit), longest + _BESIDE * BATCH), min(parallel, len(fit))
    return Room(limit, max(cells, 1), parallel, max(rows, parallel), min(longest, least), max(longest, 1))


def new_context(model: Any, options: ModelOptions, wanted: Room, log: LlamaLog, callback: Any = None) -> Context:
    """Where llama.cpp can't make such a context, half of it for half as many sequences, down to the least.

    Args:
        callback: llama.cpp's cb_eval, which must live as long as the context.

    Raises:
        EngineError: rejected: llama.cpp makes none.
    """
    room = wanted
    while True:
        log.clear()
        pointer = lib.llama_init_from_model(model, _parameters(options, room, callback))
        if pointer:
            break
        if room.parallel == 1 and room.cells <= room.least:
            told = f"llama.cpp could not make a context of {room.cells} tokens"
            raise EngineError("rejected", log.reason(told))
        room = room.smaller()
    return Context(pointer, room, _notes(wanted, room))


def _notes(wanted: Room, room: Room) -> tuple[str, ...]:
    if (room.cells, room.parallel) == (wanted.cells, wanted.parallel):
        return ()
    return (
        f"llama.cpp could not make a context of {wanted.cells} tokens for {wanted.parallel} prompts at a time; "
        f"it works with {room.cells} for {room.parallel}",
    )


def _parameters(options: ModelOptions, room: Room, callback: Any) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = room.cells
    params.n_batch = params.n_ubatch = room.batch
    params.n_seq_max = room.parallel + 1
    params.kv_unified = True
    if options.gpu_layers == 0 and room.cells <= DEFAULT_CTX:
        # On the CPU it sums in half precision: what else is decoded moved the logits of a float32 model by 0.2 %
        # with it, by 0.002 % without it. Without it the attention takes memory for cells times batch times heads.
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_outputs_max = max(room.rows, room.parallel + 1)  # the default keeps room for the whole batch's
    params.n_threads = params.n_threads_batch = options.threads
    if callback is not None:
        params.cb_eval = callback
        params.op_offload = False  # a weight that is copied to where it is multiplied goes by another name there
    return params

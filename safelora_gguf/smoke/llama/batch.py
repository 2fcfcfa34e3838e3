"""What one llama_decode reads: llama.cpp's batch over memory of our own."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as lib


class Batch:
    """At most `room` tokens: each with its position, its sequence, and whether logits are wanted after it."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.count = 0
        self._tokens = (lib.llama_token * room)()
        self._positions = (lib.llama_pos * room)()
        self._numbers = (lib.llama_seq_id * room)()
        self._ones = (ctypes.c_int32 * room)(*[1] * room)
        self._wanted = (ctypes.c_int8 * room)()
        size = ctypes.sizeof(lib.llama_seq_id)
        start = ctypes.addressof(self._numbers)
        pointer = ctypes.POINTER(lib.llama_seq_id)
        self._pointers = (pointer * room)(*(ctypes.cast(start + index * size, pointer) for index in range(room)))

    @property
    def full(self) -> bool:
        return self.count == self.room

    @property
    def tokens(self) -> list[int]:
        return list(self._tokens[: self.count])

    def clear(self) -> None:
        self.count = 0

    def add(self, token: int, position: int, number: int, *, wanted: bool) -> None:
        at = self.count
        self._tokens[at], self._positions[at], self._numbers[at], self._wanted[at] = token, position, number, wanted
        self.count += 1

    def native(self) -> Any:
        return lib.llama_batch(
            n_tokens=self.count, token=self._tokens, embd=None, pos=self._positions, n_seq_id=self._ones,
            seq_id=self._pointers, logits=self._wanted,
        )  # fmt: skip

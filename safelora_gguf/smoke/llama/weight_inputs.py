"""What weights are multiplied with while llama.cpp decodes: an observer of its graph.

llama.cpp shows each tensor of a graph to a callback. Where it is a product whose first operand is a weight that is
watched, the second operand is that weight's input, whatever the architecture calls it. Weights with the same second
operand form a group, whose rows are kept once.

    rows     a graph computes a tensor for every token of the batch or, behind the last attention, only for those whose
             logits are wanted, which are the kept ones (`readers.Captured`): by which indices is read
    order    that the graph's tokens are the batch's, in its order, is seen where their embeddings are looked up
    checked  the first time that a weight is multiplied (`weight_check`)
    ended    behind the last weight: what follows the final norm is a row of logits for each kept token, which nobody
             reads, and with a large vocabulary takes longer than all the rest

No exception may pass through C: the first one is kept and raised after the decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from safelora_gguf.smoke.llama.capture_file import CaptureWriter, halved
from safelora_gguf.smoke.llama.errors import EngineError
from safelora_gguf.smoke.llama.ggml_tensors import GgmlTensors
from safelora_gguf.smoke.llama.kept_rows import Decode, Kept
from safelora_gguf.smoke.llama.sequences import Span
from safelora_gguf.smoke.llama.weight_check import WeightCheck

CHECKED = 8
"""Inputs of a weight that are multiplied with some of its rows."""

_EMBEDDINGS = "token_embd.weight"
_FINAL_NORM = "result_norm"
"""llama.cpp's name, in every architecture, for what its output matrix is multiplied with: every sequence's memory is
written by then."""


@dataclass(frozen=True)
class _Input:
    """Second operand of a product: float (n, slots, width), experts (n, used) where there are, and of the kept tokens
    the indices in it."""

    values: Any
    experts: Any
    kept: Any


class WeightInputs:
    """An `Observer` that writes the inputs of weights into a file.

    Args:
        weights: their names in the model's file.
        one_by_one: sequences must not be decoded together: llama.cpp would reorder their tokens.

    Attributes:
        callback: llama.cpp's cb_eval; it lives as long as this object, which must outlive the context.
        broken: why readers have no inputs, by their index.

    `close` it behind the context.
    """

    def __init__(self, weights: Sequence[str], writer: CaptureWriter, check: WeightCheck, *, one_by_one: bool) -> None:
        self.parallel = 1 if one_by_one else None
        self.callback: Any = lib.ggml_backend_sched_eval_callback(self._evaluated)
        self.broken: dict[int, str] = {}
        self._tensors = GgmlTensors()
        self._layout = self._tensors.layout
        self._weights = frozenset(weights)
        self._kept: Sequence[Kept] = ()
        self._writer = writer
        self._check = check
        self._named: dict[int, str] = {}  # tensors of the model, which stay where they are; a graph's don't
        self._groups: list[list[str]] = []
        self._group_of: dict[str, int] = {}
        self._checked: set[str] = set()
        self._embedded = False  # the embeddings that were looked up are the file's
        self._decode = Decode.of((), (), ())
        self._read: tuple[tuple[int, int], _Input] | None = None
        self._error: BaseException | None = None

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """The weights of each group, in the order of the file's."""
        return self._groups

    def begin(self, kept: Sequence[Kept]) -> None:
        """Other readers, of which this is kept, by their index."""
        self._kept = kept
        self.broken.clear()

    def reading(self, tokens: Sequence[int], spans: Sequence[Span]) -> None:
        self._decode = Decode.of(tokens, spans, self._kept)
        self._read = None

    def read(self, *, done: bool) -> None:
        """
        Raises:
            EngineError: unsupported: a weight is not multiplied, or otherwise than expected.
            OSError: the file can't be written.
        """
        self._read = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if not done or not self._decode.kept.size:
            return
        missing = self._weights - self._decode.multiplied
        if missing:
            raise self._unsupported(min(missing), "no matrix product takes it")
        if not self._decode.ordered:
            raise self._check.unsupported(
                "inputs", "llama.cpp's graph does not look its tokens up in token_embd.weight"
            )

    def close(self) -> None:
        """Parts with the callback, which refers back: the check's files would stay open until Python finds a cycle."""
        self.callback = None

    def _evaluated(self, tensor: int, asked: bool, _data: Any) -> bool:
        if self._error is not None:
            return False
        try:
            if asked:
                return self._wanted(tensor)
            return self._seen(tensor)
        except BaseException as error:
            self._error = error
            return False

    def _wanted(self, tensor: int) -> bool:
        """Whether a tensor is to be seen when it is computed; called for each one, so most end at the first line."""
        op, layout = self._tensors.op(tensor), self._layout
        if not self._decode.kept.size:
            return False
        if op not in (layout.mul_mat, layout.mul_mat_id, layout.get_rows):
            done = len(self._decode.multiplied) == len(self._weights)
            return done and self._tensors.name(tensor) == _FINAL_NORM
        name = self._name(self._tensors.source(tensor, 0))
        if op == layout.get_rows:
            return name == _EMBEDDINGS or self._picks(tensor)
        if name not in self._weights:
            return False
        if name in self._decode.multiplied:
            raise self._unsupported(name, "it is multiplied more than once")
        self._decode.multiplied.add(name)
        return name not in self._checked or self._group_of[name] not in self._decode.written

    def _name(self, tensor: int) -> str:
        """The name of a weight that is watched, or of the embeddings; of others nothing."""
        name = self._named.get(tensor, "")
        if not name:
            found = self._tensors.name(tensor)
            if found in self._weights or found == _EMBEDDINGS:
                name = self._named[tensor] = found
        return name

    def _picks(self, tensor: int) -> bool:
        """Whether a lookup takes as many rows as are kept, by indices that were not looked at yet."""
        indices = self._tensors.source(tensor, 1)
        return indices not in self._decode.picked and self._tensors.shape(indices) == (1, 1, 1, len(self._decode.kept))

    def _seen(self, tensor: int) -> bool:
        """Reads what was wanted; whether the graph is to go on."""
        op, layout = self._tensors.op(tensor), self._layout
        if op == layout.get_rows:
            if self._name(self._tensors.source(tensor, 0)) == _EMBEDDINGS:
                self._check_order(tensor)
            elif np.array_equal(self._tensors.values(self._tensors.source(tensor, 1)).ravel(), self._decode.kept):
                self._decode.picked.add(self._tensors.source(tensor, 1))
            return True
        weight = self._name(self._tensors.source(tensor, 0)) if op in (layout.mul_mat, layout.mul_mat_id) else ""
        if weight not in self._weights:  # the final norm
            return False
        if not self._decode.ordered:
            raise self._unsupported(weight, "it is multiplied before the tokens' embeddings are looked up")
        found = self._input(tensor, weight)
        group = self._group(tensor, weight, found)
        if weight not in self._checked:
            self._check_product(tensor, weight, found)
        if group not in self._decode.written:
            self._write(group, found)
            self._decode.written.add(group)
        return True

    def _check_order(self, tensor: int) -> None:
        tokens = self._tensors.values(self._tensors.source(tensor, 1)).ravel()
        if not np.array_equal(tokens, self._decode.tokens):
            raise self._check.unsupported("inputs", "this build of llama.cpp has the tokens in another order")
        if not self._embedded:
            embedded = self._tensors.values(tensor)
            self._check.check_rows(_EMBEDDINGS, tokens, embedded.reshape(-1, embedded.shape[-1]))
            self._embedded = True
        self._decode.ordered = True

    def _unsupported(self, weight: str, why: str) -> EngineError:
        return self._check.unsupported(f"the inputs of {weight}", why)

    def _operands(self, tensor: int) -> tuple[int, int]:
        """The input of a product, and what its experts are chosen by, 0 without any: equal for a group."""
        routed = self._tensors.op(tensor) == self._layout.mul_mat_id
        return self._tensors.source(tensor, 1), self._tensors.source(tensor, 2) if routed else 0

    def _input(self, tensor: int, weight: str) -> _Input:
        operands = self._operands(tensor)
        if self._read is None or self._read[0] != operands:
            values = self._tensors.values(operands[0])
            experts = self._tensors.values(operands[1])[0, 0] if operands[1] else None
            if operands[1]:  # (1, tokens, slots, width)
                values, outer = values[0], values.shape[0]
            else:  # (1, 1, tokens, width)
                values, outer = values[0, 0][:, None], values.shape[0] * values.shape[1]
            if outer != 1 or values.dtype == np.int32:
                raise self._unsupported(weight, "its input is no row for each token")
            self._read = operands, _Input(values, experts, self._rows(len(values), weight))
        return self._read[1]

    def _rows(self, count: int, weight: str) -> Any:
        """Of the kept tokens, their indices in a tensor of `count` rows."""
        if count == len(self._decode.tokens):
            return self._decode.kept
        if count == len(self._decode.kept):
            if not self._decode.picked:
                raise self._unsupported(weight, "its input's rows are not picked by the indices of the wanted tokens")
            return np.arange(count)
        raise self._unsupported(
            weight, f"its input has {count} rows for {len(self._decode.tokens)} tokens, {len(self._decode.kept)} kept"
        )

    def _group(self, tensor: int, weight: str, found: _Input) -> int:
        if weight not in self._group_of:
            operands = self._operands(tensor)
            if operands not in self._decode.groups:
                _, slots, width = found.values.shape
                used = 0 if found.experts is None else found.experts.shape[1]
                self._decode.groups[operands] = self._writer.add_group(width=width, slots=slots, used=used)
                self._groups.append([])
            group = self._group_of[weight] = self._decode.groups[operands]
            self._groups[group].append(weight)
        return self._group_of[weight]

    def _check_product(self, tensor: int, weight: str, found: _Input) -> None:
        count, slots, _ = found.values.shape
        tokens = np.unique(np.linspace(0, count - 1, CHECKED).astype(int))
        if found.experts is None:
            pairs, experts = [(int(token), 0) for token in tokens], None
            outputs = [self._tensors.row(tensor, token) for token, _ in pairs]
        else:
            pairs = [(int(token), number % found.experts.shape[1]) for number, token in enumerate(tokens)]
            experts = np.array([found.experts[pair] for pair in pairs])
            outputs = [self._tensors.row(tensor, slot, token) for token, slot in pairs]
        inputs = np.stack([found.values[token, slot if slots > 1 else 0] for token, slot in pairs])
        computed = np.stack(outputs)
        finite = np.isfinite(inputs).all(axis=1) & np.isfinite(computed).all(axis=1)
        if finite.any():  # what is not is told of the prompt, and the next decode checks
            self._check.check(weight, inputs[finite], computed[finite], None if experts is None else experts[finite])
            self._checked.add(weight)

    def _write(self, group: int, found: _Input) -> None:
        values, scales = halved(np.asarray(found.values[found.kept], np.float32), self._tensors.halves)
        experts = None if found.experts is None else found.experts[found.kept]
        sound = np.isfinite(scales).all(axis=1)
        for run in self._decode.runs:
            at = slice(run.at[0], run.at[-1] + 1) if run.at[-1] - run.at[0] + 1 == len(run.at) else run.at
            if not sound[at].all():
                self.broken[run.reader] = f"the inputs of {self._groups[group][0]} are not numbers (NaN or infinite)"
                continue
            self._writer.put(group, run.row, values[at], scales[at], None if experts is None else experts[at])

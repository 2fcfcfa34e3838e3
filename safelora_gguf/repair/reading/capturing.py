"""The inputs of the adapted weights, captured from a running model: H where it refuses, G where the adapter works.

H: the model without the adapter reads harmful prompts that it refuses, and its own refusals; then it reads the same
with the adapter. What the adapter is to lose it must lose on its own inputs, too, or one changed layer sends the next
ones where nothing was measured. G: the model with the adapter reads harmless prompts and its own answers; tasks, which
the adapter is for, have most of the weight.

    C_H = 1/2 C(without the adapter) + 1/2 C(with it),    C_G = task_share C(tasks) + (1 - task_share) C(others)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converters.errors import Error, LlamaError, UnsupportedError, UsageError, WriteError
from safelora_gguf.repair.reading.captured_rows import CapturedSet
from safelora_gguf.repair.reading.captured_sets import (
    CapturedSets,
    Inputs,
    Mixture,
    Progress,
    RangeInputs,
    Taken,
    captured,
    nothing_given,
    removed,
    size,
    telling,
)
from safelora_gguf.repair.reading.token_sets import begun_alike, readings, tail_firsts
from safelora_gguf.smoke.parent.session import Session
from safelora_gguf.smoke.protocol import (
    TEMPLATE_FAILED,
    AdapterChoice,
    Chat,
    Continued,
    InputGroup,
    InputShape,
    Reading,
)

__all__ = [
    "MOST_BYTES",
    "TASK_SHARE",
    "Asked",
    "CapturedSet",
    "CapturedSets",
    "Inputs",
    "Mixture",
    "RangeInputs",
    "Taken",
    "capture_sets",
]

TASK_SHARE = 0.8
"""Of the task prompts in C_G. Over families, measured on other prompts, more of the task stays than with a share by
their number of tokens, and no fewer prompts are refused."""

MOST_BYTES = 16 * 2**30
"""Bytes that captures may take on a device however large."""


@dataclass(frozen=True)
class Asked:
    """Prompts whose inputs are wanted, the fold of each, and which of them are tasks; empty: none."""

    chats: tuple[Chat, ...]
    folds: tuple[int, ...]
    tasks: tuple[bool, ...] = ()


def capture_sets(
    session: Session,
    harmful: Asked,
    benign: Asked,
    adapter: AdapterChoice,
    weights: Mapping[str, InputShape],
    *,
    scratch: Path,
    tokens: int = 2048,
    tail: int = 9,
    seed: int = 0,
    max_tokens: int | None = None,
    task_share: float = TASK_SHARE,
    free: int | None = None,
    most_bytes: int = MOST_BYTES,
    progress: Progress | None = None,
) -> CapturedSets:
    """Has the model answer all prompts, and finds out by a single token what a capture takes; the sets themselves are
    captured by `CapturedSets.ranges`.

    Args:
        harmful: prompts that the model without the adapter refuses.
        benign: harmless ones: benign, borderline, tasks.
        adapter: as GGUF.
        weights: names of the adapted weights in the model's file, and what their inputs are like.
        scratch: a directory for captures, which its owner removes.
        tokens: most of each set; H's are read twice, and each time counts.
        tail: of a harmful prompt, so many of its last tokens count, beside the refusal.
        seed: which tokens.
        max_tokens: length of an answer; None: as the session's options say.
        task_share: of the task prompts in C_G, from 0 to 1; where there are only tasks, or none, they have all. What
            has no share is not read.
        free: bytes of the scratch device that are free; None: it is asked. Half of them are used, at most `most_bytes`.

    Raises:
        LlamaError: llama.cpp crashed or hung again and again, or could not read one prompt of a set: what a session
            tells as a failure is raised here, since without both sets there is nothing to solve.
        UnsupportedError: the chat template fails for every prompt, or a weight's inputs can't be found in this model.
        MissingLlamaError: llama-cpp-python does not load.
        WriteError: there is no room for the inputs of one weight.
        UsageError: no harmless prompts.
        ValueError: no harmful ones, or no weights, or a share that is none.
    """
    if not (harmful.chats and weights):
        raise ValueError("no harmful prompts, or no weights")
    if not 0 <= task_share <= 1:
        raise ValueError(f"a share of {task_share} for the tasks")
    if not benign.chats:
        raise UsageError(
            "no harmless prompts, where what is kept of the adapter follows from them; give --prompts of both"
        )
    benign = _with_share(benign, task_share)
    asking = _Asking(session, max_tokens, progress, [], [])
    refused = asking.continued("harmful", (), harmful)
    answered = asking.continued("harmless", (adapter,), benign)
    begun = begun_alike([*refused.values(), *answered.values()])
    tails = tail_firsts(refused.values(), tail, begun)
    h = _twice(harmful, refused, readings(refused.values(), tails, max(1, tokens // 2), seed), adapter)
    after = [begun] * len(answered)
    g = _by_kind(benign, answered, readings(answered.values(), after, tokens, seed), adapter, task_share)
    for one in (h, g):
        if not one.tokens:
            raise LlamaError(f"the {one.name} prompts and answers have no tokens of their own", file=session.file)
    groups = asking.groups(h.parts[-1], weights, scratch / "one-token.inputs")
    room = _room(scratch, free, most_bytes, max(size(group, h, g) for group in groups))
    return CapturedSets(
        session,
        h,
        g,
        groups,
        weights,
        scratch=scratch,
        room=room,
        notes=asking.notes,
        losses=asking.losses,
        progress=progress,
    )


@dataclass(frozen=True)
class _Asking:
    """Asks a session and raises what fails."""

    session: Session
    max_tokens: int | None
    progress: Progress | None
    notes: list[str]
    losses: list[Error]

    def continued(self, name: str, adapters: tuple[AdapterChoice, ...], asked: Asked) -> dict[int, Continued]:
        """The prompts that could be answered, by their places."""
        tell = telling(self.progress, len(asked.chats), f"answers to {name} prompts")
        found = self.session.continuations(adapters, asked.chats, max_tokens=self.max_tokens, tell=tell)
        if found.failure is not None:
            if None in found.items:
                raise found.failure
            self.losses.append(found.failure)
        known = {place: item for place, item in enumerate(found.items) if item is not None}
        errors = [item.error for item in known.values() if item.error is not None]
        if errors:
            self._left_out(name, errors, len(known))
        return {place: item for place, item in known.items() if item.error is None}

    def groups(self, taken: Taken, weights: Mapping[str, InputShape], file: Path) -> tuple[InputGroup, ...]:
        """The inputs that weights share, found by reading as little as can be."""
        whole = min(taken.readings, key=lambda one: one.keep[0])
        shortest = replace(taken, readings=(Reading(whole.tokens[: whole.keep[0] + 1], whole.keep[:1]),))
        with removed([file]):
            found = captured(self.session, shortest, weights, file, losses=self.losses)
        if not found.groups:
            raise nothing_given(self.session, taken.name, found)
        return found.groups

    def _left_out(self, name: str, errors: Sequence[str], asked: int) -> None:
        if len(errors) < asked:
            self.notes.append(f"{len(errors)} of {asked} {name} prompts are left out; the first: {errors[0]}")
            return
        told = f"not one of {asked} {name} prompts could be answered; the first: {errors[0]}"
        if all(error.startswith(TEMPLATE_FAILED) for error in errors):
            raise UnsupportedError(f"{told}; give another template with --template", file=self.session.file)
        raise LlamaError(told, file=self.session.file)


def _twice(asked: Asked, places: Iterable[int], found: Iterable[Reading], adapter: AdapterChoice) -> Mixture:
    """The same readings without the adapter and with it."""
    taken = _taken("harmful", (), asked, places, found)
    parts = taken, replace(taken, adapters=(adapter,))
    return Mixture("harmful", tuple(replace(part, share=0.5) for part in parts))


def _with_share(asked: Asked, task_share: float) -> Asked:
    """Without the kind that has no share, where there is the other one."""
    tasks = asked.tasks or (False,) * len(asked.chats)
    wanted = [place for place, task in enumerate(tasks) if (task_share if task else 1 - task_share)]
    left = wanted or range(len(tasks))
    chats, folds = tuple(asked.chats[place] for place in left), tuple(asked.folds[place] for place in left)
    return Asked(chats, folds, tuple(tasks[place] for place in left))


def _by_kind(
    asked: Asked, places: Iterable[int], found: Iterable[Reading], adapter: AdapterChoice, task_share: float
) -> Mixture:
    """Tasks and others apart, those of them that there are."""
    tasks = asked.tasks or (False,) * len(asked.chats)
    pairs, parts = list(zip(places, found, strict=True)), []
    for name, share, wanted in (("task", task_share, True), ("harmless", 1 - task_share, False)):
        own = {place: one for place, one in pairs if tasks[place] == wanted}
        parts.append(replace(_taken(name, (adapter,), asked, own, own.values()), share=share))
    there = tuple(part for part in parts if part.tokens)
    return Mixture("harmless", there if len(there) > 1 else tuple(replace(part, share=1.0) for part in there))


def _taken(
    name: str,
    adapters: tuple[AdapterChoice, ...],
    asked: Asked,
    places: Iterable[int],
    found: Iterable[Reading],
) -> Taken:
    """Without the prompts that give nothing.

    Args:
        places: of the prompts that were answered.
        found: what is to be read of each of these.
    """
    pairs = [(place, one) for place, one in zip(places, found, strict=True) if one.keep]
    items = tuple(place for place, _ in pairs)
    return Taken(name, adapters, tuple(one for _, one in pairs), items, tuple(asked.folds[place] for place in items))


def _room(scratch: Path, free: int | None, most_bytes: int, largest: int) -> int:
    """Bytes that may be used, of which the largest group needs so many."""
    if free is None:
        try:
            free = shutil.disk_usage(scratch).free
        except OSError:  # a file system that can't tell: writing will
            free = max(2 * most_bytes, largest)
    if largest > free:
        told = f"the inputs of one weight take {largest / 1e6:,.1f} MB, and there are {free / 1e6:,.1f} MB free"
        raise WriteError(f"{told}; make room, set TMPDIR to another device, or take fewer with --tokens", file=scratch)
    return min(most_bytes, free // 2)

"""What the llama.cpp child replies, checked before it is believed.

It ran a stranger's file through a native library, so its lines are input like any other: keys, types and ranges are
looked at, and whatever fails is a `NonsenseError`, upon which the child is given up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

from safelora_gguf.smoke.protocol import Answer, Continued, Divergence, FailureKind, InputGroup, InputShape, Stop

_ANSWER_KEYS = frozenset(field.name for field in fields(Answer))
_CONTINUED_KEYS = frozenset(field.name for field in fields(Continued))
_GROUP_KEYS = {field.name for field in fields(InputGroup)}
_ROUNDING = 1e-6  # so far above 0 a log-probability or below 0 a divergence may be


class NonsenseError(Exception):
    """A reply that the protocol does not know, or a value that can't be."""


@dataclass(frozen=True)
class Loaded:
    """A loaded model.

    Attributes:
        n_vocab: tokens of its vocabulary.
        vocabulary: sha256 of their texts.
        n_ctx: tokens that one prompt and its answer may have.
        notes: what was done otherwise than asked.
    """

    n_vocab: int
    vocabulary: str
    n_ctx: int
    notes: tuple[str, ...] = ()


def parsed(line: bytes) -> Mapping[str, Any]:
    """A line as an object with at least one key.

    Raises:
        NonsenseError: it is no JSON, holds NaN or Infinity, or is something else than such an object.
    """
    try:
        reply = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise NonsenseError(f"no JSON: {str(error)[:100]}") from None
    if not isinstance(reply, dict) or not reply:
        raise NonsenseError("no object")
    return reply


def failure_in(told: object) -> tuple[FailureKind, str]:
    """Kind and message of what failed and left the child alive."""
    failed = _object(told, {"kind", "message"})
    if failed["kind"] not in get_args(FailureKind):
        raise NonsenseError("an unknown kind of failure")
    return failed["kind"], _text(failed["message"])


def loaded_in(told: object) -> Loaded:
    result = _object(told, {"n_vocab", "vocabulary", "n_ctx", "notes"})
    digest = _text(result["vocabulary"])
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise NonsenseError("the vocabulary's digest is no sha256")
    n_vocab, n_ctx = (_count(result[key], least=1) for key in ("n_vocab", "n_ctx"))
    return Loaded(n_vocab, digest, n_ctx, _texts(result["notes"]))


def pieces_in(told: object, n_vocab: int) -> tuple[str, ...]:
    pieces = _texts(_object(told, {"pieces"})["pieces"])
    if len(pieces) != n_vocab:
        raise NonsenseError(f"{len(pieces)} pieces of {n_vocab} tokens")
    return pieces


def answer_in(item: Mapping[str, Any], n_vocab: int, top: int) -> Answer:
    """An answer with at most `top` first tokens of a vocabulary of `n_vocab`."""
    result = _object(_object(item, {"answer"})["answer"], {"text"}, _ANSWER_KEYS)
    score = result.get("score")
    return Answer(
        text=_text(result["text"]),
        error=_optional_text(result.get("error")),
        stop=_stop(result.get("stop", "end")),
        top=_likeliest(_list(result.get("top", [])), n_vocab, top),
        score=None if score is None else _number(score),
    )


def recorded_in(item: Mapping[str, Any], longest: int) -> int:
    """How many positions of an item are in the record, of at most `longest`; 0 where it failed."""
    result = _object(_object(item, {"recorded"})["recorded"], {"positions", "error"})
    _optional_text(result["error"])
    return _count(result["positions"], most=longest)


def continued_in(item: Mapping[str, Any], n_vocab: int, longest: int, max_tokens: int) -> Continued:
    """A prompt's tokens and at most `max_tokens` of its answer, of a vocabulary of `n_vocab`, `longest` together."""
    result = _object(_object(item, {"continued"})["continued"], {"prompt", "answer", "text"}, _CONTINUED_KEYS)
    prompt, answer = _tokens(result["prompt"], n_vocab), _tokens(result["answer"], n_vocab)
    error = _optional_text(result.get("error"))
    if error is None and (not prompt or len(answer) > max_tokens or len(prompt) + len(answer) > longest):
        raise NonsenseError(f"a prompt of {len(prompt)} tokens with an answer of {len(answer)}")
    return Continued(prompt, answer, _text(result["text"]), _stop(result.get("stop", "end")), error)


def captured_in(item: Mapping[str, Any], kept: int) -> str | None:
    """Why an item could not be read, without any rows; None: there are all that are `kept`."""
    result = _object(item, {"captured", "error"})
    rows, error = _count(result["captured"]), _optional_text(result["error"])
    if rows != (kept if error is None else 0):
        raise NonsenseError(f"{rows} rows captured where {kept} are kept")
    return error


def groups_in(
    told: object, weights: Mapping[str, InputShape], file: Path, read: Sequence[bool]
) -> tuple[tuple[InputGroup, ...], tuple[str, ...]]:
    """Where the inputs of all these weights stand in the file that was written, none at all where nothing was read; and
    notes for the report.

    Args:
        read: of each row, whether what it is of could be read.
    """
    from safelora_gguf.smoke.llama.capture_file import BrokenCaptureError, CaptureReader

    result = _object(told, {"groups", "notes", "bytes"})
    groups = tuple(_group(group, len(read), weights) for group in _list(result["groups"]))
    known = sorted(weight for group in groups for weight in group.weights)
    if known != sorted(weights) and (known or any(read)):
        raise NonsenseError("inputs of other weights than were asked for")
    try:
        reader = CaptureReader(file, groups)
        for group in groups:
            for experts in {weights[weight].experts for weight in group.weights}:
                reader.check(group, read, experts)
        size = file.stat().st_size
    except (BrokenCaptureError, OSError) as error:
        raise NonsenseError(f"a file of inputs that is none: {error}") from None
    if _count(result["bytes"]) != size:
        raise NonsenseError(f"inputs of {result['bytes']} bytes in a file of {size}")
    return groups, _texts(result["notes"])


def divergence_in(item: Mapping[str, Any]) -> Divergence | None:
    """A divergence; None where the child says why there is none."""
    if "error" in item:
        _text(_object(item, {"divergence", "error"})["error"])
        return None
    result = _object(_object(item, {"divergence"})["divergence"], {"kl", "top1", "positions"})
    kl, top1 = _number(result["kl"]), _number(result["top1"])
    if kl < -_ROUNDING or not 0 <= top1 <= 1:
        raise NonsenseError("a divergence below 0, or an agreement that is no share")
    return Divergence(max(kl, 0.0), top1, _count(result["positions"], least=1))


def numbers_in(told: object, *keys: str) -> tuple[int, ...]:
    """The counts of a last reply, which holds nothing else."""
    result = _object(told, set(keys))
    return tuple(_count(result[key]) for key in keys)


def alive_in(reply: Mapping[str, Any]) -> int:
    """Tokens decoded so far."""
    return _count(_object(reply, {"alive"})["alive"])


def result_in(reply: Mapping[str, Any]) -> object:
    """What stands under "ok"."""
    return _object(reply, {"ok"})["ok"]


def key_in(told: object, asked: Collection[int]) -> int:
    """The key of an item that was asked and has not come yet."""
    key = _count(told)
    if key not in asked:
        raise NonsenseError("an item that nobody asked, or one that came before")
    return key


def _likeliest(pairs: list[Any], n_vocab: int, top: int) -> tuple[tuple[int, float], ...]:
    if len(pairs) > top:
        raise NonsenseError(f"{len(pairs)} first tokens where {top} were asked for")
    found = []
    for pair in pairs:
        if len(_list(pair)) != 2:
            raise NonsenseError("a first token that is no pair")
        chance = _number(pair[1])
        if chance > _ROUNDING:
            raise NonsenseError("a log-probability above 0")
        found.append((_count(pair[0], most=n_vocab - 1), chance))
    return tuple(found)


def _group(told: object, rows: int, known: Mapping[str, InputShape]) -> InputGroup:
    """A group of inputs, each of so many rows; whether it can be in its file is `CaptureReader`'s to say."""
    result = _object(told, _GROUP_KEYS)
    weights = _texts(result["weights"])
    if _count(result["rows"]) != rows:
        raise NonsenseError(f"{result['rows']} rows where {rows} are kept")
    width, slots, used = (_count(result[key]) for key in ("width", "slots", "used"))
    for weight in weights:
        if weight in known and known[weight].width != width:
            raise NonsenseError(f"inputs of {width} elements, and {weight} has {known[weight].width} columns")
    return InputGroup(weights, width, rows, slots, used, _count(result["offset"]))


def _tokens(told: object, n_vocab: int) -> tuple[int, ...]:
    return tuple(_count(token, most=n_vocab - 1) for token in _list(told))


def _stop(told: object) -> Stop:
    for known in get_args(Stop):
        if told == known:
            return cast(Stop, known)
    raise NonsenseError("an unknown reason to stop")


def _object(told: object, needed: Set[str], known: Set[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(told, Mapping) or not needed <= told.keys() <= (known or needed):
        raise NonsenseError(f"an object with other keys than {', '.join(sorted(known or needed)) or 'none'}")
    return told


def _list(told: object) -> list[Any]:
    if not isinstance(told, list):
        raise NonsenseError("no list")
    return told


def _text(told: object) -> str:
    if not isinstance(told, str):
        raise NonsenseError("no text")
    return told


def _texts(told: object) -> tuple[str, ...]:
    return tuple(_text(one) for one in _list(told))


def _optional_text(told: object) -> str | None:
    return None if told is None else _text(told)


def _number(told: object) -> float:
    if isinstance(told, bool) or not isinstance(told, int | float) or not math.isfinite(told):
        raise NonsenseError("no number")
    return float(told)


def _count(told: object, *, least: int = 0, most: int | None = None) -> int:
    if isinstance(told, bool) or not isinstance(told, int) or told < least or (most is not None and told > most):
        raise NonsenseError("no count, or one out of its range")
    return told


def _refuse_constant(name: str) -> NoReturn:
    raise NonsenseError(f"{name} is no JSON")

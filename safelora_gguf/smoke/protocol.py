"""What the parent and the llama.cpp child say to each other: one JSON object a line, requests answered in turn.

    {"do": "load", ModelOptions...}  -> {"ok": {"n_vocab", "vocabulary", "n_ctx", "notes": [...]}}
    {"do": "adapters", "adapters": [{"path", "scale"}, ...]}  -> {"ok": {}}      none: the model alone
    {"do": "pieces"}                 -> {"ok": {"pieces": [text of token 0, ...]}}
    {"do": "answer", "items": [{"key", "messages": [{"role", "content"}, ...]}, ...], "max_tokens", "top", "refusal"}
        -> {"item": key, "answer": {Answer...}} as each is finished, then {"ok": {"items": n}}
    {"do": "record", "items": [...], "max_tokens", "file"}
        -> {"item": key, "recorded": {"positions": n, "error": null or text}}, then {"ok": {"positions": n, "bytes": n}}
    {"do": "diverge", "file"}
        -> {"item": key, "divergence": {"kl", "top1", "positions"}}, or {"item": key, "divergence": null, "error": text}
           where the item could not be read, then {"ok": {}}
    {"do": "continue", "items": [...], "max_tokens"}
        -> {"item": key, "continued": {Continued...}} as each is finished, then {"ok": {"items": n}}
    {"do": "capture", "items": [{"key", "tokens": [ids], "keep": [positions]}, ...], "weights": [names], "file"}
        -> {"item": key, "captured": rows, "error": null or text} as each is read,
           then {"ok": {"groups": [{InputGroup...}, ...], "notes": [...], "bytes": n}}
    while any of these is at work    -> {"alive": tokens decoded so far} between two decodes, every half second at most
    what fails                             -> {"failed": {"kind", "message"}} instead of "ok"; the child lives on

`n_vocab` counts tokens, `n_ctx` is the longest that one prompt and its answer may be together, `vocabulary` is the
SHA-256 of all token texts, `notes` are sentences for the report. Keys are the asker's, and come back as they were.

answer: greedy, at most `max_tokens` tokens; 0 asks for the first token's distribution alone, without any text.
`refusal` are the tokens that begin a refusal: with none there is no score.
record: the greedy continuation of each item, and the next-token distribution at each of its positions, into `file`
(the format is `distributions`'). An item that failed is not in the file.
diverge: the token sequences in `file`, read with the adapters set now: mean KL(recorded || now) in nats over the
positions, and the share of positions where both hold the same token likeliest.
continue: as answer, with the tokens themselves.
capture: reads `tokens`, generates nothing, and writes what the named weights (as the GGUF file has them) are multiplied
with at the positions `keep` into `file` (the format is `capture_file`'s): one row a position, in the order of the
items, whatever was decoded together. An item that could not be read gives 0 rows; the file has rows for it all the
same, of scale 0.

ASCII only (json's default), so that no locale matters and odd bytes in paths survive. Every number is finite.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, TypedDict

# missing: llama-cpp-python does not load; rejected: llama.cpp refused; unsupported: we can't work with this model;
# unwritable: `file` can't be written; bug: our own code failed, `message` is its traceback, and the child is given up
FailureKind = Literal["missing", "rejected", "unsupported", "unwritable", "bug"]

TEMPLATE_FAILED = "the chat template"
"""What every `Answer.error` begins with that a chat template is to blame for."""

Stop = Literal["end", "length", "time"]
"""Why an answer ended: the model ended it; `max_tokens` or the context ran out; the prompt's time limit did."""

MAX_LINE = 64 * 2**20
ALIVE_EVERY = 0.5
"""Seconds that pass at least between two signs of life."""


class Message(TypedDict):
    """One turn of a chat; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Chat = tuple[Message, ...]
"""What a model is asked: the turns so far, the last one the user's."""


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded and asked.

    Args:
        gpu_layers: -1: all of them.
        ctx: most tokens that a prompt and its answer may have together. None: as trained, at most 4096.
        max_tokens: most tokens of an answer, where a request does not say.
        system: text of a system message, for chats that have none.
        template: Jinja text, or a name from llama.cpp's own list of chat templates. None: the model's own.
        parallel: most prompts that are decoded together.
        prompt_seconds: an answer that takes longer is cut.
    """

    model: str
    threads: int = 1
    gpu_layers: int = 0
    ctx: int | None = None
    max_tokens: int = 64
    system: str | None = None
    template: str | None = None
    parallel: int = 16
    prompt_seconds: float = 300.0


@dataclass(frozen=True)
class AdapterChoice:
    """A GGUF adapter and the scale llama.cpp is to give it."""

    path: str
    scale: float = 1.0


@dataclass(frozen=True)
class Answer:
    """What a model said to one chat.

    Args:
        text: begins with the tag of a reasoning block where the template opened one.
        error: why there is no answer.
        stop: why the text ends where it does.
        top: the likeliest first tokens, likeliest first: id and log-probability.
        score: log p(R) - log(1 - p(R)) at the first answer token, R the request's refusal tokens; within +-1000.
    """

    text: str
    error: str | None = None
    stop: Stop = "end"
    top: tuple[tuple[int, float], ...] = ()
    score: float | None = None


@dataclass(frozen=True)
class Continued:
    """What a model said to one chat, in tokens.

    Args:
        prompt: the rendered chat.
        answer: what followed greedily, without the token that ended it.
        text: the answer; begins with the tag of a reasoning block where the template opened one.
        stop: why it ends where it does.
        error: why there is none.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    stop: Stop = "end"
    error: str | None = None


@dataclass(frozen=True)
class Reading:
    """Tokens to be read, and the positions among them whose inputs are kept, ascending.

    Raises:
        ValueError: positions that are not ascending, or not among the tokens; a token below 0.
    """

    tokens: tuple[int, ...]
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(one >= other for one, other in itertools.pairwise(self.keep)):
            raise ValueError("positions that are kept must ascend")
        if self.keep and not 0 <= self.keep[0] <= self.keep[-1] < len(self.tokens):
            raise ValueError(f"positions {self.keep[0]} to {self.keep[-1]} are kept of {len(self.tokens)} tokens")
        if min(self.tokens, default=0) < 0:
            raise ValueError("a token below 0")


@dataclass(frozen=True)
class InputShape:
    """What a weight is multiplied with: rows of `width` elements; of a stack, each goes to some of its `experts`, of
    which there are 0 where it is none."""

    width: int
    experts: int = 0


@dataclass(frozen=True)
class InputGroup:
    """Weights that are multiplied with the same input, and where its rows stand in a file of captured inputs.

    Attributes:
        weights: names in the GGUF file, in the order llama.cpp multiplies them.
        width: elements of an input.
        rows: kept positions of all items.
        slots: inputs of a row: 1, or as many as experts are used where each has its own.
        used: experts that a row is routed to; 0 where the weights are no stacks of experts.
        offset: where the rows begin.
    """

    weights: tuple[str, ...]
    width: int
    rows: int
    slots: int
    used: int
    offset: int


@dataclass(frozen=True)
class Divergence:
    """How far the next-token distributions of a run are from recorded ones, for one item.

    Attributes:
        kl: mean of KL(recorded || run) over the positions, in nats.
        top1: share of the positions where both have the same likeliest token.
        positions: how many were compared.
    """

    kl: float
    top1: float
    positions: int

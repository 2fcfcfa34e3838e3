"""What the parent and the llama.cpp child say to each other: one JSON object a line, one reply to each
request.

    {"do": "load", ModelOptions...}                            -> {"ok": {}}
    {"do": "adapters", "adapters": [{"path", "scale"}, ...]}   -> {"ok": {}}      none: the model alone
    {"do": "answer", "prompt": "..."}                          -> {"ok": {"text", "error"}}
    anything that fails but leaves the child alive             -> {"failed": {"kind", "message"}}

ASCII only (json's default), so that no locale matters and odd bytes in paths survive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# missing: llama-cpp-python does not load; rejected: llama.cpp refused; unsupported: we can't work with this
# model
FailureKind = Literal["missing", "rejected", "unsupported"]

MAX_LINE = 64 * 2**20


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded and asked. `ctx` None: as trained, at most 4096 tokens."""

    model: str
    threads: int = 1
    gpu_layers: int = 0
    ctx: int | None = None
    max_tokens: int = 64
    system: str | None = None


@dataclass(frozen=True)
class AdapterChoice:
    """A GGUF adapter and the scale llama.cpp is to give it."""

    path: str
    scale: float = 1.0


@dataclass(frozen=True)
class Answer:
    """The text generated for one prompt; `error` says why there is none."""

    text: str
    error: str | None = None

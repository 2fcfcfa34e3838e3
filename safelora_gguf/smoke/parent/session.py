"""One model, asked for as long as it takes: its child is started when it is needed, and again where it has died.

What llama.cpp does is told (`failure`), never raised: a child that is lost while it works on several prompts is
started again (`attempts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from converters.errors import Error
from safelora_gguf.smoke.parent.attempts import Attempts, Items, Tell
from safelora_gguf.smoke.parent.loaded_model import LoadedModel
from safelora_gguf.smoke.parent.outcomes import Answered, Captured, ContinuedAll, Diverged, Recorded
from safelora_gguf.smoke.parent.process import CHILD_COMMAND, LlamaProcess
from safelora_gguf.smoke.parent.wire import Patience
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

__all__ = [
    "LOAD_TIMEOUT",
    "PROMPT_TIMEOUT",
    "Answered",
    "Captured",
    "ContinuedAll",
    "Diverged",
    "Limits",
    "Recorded",
    "Session",
    "Tell",
    "ask",
]

LOAD_TIMEOUT = 900.0
PROMPT_TIMEOUT = 300.0
LEAST_SILENCE = 60.0


@dataclass(frozen=True)
class Limits:
    """Seconds after which a child counts as hung.

    Attributes:
        load: for a model or an adapter.
        prompt: for one answer. The child cuts longer ones itself (`ModelOptions.prompt_seconds`), so this one is for
            the child that doesn't.
        silence: between two signs of life, that is for one call of `llama_decode`. None: as `prompt`, but a minute at
            least, since a short time limit for answers is no reason to distrust llama.cpp.
    """

    load: float = LOAD_TIMEOUT
    prompt: float = PROMPT_TIMEOUT
    silence: float | None = None

    def patience(self, options: ModelOptions) -> Patience:
        silence = max(self.prompt, LEAST_SILENCE) if self.silence is None else self.silence
        return Patience.for_prompts(silence, max(self.prompt, options.prompt_seconds))


def ask(prompt: str) -> Chat:
    """The chat that consists of one question."""
    return ({"role": "user", "content": prompt},)


class Session:
    """A model in a child process. Not for two threads at a time.

    No method raises what llama.cpp does to a file or a prompt; MissingLlamaError is raised by all of them, and
    RuntimeError for a bug of ours in the child.
    """

    def __init__(
        self, options: ModelOptions, limits: Limits | None = None, command: Sequence[str] = CHILD_COMMAND
    ) -> None:
        self._options = options
        self._limits = limits or Limits()
        self._patience = self._limits.patience(options)
        self._model = LoadedModel(options, self._limits.load, command)
        self._attempts = Attempts(self._model)
        self._pieces: tuple[str, ...] = ()

    @property
    def failure(self) -> Error | None:
        """The first thing that went wrong, whatever was asked."""
        return self._attempts.failure

    @property
    def file(self) -> str:
        return self._options.model

    @property
    def loads(self) -> int:
        """How often the model was loaded."""
        return self._model.loads

    @property
    def pid(self) -> int | None:
        """The child's, while there is one."""
        return self._model.pid

    @property
    def notes(self) -> tuple[str, ...]:
        """What the child did otherwise than asked when it loaded the model, and how often it was killed meanwhile."""
        loaded = () if self._model.loaded is None else self._model.loaded.notes
        return (*loaded, *dict.fromkeys(self._model.notes))

    def answers(
        self,
        adapters: Sequence[AdapterChoice],
        chats: Sequence[Chat],
        *,
        max_tokens: int | None = None,
        top: int = 0,
        refusal: Sequence[int] = (),
        tell: Tell | None = None,
    ) -> Answered:
        """What the model with these adapters, and no others, says to each chat.

        Args:
            max_tokens: length of an answer; None: as in the options; 0: the first token's distribution, no text.
            top: how many of the likeliest first tokens to give.
            refusal: tokens that begin a refusal, for `Answer.score`.
        """
        length = self._length(max_tokens)

        def stream(process: LlamaProcess, batch: Mapping[int, Chat]) -> Items[Answer]:
            return process.answers(batch, max_tokens=length, top=top, refusal=refusal, patience=self._patience)

        found, failure = self._attempts.each(adapters, chats, stream, lambda error: Answer("", error=error), tell)
        return Answered(found, failure)

    def continuations(
        self,
        adapters: Sequence[AdapterChoice],
        chats: Sequence[Chat],
        *,
        max_tokens: int | None = None,
        tell: Tell | None = None,
    ) -> ContinuedAll:
        """The tokens of each chat and of what the model with these adapters, and no others, says to it.

        Args:
            max_tokens: length of an answer; None: as in the options.
        """
        length = self._length(max_tokens)

        def stream(process: LlamaProcess, batch: Mapping[int, Chat]) -> Items[Continued]:
            return process.continuations(batch, max_tokens=length, patience=self._patience)

        found, failure = self._attempts.each(
            adapters, chats, stream, lambda error: Continued((), (), "", error=error), tell
        )
        return ContinuedAll(found, failure)

    def record(
        self,
        adapters: Sequence[AdapterChoice],
        chats: Sequence[Chat],
        file: Path,
        *,
        max_tokens: int,
        tell: Tell | None = None,
    ) -> Recorded:
        """Continues each chat greedily and writes the next-token distributions on the way into `file`, which is removed
        where that fails twice."""
        found: dict[int, int] = {}
        everything = dict(enumerate(chats))

        def stream(process: LlamaProcess) -> Items[int]:
            return process.record(everything, max_tokens=max_tokens, file=file, patience=self._patience)

        first, last = self._attempts.twice(adapters, stream, found, tell)
        if last is not None:
            file.unlink(missing_ok=True)
            found.clear()
        return Recorded(tuple(found.get(key, 0) for key in everything), self.vocabulary(), first, last is None)

    def divergences(
        self, adapters: Sequence[AdapterChoice], file: Path, count: int, *, tell: Tell | None = None
    ) -> Diverged:
        """How far the model with these adapters is from the `count` chats that `record` continued."""
        found: dict[int, Divergence | None] = {}

        def stream(process: LlamaProcess) -> Items[Divergence | None]:
            return process.divergences(file, range(count), self._patience)

        first, _ = self._attempts.twice(adapters, stream, found, tell)
        return Diverged(tuple(found.get(key) for key in range(count)), first)

    def capture(
        self,
        adapters: Sequence[AdapterChoice],
        readings: Sequence[Reading],
        weights: Mapping[str, InputShape],
        file: Path,
        *,
        tell: Tell | None = None,
    ) -> Captured:
        """Reads tokens with these adapters and writes the inputs that `weights` have at the positions that are kept
        into `file`, which is removed where that fails twice; `capture_file` knows its format.

        Raises:
            ValueError: a token is none of the vocabulary.
        """
        found: dict[int, str | None] = {}
        written: list[tuple[tuple[InputGroup, ...], tuple[str, ...]]] = []

        def finish(groups: tuple[InputGroup, ...], notes: tuple[str, ...]) -> None:
            written.append((groups, notes))

        everything = dict(enumerate(readings))

        def stream(process: LlamaProcess) -> Items[str | None]:
            return process.capture(everything, weights, file=file, patience=self._patience, finish=finish)

        first, last = self._attempts.twice(adapters, stream, found, tell)
        if last is not None:
            file.unlink(missing_ok=True)
            return Captured((), (0,) * len(readings), failure=first, complete=False)
        errors = tuple(found[key] for key in everything)
        rows = tuple(len(one.keep) if error is None else 0 for one, error in zip(readings, errors, strict=True))
        groups, notes = written[-1]
        return Captured(groups, rows, errors, notes, first)

    def pieces(self) -> tuple[str, ...]:
        """The text of every token; none where the model can't be loaded or the child was lost, see `failure`."""
        if not self._pieces:
            with self._attempts.told():
                self._pieces = self._model.running().pieces(self._limits.load)
        return self._pieces

    def vocabulary(self) -> str:
        """Digest of all tokens' texts, equal where distributions can be compared; "" where it can't be loaded."""
        if self._model.loaded is None:
            with self._attempts.told():
                self._model.running()
        return self._model.loaded.vocabulary if self._model.loaded is not None else ""

    def close(self) -> None:
        self._model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _length(self, max_tokens: int | None) -> int:
        return self._options.max_tokens if max_tokens is None else max_tokens

"""What the child does with one model: answers chats, records distributions, measures how far others are from them,
captures what its weights are multiplied with.

llama.cpp is called through llama-cpp-python's low-level functions. `Llama` is not used: it decodes one sequence at a
time, keeps a prefix cache that survives a change of adapter, takes NULL for a loaded adapter, and spends more time in
Python than a small model does in its matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib

from converters.llama_log import LlamaLog
from safelora_gguf.smoke.llama.capturing import Capturing, Done
from safelora_gguf.smoke.llama.chat import RENDER_SECONDS, chat_template, opened_reasoning
from safelora_gguf.smoke.llama.decoding import Decoder
from safelora_gguf.smoke.llama.distributions import (
    BrokenRecordError,
    Distributions,
    Record,
    Recorder,
    distributions,
    likeliest,
    log_odds,
)
from safelora_gguf.smoke.llama.errors import EngineError, PromptError
from safelora_gguf.smoke.llama.model import LlamaModel
from safelora_gguf.smoke.llama.readers import Continuation, Look, Prompt, Rereading
from safelora_gguf.smoke.protocol import (
    AdapterChoice,
    Answer,
    Continued,
    Divergence,
    InputGroup,
    Message,
    ModelOptions,
    Reading,
)

Tell = Callable[[], None]
"""Called before each decode: a sign of life may be given."""


@dataclass(frozen=True)
class Item:
    """A chat, under the asker's key."""

    key: int
    messages: tuple[Message, ...]


class Engine:
    """One loaded model with its context, and the adapters that are set at the moment.

    Raises:
        EngineError: llama.cpp does not load the model, or it has no chat template.
    """

    def __init__(self, options: ModelOptions, log: LlamaLog) -> None:
        self._options = options
        self._system = options.system
        self._seconds = options.prompt_seconds
        self._log = log
        self._adapters: list[tuple[Any, float]] = []
        self._capturing: Capturing | None = None
        self._captured = 0  # tokens decoded by those before
        self.model = LlamaModel(options, log)
        bos, eos = self.model.special_texts()
        self._render = chat_template(
            self.model.template,
            options.template,
            bos=bos,
            eos=eos,
            seconds=min(options.prompt_seconds, RENDER_SECONDS),
        )
        self._decoder = Decoder(self.model.pointer, options, log)
        self._decoder.warm_up(self.model.any_token)

    @property
    def n_ctx(self) -> int:
        """Most tokens that a prompt and its answer may have together."""
        return self._decoder.limit

    @property
    def decoded(self) -> int:
        """Tokens decoded so far."""
        return self._decoder.decoded + self._captured + (self._capturing.decoded if self._capturing else 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the report."""
        return self._decoder.notes

    def set_adapters(self, adapters: Sequence[AdapterChoice]) -> None:
        """These adapters and no others; none means the model alone. Nothing cached survives.

        Raises:
            EngineError: rejected: llama.cpp does not take one of them.
        """
        self._decoder.set_adapters(())
        while self._adapters:
            lib.llama_adapter_lora_free(self._adapters.pop()[0])
        for adapter in adapters:
            self._adapters.append((self.model.adapter(adapter.path), adapter.scale))
        self._decoder.set_adapters(self._adapters)

    def answers(
        self, items: Sequence[Item], tell: Tell, *, max_tokens: int, top: int, refusal: Sequence[int]
    ) -> Iterator[tuple[int, Answer]]:
        """Greedy answers, each under its item's key when it is finished.

        Raises:
            EngineError: a refusal token is none of the vocabulary.
        """
        if not all(0 <= token < self.model.n_vocab for token in refusal):
            raise EngineError("unsupported", f"refusal tokens: the vocabulary has ids 0 to {self.model.n_vocab - 1}")
        firsts: dict[int, tuple[tuple[tuple[int, float], ...], float | None]] = {}

        def look(key: int) -> Look:
            def at(logits: Any, index: int) -> None:
                if index == 0:
                    firsts[key] = likeliest(logits, top), log_odds(logits, refusal)

            return at

        for reader in self._continued(items, tell, max_tokens, look):
            if reader.error is not None:
                yield reader.key, Answer("", reader.error)
                continue
            text = reader.prompt.opened + self.model.text(reader.generated) if max_tokens else ""
            best, score = firsts.pop(reader.key, ((), None))
            yield reader.key, Answer(text, None, reader.stop, best, score)

    def continuations(self, items: Sequence[Item], tell: Tell, *, max_tokens: int) -> Iterator[tuple[int, Continued]]:
        """Greedy answers in tokens, each under its item's key when it is finished."""
        for reader in self._continued(items, tell, max_tokens, lambda _key: lambda _logits, _index: None):
            prompt, answer = tuple(reader.tokens), tuple(reader.generated)
            if reader.error is not None:
                yield reader.key, Continued(prompt, (), "", error=reader.error)
            else:
                text = reader.prompt.opened + self.model.text(answer) if max_tokens else ""
                yield reader.key, Continued(prompt, answer, text, reader.stop)

    def capture(
        self, readings: Mapping[int, Reading], weights: Sequence[str], tell: Tell, done: Done, *, file: Path
    ) -> tuple[tuple[InputGroup, ...], tuple[str, ...]]:
        """Writes what the weights are multiplied with at the kept positions; the groups of the file, and sentences for
        the report. See `capturing` for what is raised."""
        capturing = self._capturing = Capturing(self.model.pointer, self._options, self._log, self._adapters, weights)
        try:
            return capturing.run(readings, file, tell, done), capturing.notes
        finally:
            self._captured += capturing.decoded
            self._capturing = None

    def record(
        self, items: Sequence[Item], tell: Tell, *, max_tokens: int, file: Path
    ) -> Iterator[tuple[int, int, str | None]]:
        """The key of each item when it is recorded, its positions, and why there are none.

        Raises:
            EngineError: unwritable: `file`.
        """
        try:
            with file.open("wb") as stream:
                recorder = Recorder(stream, self.model.n_vocab, self.model.vocabulary())
                yield from self._recorded(items, tell, max_tokens, recorder)
                recorder.close()
        except OSError as error:
            raise EngineError("unwritable", f"the distributions can't be written: {error}") from error

    def diverge(self, file: Path, tell: Tell) -> Iterator[tuple[int, Divergence | None, str | None]]:
        """The key of each recorded item when it is read, how far this run is from it, and why that is not known.

        Raises:
            EngineError: rejected: the file is broken; unsupported: it is of another vocabulary.
        """
        try:
            record = Record(file)
            if (record.n_vocab, record.vocabulary) != (self.model.n_vocab, self.model.vocabulary()):
                raise EngineError("unsupported", "the models compared have different vocabularies")
            readers = [Rereading(item, record, self._seconds) for item in record.items]
            fit = [reader for reader in readers if len(reader.tokens) <= self.n_ctx]
            for reader in readers:
                if reader not in fit:
                    yield reader.key, None, self._too_long(len(reader.tokens))
            for index in self._decoder.run(fit, tell):
                divergence = fit[index].divergence()
                yield fit[index].key, divergence, fit[index].error
        except (BrokenRecordError, OSError) as error:
            raise EngineError("rejected", f"the recorded distributions can't be read: {error}") from error

    def _recorded(
        self, items: Sequence[Item], tell: Tell, max_tokens: int, recorder: Recorder
    ) -> Iterator[tuple[int, int, str | None]]:
        kept: dict[int, list[Distributions]] = {item.key: [] for item in items}

        def look(key: int) -> Look:
            return lambda logits, _index: kept[key].append(distributions(logits[None], recorder.kept))

        for reader in self._continued(items, tell, max_tokens, look):
            rows = kept.pop(reader.key)
            if reader.error is None and reader.chosen:
                recorder.add(reader.key, reader.tokens, reader.chosen, rows)
                yield reader.key, len(rows), None
            else:
                yield reader.key, 0, reader.error or f"nothing was decoded within {self._seconds:g} s"

    def _continued(
        self, items: Sequence[Item], tell: Tell, max_tokens: int, look: Callable[[int], Look]
    ) -> Iterator[Continuation]:
        """Each item's continuation when it has ended, those that can't begin first."""
        readers: list[Continuation] = []
        for item in items:
            tell()
            reader = self._continuation(item, max_tokens, look(item.key))
            if reader.error is None:
                readers.append(reader)
            else:
                yield reader
        for index in self._decoder.run(readers, tell):
            yield readers[index]

    def _continuation(self, item: Item, max_tokens: int, look: Look) -> Continuation:
        try:
            rendered = self._render(self._with_system(item.messages))
            tokens = self.model.tokens(rendered)
        except PromptError as error:
            return Continuation.impossible(item.key, error)
        room = self.n_ctx - len(tokens)
        if room < 1:
            return Continuation.impossible(item.key, PromptError(self._too_long(len(tokens))))
        prompt = Prompt(tokens, opened_reasoning(rendered))
        return Continuation(item.key, prompt, min(max_tokens, room), self.model.ends, look)

    def _with_system(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        if self._system is None or any(message["role"] == "system" for message in messages):
            return tuple(messages)
        return ({"role": "system", "content": self._system}, *messages)

    def _too_long(self, tokens: int) -> str:
        return f"the prompt is {tokens} tokens long, the context {self.n_ctx}"

"""llama.cpp through llama-cpp-python's low-level calls. Imported by the child process alone.

`Llama` is not used: it keeps a prefix cache that survives a change of adapter, takes NULL for a loaded
adapter, and spends more time in Python than a small model does in its matrices. Greedy decoding needs only
the largest logit.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from converters.llama_log import LlamaLog
from safelora_gguf.smoke.protocol import AdapterChoice, Answer, FailureKind, ModelOptions

DEFAULT_CTX = 4096
BATCH = 512

# Some templates print the date; with today's, the same inputs would give other answers tomorrow.
TEMPLATE_DATE = datetime(2024, 7, 26)

# A template that ends inside a reasoning block: the answer begins in it, and the judge must know.
_OPENED_REASONING = re.compile(r"(<think(?:ing)?>|\[THINK\])\s*$")


class EngineError(Exception):
    """llama.cpp, or the model, won't; the process is sound and may go on."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class PromptError(Exception):
    """This prompt can't be answered, others may be."""


class Engine:
    """One loaded model with its context, and the adapters that are set at the moment."""

    def __init__(self, options: ModelOptions, log: LlamaLog) -> None:
        self._options = options
        self._log = log
        self._adapters: list[Any] = []
        lib.llama_backend_init()
        self._model = self._load_model()
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._bos = lib.llama_vocab_bos(self._vocab)
        self._template = self._chat_template()
        self._context = self._new_context()
        self._logits = _LogitsView(lib.llama_vocab_n_tokens(self._vocab))
        self._warm_up()

    def set_adapters(self, adapters: Sequence[AdapterChoice]) -> None:
        """These adapters and no others; none means the model alone. Nothing cached survives."""
        lib.llama_set_adapters_lora(self._context, None, 0, None)
        while self._adapters:
            lib.llama_adapter_lora_free(self._adapters.pop())
        for adapter in adapters:
            self._adapters.append(self._load_adapter(adapter.path))
        if adapters:
            pointers = (lib.llama_adapter_lora_p_ctypes * len(adapters))(*self._adapters)
            scales = (ctypes.c_float * len(adapters))(*(adapter.scale for adapter in adapters))
            if lib.llama_set_adapters_lora(self._context, pointers, len(adapters), scales) != 0:
                raise EngineError("rejected", self._log.reason("llama.cpp could not apply the adapter"))
        self._forget()

    def answer(self, prompt: str) -> Answer:
        """Greedy continuation of the chat that consists of `prompt` (and the system text)."""
        self._log.clear()
        try:
            rendered = self._render(prompt)
            opened = _OPENED_REASONING.search(rendered)
            text = self._text(self._generate(self._tokens(rendered)))
        except PromptError as error:
            return Answer("", str(error))
        return Answer(opened.group(1) + text if opened else text)

    def _load_model(self) -> Any:
        self._log.clear()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0x7FFFFFFF if self._options.gpu_layers < 0 else self._options.gpu_layers
        model = lib.llama_model_load_from_file(os.fsencode(self._options.model), params)
        if not model:
            raise EngineError("rejected", self._log.reason("llama.cpp could not load the model"))
        if lib.llama_model_has_encoder(model) or not lib.llama_model_has_decoder(model):
            raise EngineError("unsupported", "the model is no decoder-only language model; smoke can't chat with it")
        return model

    def _new_context(self) -> Any:
        trained = lib.llama_model_n_ctx_train(self._model)
        self._n_ctx = self._options.ctx or min(trained if trained > 0 else DEFAULT_CTX, DEFAULT_CTX)
        self._n_batch = min(self._n_ctx, BATCH)
        params = lib.llama_context_default_params()
        params.n_ctx = self._n_ctx
        params.n_batch = params.n_ubatch = self._n_batch
        params.n_threads = params.n_threads_batch = self._options.threads
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise EngineError(
                "rejected", self._log.reason(f"llama.cpp could not make a context of {self._n_ctx} tokens")
            )
        return context

    def _chat_template(self) -> Jinja2ChatFormatter:
        source = lib.llama_model_chat_template(self._model, None)
        if not source:
            raise EngineError("unsupported", "the model has no chat template (tokenizer.chat_template)")
        try:
            bos, eos = (self._piece(token(self._vocab)) for token in (lib.llama_vocab_bos, lib.llama_vocab_eos))
            formatter = Jinja2ChatFormatter(source.decode("utf-8"), eos_token=eos, bos_token=bos)
        except Exception as error:  # a stranger's template: Jinja raises many kinds
            raise EngineError("unsupported", f"the model's chat template can't be read: {_told(error)}") from error
        formatter.strftime_now = TEMPLATE_DATE.strftime  # type: ignore[assignment, method-assign]
        return formatter

    def _piece(self, token: int) -> str:
        text = lib.llama_vocab_get_text(self._vocab, token) if token >= 0 else b""
        return bytes(text or b"").decode("utf-8", errors="replace")

    def _load_adapter(self, path: str) -> Any:
        self._log.clear()
        pointer = lib.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not pointer:  # ctypes gives a falsy pointer for NULL, not None
            raise EngineError("rejected", self._log.reason("llama.cpp could not load the adapter"))
        return pointer

    def _render(self, prompt: str) -> str:
        messages: list[Any] = [{"role": "user", "content": prompt}]
        if self._options.system is not None:
            messages.insert(0, {"role": "system", "content": self._options.system})
        try:
            return str(self._template(messages=messages).prompt)
        except Exception as error:  # a stranger's template: Jinja raises many kinds
            raise PromptError(f"the chat template raised {_told(error)}") from error

    def _tokens(self, rendered: str) -> list[int]:
        """Special tokens are parsed, and BOS stands first exactly once where the vocabulary wants one."""
        data = rendered.encode("utf-8", errors="replace")
        room = len(data) + 16
        tokens = (lib.llama_token * room)()
        count = lib.llama_tokenize(self._vocab, data, len(data), tokens, room, False, True)
        if count < 0:
            raise PromptError("llama.cpp could not tokenize the prompt")
        found = list(tokens[:count])
        if lib.llama_vocab_get_add_bos(self._vocab) and self._bos >= 0 and found[:1] != [self._bos]:
            found.insert(0, self._bos)
        if not found:
            raise PromptError("the chat template gave an empty prompt")
        return found

    def _generate(self, tokens: list[int]) -> list[int]:
        room = self._n_ctx - len(tokens)
        if room < 1:
            raise PromptError(f"the prompt is {len(tokens)} tokens long, the context {self._n_ctx}")
        self._forget()
        for start in range(0, len(tokens), self._n_batch):
            self._decode(tokens[start : start + self._n_batch])
        generated: list[int] = []
        token = self._likeliest()
        while not lib.llama_vocab_is_eog(self._vocab, token):
            generated.append(token)
            if len(generated) >= min(self._options.max_tokens, room):
                break
            self._decode([token])
            token = self._likeliest()
        return generated

    def _decode(self, tokens: list[int]) -> None:
        array = (lib.llama_token * len(tokens))(*tokens)
        status = lib.llama_decode(self._context, lib.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise PromptError(self._log.reason(f"llama_decode returned {status}"))

    def _likeliest(self) -> int:
        logits = self._logits.at(lib.llama_get_logits_ith(self._context, -1))
        token = int(logits.argmax())
        if np.isnan(logits[token]):  # argmax stops at the first NaN
            raise PromptError("llama.cpp computed logits that are not numbers (NaN)")
        return token

    def _text(self, tokens: list[int]) -> str:
        """Special tokens stay visible: reasoning tags often are such."""
        array = (lib.llama_token * len(tokens))(*tokens)
        size = 16 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = lib.llama_detokenize(self._vocab, array, len(tokens), buffer, size, False, True)
            if length >= 0:
                return buffer.raw[:length].decode("utf-8", errors="replace")
            size = -length

    def _forget(self) -> None:
        memory = lib.llama_get_memory(self._context)
        if memory:
            lib.llama_memory_clear(memory, True)

    def _warm_up(self) -> None:
        """Read the mapped weights now, within the time limit for loading, and not within the first
        prompt's."""
        self._log.clear()
        try:
            self._decode([max(self._bos, 0)])
        except PromptError as error:
            raise EngineError("rejected", str(error)) from error
        self._forget()


class _LogitsView:
    """The logits that llama.cpp owns, as an array; made anew only where they moved."""

    def __init__(self, count: int) -> None:
        self._type = ctypes.c_float * count
        self._address: int | None = None
        self._array: Any = None

    def at(self, pointer: Any) -> Any:
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        if address is None:
            raise PromptError("llama.cpp gave no logits")
        if address != self._address:
            self._array = np.ctypeslib.as_array(self._type.from_address(address))
            self._address = address
        return self._array


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"

"""Logits of llama.cpp for given tokens, as one .npy array (tokens, vocabulary) on standard output.

    python llama_child.py MODEL ADAPTER|- TOKEN,TOKEN,...

A process of its own: llama.cpp ends the process that gives it an adapter it dislikes. One thread, because
several spin at barriers while others use the cores; caches in F32, so that what remains is the adapter's.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

F32 = 0  # GGML_TYPE_F32


def open_context(model: Any) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = F32
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = lib.llama_init_from_model(model, params)
    assert context, "llama.cpp made no context"
    return context


def set_adapter(model: Any, context: Any, path: str) -> None:
    adapter = lib.llama_adapter_lora_init(model, os.fsencode(path))
    assert adapter, f"llama.cpp rejected {path}"
    pointers = (lib.llama_adapter_lora_p_ctypes * 1)(adapter)
    scales = (lib.ctypes.c_float * 1)(1.0)
    assert lib.llama_set_adapters_lora(context, pointers, 1, scales) == 0, f"llama.cpp did not apply {path}"


def logits(context: Any, tokens: list[int], vocabulary: int) -> np.ndarray:
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, True
    assert lib.llama_decode(context, batch) == 0, "llama_decode failed"
    rows = [lib.llama_get_logits_ith(context, place) for place in range(len(tokens))]
    return np.stack([np.ctypeslib.as_array(row, (vocabulary,)).copy() for row in rows])


def main(model_path: str, adapter_path: str, token_list: str) -> None:
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(os.fsencode(model_path), lib.llama_model_default_params())
    assert model, f"llama.cpp rejected {model_path}"
    context = open_context(model)
    if adapter_path != "-":
        set_adapter(model, context, adapter_path)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    np.save(sys.stdout.buffer, logits(context, [int(token) for token in token_list.split(",")], vocabulary))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""llama.cpp's logits of several models for the same sequences of tokens, as one .npz on standard output.

    python llama_models_child.py TOKEN,TOKEN:TOKEN,TOKEN... MODEL...

Each model's array, by its place, has the sequences' logits one after another: (tokens, vocabulary).
"""

from __future__ import annotations

import os
import sys

import llama_cpp.llama_cpp as lib
import numpy as np
from llama_child import logits, open_context  # the directory of this file leads the search path


def logits_of(path: str, sequences: list[list[int]]) -> np.ndarray:
    model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
    assert model, f"llama.cpp rejected {path}"
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    found = []
    for tokens in sequences:
        context = open_context(model)
        found.append(logits(context, tokens, vocabulary))
        lib.llama_free(context)
    lib.llama_model_free(model)
    return np.concatenate(found)


def main(lists: str, *paths: str) -> None:
    lib.llama_backend_init()
    sequences = [[int(token) for token in tokens.split(",")] for tokens in lists.split(":")]
    np.savez(sys.stdout.buffer, *(logits_of(path, sequences) for path in paths))


if __name__ == "__main__":
    main(*sys.argv[1:])

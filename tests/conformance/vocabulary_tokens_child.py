"""llama.cpp's tokens of texts, by the vocabularies of GGUF files that hold nothing else.

    python vocabulary_tokens_child.py < JOBS > TOKENS

JOBS is a JSON list of [file, texts, whether special tokens are added]; TOKENS the list of their lists of tokens.
"""

from __future__ import annotations

import json
import sys

import llama_cpp

_MOST = 4096  # tokens of a text


def tokens(model: object, text: str, *, special: bool) -> list[int]:
    data = text.encode()
    room = (llama_cpp.llama_token * _MOST)()
    count = llama_cpp.llama_tokenize(
        llama_cpp.llama_model_get_vocab(model), data, len(data), room, _MOST, special, True
    )
    assert 0 <= count <= _MOST, f"{text!r}: {count} tokens"
    return list(room[:count])


def main() -> None:
    found = []
    for path, texts, special in json.load(sys.stdin):
        options = llama_cpp.llama_model_default_params()
        options.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        assert model, f"{path} was rejected"
        found.append([tokens(model, text, special=special) for text in texts])
        llama_cpp.llama_model_free(model)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

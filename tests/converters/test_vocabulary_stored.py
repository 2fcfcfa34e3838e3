"""Vocabularies out of GGUF files. Oracles: the files' own bytes, packed by hand; the tokenizers library's numbers."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
from gguf_bytes import BIG, INT32, LITTLE
from tokenizers import Tokenizer
from tokenizers_tiny import write_bpe, write_sentencepiece
from vocabularies import SCORES, TOKENS, TYPES, add_tokens, edit, read, stored, value

from converters.errors import FileMissingError, FormatError, MismatchError, UnsupportedError
from converters.gguf_header import read_gguf_header
from converters.vocabulary import extended_vocabulary, vocabulary_from_gguf

_KEYS: list[tuple[str | bytes, bytes]] = [
    ("general.architecture", LITTLE.text("llama")),
    ("tokenizer.ggml.model", LITTLE.text("gpt2")),
    (TOKENS, LITTLE.array(8, [LITTLE.string(token) for token in ("a", b"\xff\x00b", "c d")])),
    (TYPES, LITTLE.array(INT32, [struct.pack("<i", kind) for kind in (1, 3, 4)])),
    ("tokenizer.ggml.strange", LITTLE.scalar(10, "Q", 1 << 60)),
    ("tokenizer.chat_template", LITTLE.text("{{ x }}\r\n")),
]


def test_a_gguf_vocabulary_is_copied_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(LITTLE.file(_KEYS))
    found = vocabulary_from_gguf(path, 3)
    assert found.size == 3
    assert found.sources == (path,)
    assert [entry for _, entry in found.entries] == [LITTLE.string(key) + value for key, value in _KEYS[1:]]


def test_a_shorter_gguf_vocabulary_is_filled_up(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(LITTLE.file(_KEYS))
    found = vocabulary_from_gguf(path, 5)
    assert found.size == 5
    assert "3 tokens" in found.notes[0]
    assert value(found, TOKENS, tmp_path)[2:] == ["c d", "[PAD3]", "[PAD4]"]
    assert value(found, TYPES, tmp_path) == [1, 3, 4, 5, 5]
    others = [LITTLE.string(key) + value for key, value in _KEYS[4:]]
    assert [entry for _, entry in found.entries][3:] == others


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (LITTLE.file(_KEYS), MismatchError),  # more tokens than the embedding has rows
        (LITTLE.file(_KEYS[:2]), MismatchError),
        (LITTLE.file([_KEYS[0], _KEYS[2]]), MismatchError),
        (LITTLE.file([*_KEYS[:2], (TOKENS, LITTLE.array(INT32, [bytes(4)] * 2))]), FormatError),
        (LITTLE.file([*_KEYS[:2], (TOKENS, LITTLE.text("a"))]), FormatError),
        (
            BIG.file([("tokenizer.ggml.model", BIG.text("gpt2")), (TOKENS, BIG.array(8, [BIG.string("a")]))]),
            UnsupportedError,
        ),
        (b"GGUF", FormatError),
    ],
)
def test_gguf_files_without_a_fitting_vocabulary(data: bytes, error: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(error):
        vocabulary_from_gguf(path, 2)


@pytest.mark.parametrize("form", ["llama-bpe", "qwen2", "spm", "spm by tokenizer.json"])
def test_a_gguf_vocabulary_with_the_tokens_of_a_directory(form: str, tmp_path: Path) -> None:
    """Oracle: the tokenizers library's numbers, or those that the file lists."""
    spm, made = form.startswith("spm"), tmp_path / "tokenizer"
    write_sentencepiece(made, tokenizer_json=True) if spm else write_bpe(made, form)
    header = read_gguf_header(stored(read(made, 512, "qwen2" if form == "qwen2" else "llama"), tmp_path / "model.gguf"))
    if form == "spm":
        (made / "tokenizer.json").unlink()
        new = {"512": {"content": "<|new|>", "special": True}, "513": {"content": "plain", "special": False}}
        edit(made / "tokenizer_config.json", lambda data: data["added_tokens_decoder"].update(new))
        wanted = ["<|new|>", "plain"]
    else:
        add_tokens(made, "<|new|>")
        add_tokens(made, "plain", special=False)
        oracle = Tokenizer.from_file(str(made / "tokenizer.json"))
        wanted = [oracle.id_to_token(512), oracle.id_to_token(513)]
    found = extended_vocabulary(header, made, 515)
    assert value(found, TOKENS, tmp_path)[512:] == [*wanted, "[PAD514]"]
    assert value(found, TYPES, tmp_path)[512:] == [3, 4, 5]
    assert value(found, TOKENS, tmp_path)[:512] == header.value(TOKENS)
    kept = [key for key in header.entries if key not in (TOKENS, TYPES, SCORES)]
    assert {key: value(found, key, tmp_path) for key in kept} == {key: header.value(key) for key in kept}
    if spm:
        assert value(found, SCORES, tmp_path) == [*header.value(SCORES), -1000.0, -1000.0, -10000.0]


def test_new_tokens_take_the_place_of_padding(tmp_path: Path) -> None:
    write_bpe(tmp_path / "tokenizer", "qwen2")
    header = read_gguf_header(stored(read(tmp_path / "tokenizer", 520, "qwen2"), tmp_path / "model.gguf"))
    add_tokens(tmp_path / "tokenizer", "<|new|>")
    found = extended_vocabulary(header, tmp_path / "tokenizer", 520)
    assert value(found, TOKENS, tmp_path)[511:514] == ["<|im_end|>", "<|new|>", "[PAD513]"]


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write_bpe(tmp_path / "one", "qwen2")
    write_bpe(tmp_path / "two", "llama-bpe", 514)
    header = read_gguf_header(stored(read(tmp_path / "one", 512, "qwen2"), tmp_path / "model.gguf"))
    with pytest.raises(MismatchError, match="the tokenizer of another model"):
        extended_vocabulary(header, tmp_path / "two", 514)
    shutil.rmtree(tmp_path / "two")
    (tmp_path / "two").mkdir()
    with pytest.raises(FileMissingError, match=r"no tokenizer\.json"):
        extended_vocabulary(header, tmp_path / "two", 514)

"""Tokenizer files that lie. Oracle: the bytes and texts of this table; each must end in one of our errors.

Files of protocol buffers are packed by hand, since every library refuses to write them.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers_tiny import write_bpe, write_sentencepiece

from converters.architectures import find_architecture
from converters.errors import InputError
from converters.vocabulary import read_vocabulary

Lie = Callable[[Path], None]


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def field(tag: int, data: bytes, length: int | None = None) -> bytes:
    return varint(tag << 3 | 2) + varint(len(data) if length is None else length) + data


def piece(text: bytes, score: float = 0.0, kind: int = 1) -> bytes:
    return field(1, field(1, text) + varint(2 << 3 | 5) + struct.pack("<f", score) + varint(3 << 3) + varint(kind))


_GOOD = piece(b"<unk>", 0.0, 2) + piece(b"a") + piece(b"b")
PIECES: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a protocol buffer",
    "json": b'{"model": {}}',
    "a pickle": b"\x80\x04\x95\x00",
    "cut off in a piece": _GOOD[:-3],
    "cut off in a number": _GOOD + b"\x80",
    "a number without end": _GOOD + b"\xff" * 20,
    "a length beyond the file": _GOOD + field(1, b"x", 1 << 40),
    "a length beyond its message": field(1, field(1, b"abc", 100)) + _GOOD,
    "a length of 2^63": _GOOD + b"\x0a" + varint(1 << 63),
    "field number 0": _GOOD + b"\x02\x00",
    "wire type 3": _GOOD + b"\x0b",
    "wire type 7": _GOOD + b"\x0f",
    "score NaN": _GOOD + piece(b"c", float("nan")),
    "score infinite": _GOOD + piece(b"c", float("-inf")),
    "score of 2 bytes": _GOOD + field(1, field(1, b"c") + b"\x15\x00\x00"),
    "type 0": _GOOD + piece(b"c", 0.0, 0),
    "type 2^60": _GOOD + piece(b"c", 0.0, 1 << 60),
    "no UTF-8": _GOOD + piece(b"\xc3\x28"),
    "an empty piece": _GOOD + piece(b""),
    "a piece of 5000 bytes": _GOOD + piece(b"x" * 5000),
    "a piece twice": _GOOD + piece(b"a"),
    "a zero byte that makes two the same": _GOOD + piece(b"a\0c"),
    "called like the padding": _GOOD + piece(b"[PAD5]"),
    "half a million pieces and more": b"\x0a\x03\x0a\x01a" * ((1 << 19) + 1),
    "nothing but unknown fields": varint(900 << 3) + varint(5),
}


def _text(text: str | bytes) -> Lie:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda directory: _write(directory / "tokenizer.json", data)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _json(change: Callable[[Any], Any]) -> Lie:
    def lie(directory: Path) -> None:
        path = directory / "tokenizer.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return lie


def _model(**values: Any) -> Lie:
    return _json(lambda data: data["model"].update(values))


def _vocab(**values: Any) -> Lie:
    return _json(lambda data: data["model"]["vocab"].update(values))


def _merge(merge: Any) -> Lie:
    return _json(lambda data: data["model"]["merges"].append(merge))


def _added(**values: Any) -> Lie:
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    return _json(lambda data: data["added_tokens"].append({"id": 512, "content": "<new>", **flags, **values}))


def _config(text: str) -> Lie:
    return lambda directory: _write(directory / "tokenizer_config.json", text.encode())


def _pre(section: Any) -> Lie:
    return _json(lambda data: data.update(pre_tokenizer=section))


def _surrogate(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|im_end|>", "\\ud800"), encoding="utf-8")


def _double_key(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"vocab": {', '"vocab": {"a": 1, "a": 2,'), encoding="utf-8"
    )


def _is_directory(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").mkdir()


FILES: dict[str, Lie] = {
    "empty": _text(""),
    "no object": _text("[]"),
    "no JSON": _text('{"model": '),
    "no UTF-8": _text(b'{"model": "\xff"}'),
    "deep": _text('{"model": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "deep objects": _text('{"a":' * 60_000 + "1" + "}" * 60_000),
    "an integer of 100000 digits": _text('{"model": ' + "1" * 100_000 + "}"),
    "very many values": _text('{"model": [' + "[]," * (1 << 22) + "[]]}"),
    "a directory": _is_directory,
    "a surrogate": _surrogate,
    "a token twice": _double_key,
    "a model that is a list": _json(lambda data: data.update(model=[])),
    "no model": _json(lambda data: data.pop("model")),
    "no vocabulary": _model(vocab=None),
    "a vocabulary that is a list": _model(vocab=[["a", 0.0]]),
    "an empty vocabulary": _model(vocab={}),
    "number 2^40": _vocab(far=1 << 40),
    "number -1": _vocab(far=-1),
    "number 1.5": _vocab(far=1.5),
    "number true": _vocab(far=True),
    "number as a text": _vocab(far="600"),
    "number 10^400": _vocab(far=10**400),
    "two tokens with one number": _vocab(far=3),
    "beyond the embedding": _vocab(far=5000),
    "an empty token": _vocab(**{"": 509}),
    "a token of 5000 letters": _vocab(**{"x" * 5000: 509}),
    "a token called like the padding": _vocab(**{"[PAD513]": 512}),
    "no merges": _model(merges=None),
    "an empty list of merges": _model(merges=[]),
    "merges that are a number": _model(merges=1_000_000_000),
    "a merge that is a number": _merge(1_000_000_000),
    "a merge of three": _merge("a b c"),
    "a merge of one": _merge(["a"]),
    "a merge of numbers": _merge([1, 2]),
    "a merge of unknown tokens": _merge(["qqqq", "a"]),
    "a merge that makes no token": _merge("q \u0120the"),
    "added tokens that are an object": _json(lambda data: data.update(added_tokens={"a": 1})),
    "an added token that is a text": _json(lambda data: data["added_tokens"].append("<new>")),
    "an added token with number 2^40": _added(id=1 << 40),
    "an added token without a number": _added(id=None),
    "an added token after a gap": _added(id=514),
    "an added token beyond the embedding": _json(
        lambda data: data["added_tokens"].extend(
            {"id": 512 + at, "content": f"<{at}>", "special": True} for at in range(100)
        )
    ),
    "an added token with another one's number": _added(id=511),
    "an added token that is a number": _added(content=5),
    "an empty added token": _added(content=""),
    "an added token that is half a letter": _added(content="\ud800"),
    "a pre-tokenizer that is a list": _pre([]),
    "a pre-tokenizer of a million": _pre({"type": "Sequence", "pretokenizers": [{"type": "Digits"}] * 60_000}),
    "a pre-tokenizer of texts": _pre({"type": "Sequence", "pretokenizers": ["Digits", "ByteLevel"]}),
    "a pre-tokenizer that is empty": _pre({"type": "Sequence", "pretokenizers": []}),
    "a pre-tokenizer whose expression is a number": _pre(
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": 5}},
                {"type": "ByteLevel", "add_prefix_space": False},
            ],
        }
    ),
    "a type that is an object": _pre({"type": {"type": "ByteLevel"}}),
    "a normalizer of numbers": _json(lambda data: data.update(normalizer={"type": "Sequence", "normalizers": [1]})),
    "tokenizer_config.json is a list": _config("[]"),
    "tokenizer_config.json is damaged": _config("{"),
    "added_tokens_decoder is a list": _config('{"added_tokens_decoder": [1]}'),
    "added_tokens_decoder with letters": _config('{"added_tokens_decoder": {"x": {"content": "a"}}}'),
    "added_tokens_decoder with -1": _config('{"added_tokens_decoder": {"-1": {"content": "a"}}}'),
    "added_tokens_decoder with 2^40": _config('{"added_tokens_decoder": {"1099511627776": {"content": "a"}}}'),
    "added_tokens_decoder with 10^5000": _config('{"added_tokens_decoder": {"' + "9" * 5000 + '": {"content": "a"}}}'),
    "added_tokens_decoder with a digit of another script": _config('{"added_tokens_decoder": {"٣": {"content": "a"}}}'),
    "added_tokens_decoder without a content": _config('{"added_tokens_decoder": {"512": {}}}'),
    "a template that is half a letter": _config('{"chat_template": "\\ud800"}'),
    "a named template that is half a letter": _config('{"chat_template": [{"name": "x", "template": "\\ud800"}]}'),
}

HARMLESS: dict[str, Lie] = {
    "a post-processor of texts": _json(lambda data: data.update(post_processor={"processors": ["x", 1, None]})),
    "a template of numbers": _json(
        lambda data: data.update(
            post_processor={"type": "TemplateProcessing", "single": [1, {"SpecialToken": 2}], "pair": 7}
        )
    ),
    "names that are numbers": _config('{"bos_token": 5, "eos_token": {"content": 6}, "add_bos_token": "yes"}'),
    "templates that are numbers": _config('{"chat_template": [1, {"name": 2, "template": 3}, {"name": "x"}]}'),
    "a template that is an object": _config('{"chat_template": {"a": 1}}'),
}


def read(directory: Path, config: Any = None) -> None:
    table = find_architecture("qwen2" if (directory / "tokenizer.json").exists() else "llama")
    assert table is not None
    read_vocabulary(directory, config or {}, table, 520)


@pytest.mark.parametrize("lie", PIECES)
def test_a_tokenizer_model_that_lies(lie: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(PIECES[lie])
    with pytest.raises(InputError, match=r"tokenizer\.model: "):
        read(tmp_path)


def test_the_table_starts_from_a_sound_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(_GOOD)
    read(tmp_path)


def test_a_damaged_tokenizer_model_ends_in_an_error_or_other_pieces(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, 340)
    data, source = (tmp_path / "tokenizer.model").read_bytes(), random.Random(3)
    damaged = [data[:length] for length in range(0, len(data), 37)]
    for _ in range(200):
        at = source.randrange(len(data))
        damaged.append(data[:at] + source.randbytes(source.choice((1, 1, 2, 8))) + data[at + 1 :])
    assert sum(is_refused(tmp_path, "tokenizer.model", bad) for bad in damaged) > len(damaged) // 2


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_any_value_in_the_place_of_any_other_ends_in_an_error_or_is_read(file: str, tmp_path: Path) -> None:
    write_bpe(tmp_path, "llama-bpe", 340)
    text, source = (tmp_path / file).read_text(encoding="utf-8"), random.Random(5)
    others = [None, True, -1, 1 << 70, 0.5, "", "x", [], [[]], {}, {"type": "Sequence"}, {"content": 1}, ["\ud800"]]
    refused = 0
    for _ in range(300):
        data = json.loads(text)
        place = data
        while True:
            # Each table is entered by one of its first keys, so that the vocabulary does not take all the turns.
            keys = list(place)[:8] if isinstance(place, dict) else list(range(len(place)))
            key = source.choice(keys)
            if not isinstance(place[key], dict | list) or not place[key] or source.random() < 0.3:
                place[key] = source.choice(others)
                break
            place = place[key]
        refused += is_refused(tmp_path, file, json.dumps(data).encode())
    assert 0 < refused < 300


def is_refused(directory: Path, name: str, data: bytes) -> bool:
    (directory / name).write_bytes(data)
    try:
        read(directory)
    except InputError:
        return True
    return False


@pytest.mark.parametrize("lie", FILES)
def test_files_that_lie(lie: str, tmp_path: Path) -> None:
    write_bpe(tmp_path, "qwen2")
    FILES[lie](tmp_path)
    with pytest.raises(InputError, match=r"tokenizer(_config)?\.json: "):
        read(tmp_path)


@pytest.mark.parametrize("lie", HARMLESS)
def test_what_is_of_no_consequence(lie: str, tmp_path: Path) -> None:
    write_bpe(tmp_path, "qwen2")
    HARMLESS[lie](tmp_path)
    read(tmp_path)


@pytest.mark.parametrize("number", [-1, 1 << 40, 1.5, "5", True, None, [1, 2], {}])
def test_numbers_in_config_json_that_are_none_are_left_out(number: Any, tmp_path: Path) -> None:
    write_bpe(tmp_path, "qwen2")
    table = find_architecture("qwen2")
    assert table is not None
    keys = dict(read_vocabulary(tmp_path, {"bos_token_id": number, "text_config": 3}, table, 520).entries)
    assert "tokenizer.ggml.bos_token_id" not in keys

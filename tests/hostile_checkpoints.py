"""Checkpoints whose config.json, tokenizer or chat template lies, made of a sound one by changing one file.

Every maker takes the directory, which holds links to a sound checkpoint's files with a SentencePiece vocabulary and its
form in tokenizer.json, and changes it in place.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

MB = 1 << 20
NAN, INF = float("nan"), float("inf")
Change = Callable[[Path], object]

SPM, JSON, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"


def placed(file: str, what: bytes | int | Change) -> Change:
    """The file's bytes, or its length of nothing, or what makes it."""

    def change(directory: Path) -> None:
        path = directory / file
        path.unlink(missing_ok=True)
        if callable(what):
            what(path)
        else:
            path.write_bytes(what if isinstance(what, bytes) else b"")
            os.truncate(path, what if isinstance(what, int) else len(what))

    return change


def config(**changed: Any) -> Change:
    return edited("config.json", lambda table: table.update(changed))


def settings(**changed: Any) -> Change:
    return edited(SETTINGS, lambda table: table.update(changed))


def edited(file: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(directory: Path) -> None:
        table = json.loads((directory / file).read_text(encoding="utf-8"))
        edit(table)
        placed(file, json.dumps(table).encode())(directory)

    return change


def tokenizer(edit: Callable[[dict[str, Any]], object]) -> Change:
    """A changed tokenizer.json, without the tokenizer.model that would count instead."""
    return both(lambda directory: (directory / SPM).unlink(), edited(JSON, edit))


def model_part(**changed: Any) -> Change:
    return tokenizer(lambda table: table["model"].update(changed))


def added(**entry: Any) -> Change:
    return tokenizer(lambda table: table["added_tokens"].append(entry))


def both(*changes: Change) -> Change:
    return lambda directory: [change(directory) for change in changes]


def json_alone(what: bytes | int | Change) -> Change:
    return both(lambda directory: (directory / SPM).unlink(), placed(JSON, what))


def template_file(name: str, what: bytes | int | Change) -> Change:
    """A template beside the settings, which then have none."""
    return both(edited(SETTINGS, lambda table: table.pop("chat_template", None)), placed(name, what))


def longer(more: bytes) -> Change:
    """The sound tokenizer.model with bytes behind it."""
    return lambda directory: placed(SPM, (directory / SPM).read_bytes() + more)(directory)


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(tag: int, data: bytes, length: int | None = None) -> bytes:
    return varint(tag << 3 | 2) + varint(len(data) if length is None else length) + data


def piece(text: bytes, score: float = 0.0, more: bytes = b"") -> bytes:
    return field(1, field(1, text) + varint(2 << 3 | 5) + struct.pack("<f", score) + more)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
NUMBERS = "expected a (whole|finite) number"

CONFIG_VALUES: dict[str, tuple[Change, str]] = {
    "a billion layers": (config(num_hidden_layers=10**9), NUMBERS),
    "4096 layers of two": (config(num_hidden_layers=4096), "incomplete"),
    "layers of 4000 digits": (config(num_hidden_layers=10**4000), NUMBERS),
    "true layers": (config(num_hidden_layers=True), NUMBERS),
    "a width of 3 MB": (config(hidden_size="x" * 3 * MB), NUMBERS),
    "a width of 2^70": (config(intermediate_size=1 << 70), NUMBERS),
    "a list of widths": (config(intermediate_size=[1] * 100_000), NUMBERS),
    "no heads": (config(num_attention_heads=0), NUMBERS),
    "heads that don't divide": (config(num_attention_heads=7), "can't be 7 heads"),
    "escapes for heads": (config(num_key_value_heads="\x1b[2J\n" * 1000), NUMBERS),
    "NaN for a frequency": (config(rope_theta=NAN), NUMBERS),
    "a frequency of 400 digits": (config(rope_theta=10**400), NUMBERS),
    "a negative epsilon": (config(rms_norm_eps=-1), NUMBERS),
    "a context of 2^70": (config(max_position_embeddings=1 << 70), NUMBERS),
    "a scaling that is a list": (config(rope_scaling=[]), "expected an object"),
    "a scaling of escapes": (config(rope_scaling={"type": "\x1b[2J\n"}), "the rope type"),
    "a scaling by NaN": (config(rope_scaling=LLAMA3 | {"factor": NAN}), NUMBERS),
    "a scaling between equals": (config(rope_scaling=LLAMA3 | {"high_freq_factor": 1.0}), "high_freq_factor|between"),
    "a scaling by 0": (config(rope_scaling=LLAMA3 | {"low_freq_factor": 0}), NUMBERS),
    "factors of 100,000": (config(rope_scaling={"type": "longrope", "long_factor": [1.0] * 100_000}), "rope type"),
    "classes in a list": (config(architectures=[["x"]]), "architectures"),
    "a vocabulary of 10^12": (config(vocab_size=10**12), NUMBERS),
}

PIECES: dict[str, tuple[Change, str]] = {
    "nothing": (placed(SPM, b""), "no pieces"),
    "a terabyte": (placed(SPM, 1 << 40), "more than"),
    "a pipe": (placed(SPM, os.mkfifo), "no regular file"),
    "a directory": (placed(SPM, Path.mkdir), "directory"),
    "/dev/zero": (placed(SPM, lambda path: path.symlink_to("/dev/zero")), "no regular file"),
    "a length of 2^63": (placed(SPM, field(1, b"x", 1 << 63)), "claims 9223372036854775808 bytes"),
    "a length past the end": (placed(SPM, field(1, b"x", 10)), "claims 10 bytes"),
    "a number without end": (placed(SPM, b"\x0a" + b"\x80" * 1000), "more than 10 bytes"),
    "a million groups": (longer(varint(9 << 3 | 3) * 10**6), "wire type 3"),
    "ten million fields": (longer(b"\x78\x00" * 10**7), "no pieces"),
    "ten million fields in a piece": (longer(field(1, b"\x78\x00" * 10**7)), "more fields"),
    "ten million fields in a specification": (longer(field(2, b"\x78\x00" * 10**7)), "more fields"),
    "a million empty pieces": (placed(SPM, field(1, b"") * 10**6), "has 0 bytes"),
    "a piece of 20 MB": (longer(piece(b"x" * 20 * MB)), "has 20971520 bytes"),
    "a score of NaN": (longer(piece(b"zz", NAN)), "score nan"),
    "a type of 2^63": (longer(piece(b"zz", more=varint(3 << 3) + varint(1 << 63))), "the type 9223372036854775808"),
    "a piece that is no text": (longer(piece(b"\xff\xfe")), "UTF-8"),
    "a piece twice": (longer(piece(b"zz") * 2), "stands twice"),
    "a field 0": (longer(b"\x00\x00"), "the number 0"),
}

TOKENIZERS: dict[str, tuple[Change, str]] = {
    "a terabyte": (json_alone(1 << 40), "more than"),
    "a pipe": (json_alone(os.mkfifo), "no regular file"),
    "100,000 brackets": (json_alone(b"[" * 100_000), "nested"),
    "500,000 objects": (json_alone(b'{"a":[' + b"{}," * 500_000 + b"{}]}"), "more than any in use|more of both"),
    "a list": (json_alone(b"[]"), "expected a JSON object"),
    "a model that is a list": (tokenizer(lambda table: table.update(model=[])), "expected an object"),
    "a type of 1 MB": (model_part(type="x" * MB), "expected 'BPE'"),
    "a negative number": (model_part(vocab={"a": -1}), "expected 0 to"),
    "a number of 2^70": (model_part(vocab={"a": 1 << 70}), "expected 0 to"),
    "true for a number": (model_part(vocab={"a": True}), "expected 0 to"),
    "one number twice": (model_part(vocab={"a": 0, "b": 0}), "the same number"),
    "a token of 3 MB": (model_part(vocab={"x" * 3 * MB: 0}), "expected 1 to 4096"),
    "half a character": (model_part(vocab={"\ud800": 0}), "surrogate"),
    "merges of numbers": (model_part(merges=[1]), "merge 0 is"),
    "merges of three": (model_part(merges=[["a", "b", "c"]]), "merge 0 is"),
    "a merge of 3 MB": (model_part(merges=["x" * 3 * MB]), "merge 0 is"),
    "300,000 merges of nothing": (model_part(merges=["a b"] * 300_000), "no token"),
    "an added token far away": (added(id=1 << 40, content="q"), "expected 0 to"),
    "an added token of 3 MB": (added(id=896, content="x" * 3 * MB), "expected 1 to 4096"),
    "an added number": (added(id=896, content=5), "expected a text"),
    "a normalizer of 100,000": (tokenizer(lambda table: table.update(normalizer=[1] * 100_000)), "expected an object"),
    "a pre-tokenizer of escapes": (
        tokenizer(lambda table: table.update(pre_tokenizer={"type": "\x1b[2J\n" * 1000})), "pre-tokenizer"
    ),
    "settings of a terabyte": (placed(SETTINGS, 1 << 40), "more than"),
    "settings that are a pipe": (placed(SETTINGS, os.mkfifo), "no regular file"),
    "settings that are no object": (placed(SETTINGS, b"null"), "expected a JSON object"),
    "added tokens without number": (settings(added_tokens_decoder={"a": {}}), "expected a number"),
    "an added token of 5000 digits": (settings(added_tokens_decoder={"9" * 5000: {"content": "x"}}), "a number"),
    "added tokens that are a number": (settings(added_tokens_decoder=5), "expected an object"),
    "a file of added tokens, negative": (placed("added_tokens.json", b'{"a": -1}'), "expected 0 to"),
}  # fmt: skip

TEMPLATES: dict[str, tuple[Change, str]] = {
    "100 MB": (template_file("chat_template.jinja", 100 * MB), "more than"),
    "100 MB in the settings": (placed(SETTINGS, 100 * MB), "more than"),
    "100 MB in JSON": (template_file("chat_template.json", 100 * MB), "more than"),
    "a pipe": (template_file("chat_template.jinja", os.mkfifo), "no regular file"),
    "a directory": (template_file("chat_template.jinja", Path.mkdir), "directory"),
    "/dev/zero": (template_file("chat_template.jinja", lambda path: path.symlink_to("/dev/zero")), "no regular file"),
    "no text": (template_file("chat_template.jinja", b"\xff\xfe"), "UTF-8"),
    "half a character": (settings(chat_template="\ud800"), "surrogate"),
    "100,000 brackets in JSON": (template_file("chat_template.json", b"[" * 100_000), "nested"),
}

LIES = {f"{kind}: {name}": case
        for kind, cases in {"config": CONFIG_VALUES, "tokenizer.model": PIECES, "tokenizer": TOKENIZERS,
                            "template": TEMPLATES}.items()
        for name, case in cases.items()}  # fmt: skip

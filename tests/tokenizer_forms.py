"""How published models with byte-level BPE are written down: the sections of their tokenizer.json, and their marks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_NO_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AROUND = r"[^\r\n\p{L}\p{N}]?"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARKS_OF_TEXT = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""


def _words(digits: str) -> str:
    return rf"{_NO_CASE}|{_AROUND}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"


def _cased(suffix: str, digits: str) -> str:
    words = rf"{_AROUND}{_UPPER}*{_LOWER}+{suffix}|{_AROUND}{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_END}"


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def byte_level(*, regex: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


_DIGITS = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True)
class BpeForm:
    """How the models of one of llama.cpp's pre-tokenizer names are published."""

    pre_tokenizer: dict[str, Any]
    marks: tuple[str, ...]
    bos: str | None = None
    eos: str = ""
    adds_bos: bool = False
    ignore_merges: bool = False
    normalizer: dict[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CLEAN = {"clean_up_tokenization_spaces": True}
_NOT_CLEAN = {"clean_up_tokenization_spaces": False}

BPE_FORMS: Mapping[str, BpeForm] = {
    "llama-bpe": BpeForm(
        _sequence(_split(_words(r"\p{N}{1,3}")), byte_level()),
        _LLAMA3,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        adds_bos=True,
        ignore_merges=True,
        config=_CLEAN,
    ),
    "qwen2": BpeForm(
        _sequence(_split(_words(r"\p{N}")), byte_level()),
        _CHATML,
        eos="<|im_end|>",
        normalizer={"type": "NFC"},
        config={**_NOT_CLEAN, "add_prefix_space": False, "pad_token": "<|endoftext|>"},
    ),
    "gpt-2": BpeForm(
        byte_level(regex=True), ("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>", config=_CLEAN
    ),
    "smollm": BpeForm(
        _sequence(_DIGITS, byte_level(regex=True)), _CHATML, bos="<|endoftext|>", eos="<|im_end|>", config=_NOT_CLEAN
    ),
    "refact": BpeForm(
        _sequence(_DIGITS, byte_level(regex=True)),
        ("<|end_of_text|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        config={**_CLEAN, "add_bos_token": False, "add_prefix_space": False},
    ),
    "dbrx": BpeForm(
        _sequence(_split(_words(r"\p{N}{1,3}")), byte_level()),
        ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        config=_NOT_CLEAN,
    ),
    "tekken": BpeForm(
        _sequence(_split(_cased("", r"\p{N}")), byte_level()),
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        ignore_merges=True,
        config=_NOT_CLEAN,
    ),
    "gpt-4o": BpeForm(
        _sequence(
            {**_split(_cased(f"{_NO_CASE}?", r"\p{N}{1,3}")), "behavior": "Removed", "invert": True}, byte_level()
        ),
        ("<|endoftext|>", "<|end|>", "<|user|>"),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        config={**_NOT_CLEAN, "tokenizer_class": "GPT2Tokenizer"},
    ),
    "minicpm5": BpeForm(
        _sequence(_split(r"\p{N}{1,3}"), _split(_words(r"\p{N}+")), byte_level()),
        ("<unk>", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        adds_bos=True,
        ignore_merges=True,
        config=_NOT_CLEAN,
    ),
    "seed-coder": BpeForm(
        _sequence(
            _split(
                rf"{_NO_CASE}|{_AROUND}\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_END}",
            ),
            byte_level(),
        ),
        ("<[begin▁of▁sentence]>", "<[PAD▁TOKEN]>", "<[end▁of▁sentence]>"),
        bos="<[begin▁of▁sentence]>",
        eos="<[end▁of▁sentence]>",
        config=_NOT_CLEAN,
    ),
    "deepseek-coder": BpeForm(
        _sequence(
            _split(r"[\r\n]"),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split("[一-龥ࠀ-一가-퟿]+"),
            _DIGITS,
            byte_level(),
        ),
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        adds_bos=True,
        config=_NOT_CLEAN,
    ),
    "deepseek-v3": BpeForm(
        _sequence(
            _split(r"\p{N}{1,3}"),
            _split("[一-龥぀-ゟ゠-ヿ]+"),
            _split(
                rf"{_MARKS_OF_TEXT}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
                rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_END}"
            ),
            byte_level(),
        ),
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        adds_bos=True,
        config=_NOT_CLEAN,
    ),
}  # fmt: skip
"""By llama.cpp's name."""

"""How a tokenizer cuts a text before it merges, and what llama.cpp calls that.

Upstream hashes what a tokenizer makes of one long text, so that a vocabulary with one token more has no name. Here the
sections of tokenizer.json are compared with what llama.cpp does for each of its names (llama-vocab.cpp): the regular
expressions in their order, and whether a piece that is a token is taken without merging. Another pre-tokenizer is
refused: with a wrong name a model runs, and understands less.

Where llama.cpp itself falls short of a name's models, the name is given all the same, as upstream gives it: nothing is
normalized (Qwen's tokenizers ask for NFC, which nearly all text is), and the words of `tekken` and `gpt-4o` end at
combining marks and know upper and lower case in ASCII alone. tests/conformance/test_vocabulary.py lists the texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.errors import UnsupportedError
from converters.vocabulary.merging import reaches_all
from converters.vocabulary.tokenizer_json import TokenizerJson
from converters.vocabulary.tokens import VOCAB_FROM

_MAX_STEPS = 16
_MAX_SHOWN = 300

_NO_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AROUND, _REST = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT, _DIGITS, _THREE = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
_SIGNS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_KANA = "[一-龥぀-ゟ゠-ヿ]+"


def _words(digits: str) -> str:
    return rf"{_NO_CASE}|{_AROUND}\p{{L}}+|{digits}|{_REST}[\r\n]*|{_SPACES}"


def _cased(suffix: str, digits: str) -> str:
    words = f"{_AROUND}{_UPPER}*{_LOWER}+{suffix}|{_AROUND}{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|{digits}|{_REST}[\r\n/]*|{_SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's names.

    Attributes:
        steps: the expressions; each cuts what the one before it has left.
        ignores_merges: whether a piece that is a token is taken as it is.
        adds_bos: what llama.cpp does where the file does not say.
        cleans: whether it takes spaces before punctuation out of what it decodes.
    """

    name: str
    steps: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    cleans: bool = True


# Of names that mean the same, those that upstream gives the families that are converted here.
_KNOWN = (
    PreTokenizer("llama-bpe", (_words(_THREE),), ignores_merges=True, adds_bos=True),
    PreTokenizer("dbrx", (_words(_THREE),)),
    PreTokenizer("qwen2", (_words(_DIGIT),), cleans=False),
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("smollm", (_DIGIT, _GPT2), cleans=False),
    PreTokenizer("refact", (_DIGIT, _GPT2)),
    PreTokenizer("tekken", (_cased("", _DIGIT),), ignores_merges=True, adds_bos=True, cleans=False),
    PreTokenizer("gpt-4o", (_cased(f"{_NO_CASE}?", _THREE),), cleans=False),
    PreTokenizer("minicpm5", (_THREE, _words(_DIGITS)), ignores_merges=True),
    PreTokenizer(
        "deepseek-coder",
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT),
        cleans=False,
    ),
    PreTokenizer(
        "deepseek-v3",
        (
            _THREE,
            _KANA,
            rf"{_SIGNS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
        ),
        cleans=False,
    ),
    PreTokenizer(
        "seed-coder",
        (rf"{_NO_CASE}|{_AROUND}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
        cleans=False,
    ),
)  # fmt: skip

SPELLINGS = (
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _NO_CASE),
    ("'(?i:[sdmt]|ll|ve|re)", _NO_CASE),
    (r"]?+\p{L}+", r"]?\p{L}+"),
    (r"\p{L}++|", r"\p{L}+|"),
    (r"\p{N}]++[\r\n]*", r"\p{N}]+[\r\n]*"),
    (r"[\r\n]*+|", r"[\r\n]*|"),
    (r"\p{N}{1}|", r"\p{N}|"),
    (r"|\s*[\r\n]|\s+(?!\S)|\s+", r"|\s*[\r\n]+|\s+(?!\S)|\s+"),  # \s* takes all ends of lines but the last
)
"""Ways to write the same: nothing that a possessive class could give back is what follows it. (`{1,3}+` is no such way:
to the tokenizers library it means one or more times one to three.)"""
_PREFERRED = {"granite": ("refact",)}
"""What upstream gives an architecture's published models where more than one name would do."""


def pre_tokenizer_of(tokenizer: TokenizerJson, architecture: str, *, cleans: bool) -> PreTokenizer:
    """llama.cpp's name for what a byte-level tokenizer.json does.

    Args:
        architecture: llama.cpp's name of the model's.
        cleans: tokenizer_config.json's `clean_up_tokenization_spaces`.

    Raises:
        UnsupportedError: llama.cpp has none. FormatError: the sections are malformed.
    """
    _check_normalizer(tokenizer)
    _check_model(tokenizer)
    section = tokenizer.section("pre_tokenizer")
    steps = _steps(section)
    alike = [known for known in _KNOWN if known.steps == steps]
    if not alike:
        found = _shown(section)
        raise _unsupported(tokenizer, f"its pre-tokenizer, {found}, is none that is known to be llama.cpp's")
    ignores = tokenizer.model.get("ignore_merges") is True
    exact = [known for known in alike if known.ignores_merges == ignores]
    if not exact and not _merges_suffice(tokenizer):
        told = f'it has "ignore_merges": {str(ignores).lower()}, and llama.cpp\'s {alike[0].name!r} does otherwise'
        raise _unsupported(tokenizer, told)
    choices = exact or alike
    preferred = [known for known in choices if known.name in _PREFERRED.get(architecture, ())]
    return next(iter(preferred or [known for known in choices if known.cleans == cleans] or choices))


def _merges_suffice(tokenizer: TokenizerJson) -> bool:
    """Whether merging a piece that is a token gives that token."""
    return reaches_all(tokenizer.vocab.keys() - {token.content for token in tokenizer.added}, tokenizer.merges)


def _check_normalizer(tokenizer: TokenizerJson) -> None:
    section = tokenizer.section("normalizer")
    listed = section.get("normalizers") if section.get("type") == "Sequence" else [section] if section else []
    kinds = [_kind(part) for part in listed] if isinstance(listed, list) else ["?"]
    if any(kind != "NFC" for kind in kinds):
        raise _unsupported(tokenizer, f"its normalizer, {_shown(section)}, is none that llama.cpp has for BPE")


def _check_model(tokenizer: TokenizerJson) -> None:
    model, decoder = tokenizer.model, _decoder(tokenizer.section("decoder"))
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model.get("byte_fallback"):
        odd.append("byte_fallback")
    if odd:
        raise _unsupported(tokenizer, f"its model has {odd[0]!r}, which llama.cpp does not know for byte-level BPE")
    if decoder != "ByteLevel":
        raise _unsupported(tokenizer, f"its decoder is {decoder!r}, expected 'ByteLevel'")


def _decoder(section: Mapping[str, Any]) -> str:
    """The decoder's kind; that of the only one in a sequence."""
    listed = section.get("decoders") if _kind(section) == "Sequence" else [section]
    return _kind(listed[0]) if isinstance(listed, list) and len(listed) == 1 else "Sequence"


def _steps(section: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The expressions of a byte-level pre-tokenizer; None where a part of it has no such form."""
    listed = section.get("pretokenizers") if _kind(section) == "Sequence" else [section]
    if not isinstance(listed, list) or not 0 < len(listed) <= _MAX_STEPS:
        return None
    *before, last = listed
    if _kind(last) != "ByteLevel" or last.get("add_prefix_space") is not False:
        return None
    steps = [_step(part) for part in before]
    if last.get("use_regex") is not False:
        steps.append(_GPT2)
    if not steps or any(step is None for step in steps):
        return None
    return tuple(step for step in steps if step is not None)


def _step(part: Any) -> str | None:
    if _kind(part) == "Digits":
        return _DIGIT if part.get("individual_digits") is True else _DIGITS
    if _kind(part) != "Split":
        return None
    pattern, form = part.get("pattern"), (part.get("behavior"), part.get("invert"))
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(regex, str):
        return None
    for spelling, plain in SPELLINGS:
        regex = regex.replace(spelling, plain)
    # What does not match is removed: nothing, if the end of the expression matches whatever is left.
    covering = form == ("Removed", True) and regex.endswith(r"|\s+")
    return regex if form in (("Isolated", False), ("Isolated", True)) or covering else None


def _kind(section: Any) -> str:
    kind = section.get("type") if isinstance(section, dict) else None
    return kind if isinstance(kind, str) else "none"


def _shown(section: Mapping[str, Any]) -> str:
    told = ascii(dict(section)) if section else "none"
    return told if len(told) <= _MAX_SHOWN else told[:_MAX_SHOWN] + "..."


def _unsupported(tokenizer: TokenizerJson, told: str) -> UnsupportedError:
    return UnsupportedError(f"{told}; {VOCAB_FROM}", file=tokenizer.file)


def names() -> Sequence[str]:
    """Every name that can be given."""
    return [known.name for known in _KNOWN]

"""SentencePiece vocabularies of which only tokenizer.json is left: the BPE model that transformers made of the pieces.

llama.cpp merges such a vocabulary by the scores of what comes of a merge, the tokenizers library by the places of pairs
in the list of merges. Both do the same if every way in which a token consists of two others is a merge, and those of
one token stand together: then its place among them is its score, which is how the list was made from the scores.
Upstream gives all tokens one score, by which llama.cpp merges from the left. A model of another kind is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from converters.errors import UnsupportedError
from converters.vocabulary.bpe import all_added, check_place
from converters.vocabulary.sources import TokenizerSources
from converters.vocabulary.tokenizer_json import TokenizerJson
from converters.vocabulary.tokens import VOCAB_FROM, TokenTable, TokenType, added_type, shown

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPENDED = {"type": "Prepend", "prepend": _SPACE}
_CUT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def is_like_sentencepiece(tokenizer: TokenizerJson) -> bool:
    """Whether a tokenizer.json holds a BPE model of letters that falls back to bytes."""
    model = tokenizer.model
    return model.get("type") == "BPE" and model.get("byte_fallback") is True


def json_tokens(sources: TokenizerSources, tokenizer: TokenizerJson, rows: int) -> tuple[TokenTable, bool]:
    """Every token at its place, and whether a space is put in front of a text.

    Raises:
        UnsupportedError: llama.cpp would merge in another order, or cut texts otherwise.
        FormatError: tokens that contradict each other or the embedding.
    """
    prefix = _space_prefix(tokenizer)
    scores = _scores(tokenizer)
    table = TokenTable.padded(tokenizer.file, rows, scored=True)
    for token, number in tokenizer.vocab.items():
        check_place(number, token, rows, tokenizer)
        kind = TokenType.BYTE if _BYTE.fullmatch(token) else TokenType.NORMAL
        table.put(number, token.encode(), kind, scores.get(token, 0.0))
    for entry in all_added(sources, tokenizer, rows):
        check_place(entry.number, entry.content, rows, tokenizer)
        text, kind = added_type(entry.content, special=entry.special)
        table.put(entry.number, text.encode(), kind)
    return table, prefix


def _space_prefix(tokenizer: TokenizerJson) -> bool:
    """Whether spaces become what SentencePiece has for them, with one more in front or without."""
    normalizer, cut = tokenizer.section("normalizer"), tokenizer.section("pre_tokenizer")
    steps = (
        normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer] if normalizer else []
    )
    if steps == [_PREPENDED, _REPLACED] and not cut:
        return True
    if steps == [_REPLACED] and (not cut or cut == _CUT):
        return False  # nothing is left for the pre-tokenizer to cut at
    if not steps and _is_metaspace(cut):
        return cut.get("prepend_scheme") != "never"
    told = f"its normalizer and pre-tokenizer, {ascii(dict(normalizer))[:150]} and {ascii(dict(cut))[:150]}"
    raise UnsupportedError(f"{told}, are not SentencePiece's; {VOCAB_FROM}", file=tokenizer.file)


def _is_metaspace(section: Mapping[str, Any]) -> bool:
    return (section.get("type"), section.get("replacement"), section.get("split")) == ("Metaspace", _SPACE, False) and (
        section.get("prepend_scheme") in ("always", "first", "never")
    )


def _scores(tokenizer: TokenizerJson) -> Mapping[str, float]:
    """Scores that have llama.cpp merge as the list of merges says."""
    vocab, known = tokenizer.vocab, set(tokenizer.merges)
    # Added tokens are found before anything is merged, and bytes stand for what is no token.
    apart = {token.content for token in tokenizer.added} | {token for token in vocab if _BYTE.fullmatch(token)}
    scores: dict[str, float] = {}
    last = ""
    for left, right in tokenizer.merges:
        token = left + right
        if token in apart:
            continue
        if token != last and token in scores:
            raise _unequal(tokenizer, f"the merges that lead to {shown(token)} do not stand together")
        scores.setdefault(token, -float(len(scores)))
        last = token
    for token in vocab.keys() - apart:
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocab and right in vocab and (left, right) not in known and not {left, right} & apart:
                raise _unequal(tokenizer, f"{shown(left)} and {shown(right)} make a token by no merge of it")
    return scores


def _unequal(tokenizer: TokenizerJson, found: str) -> UnsupportedError:
    told = f"has no tokenizer.model beside it, and llama.cpp would merge in another order: {found}"
    return UnsupportedError(f"{told}; add tokenizer.model, or {VOCAB_FROM}", file=tokenizer.file)

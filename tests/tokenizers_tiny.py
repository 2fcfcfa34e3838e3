"""Small tokenizers on disk as published models have them: trained by sentencepiece and by the tokenizers library.

Their sections (normalizer, pre-tokenizer, post-processor) are those of the models that each name stands for.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizer_forms import BPE_FORMS, BpeForm, byte_level

__all__ = ["BPE_FORMS", "CHAT_TEMPLATE", "write_bpe", "write_sentencepiece"]

SENTENCEPIECE_MARKS = {"llama": ("<unk>", "<s>", "</s>"), "gemma": ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"

_SPACE = "▁"
_SYLLABLES = "ka to mi ra lo ne su vi an er in the ing on ья не да 日本 Ωμ"


def write_sentencepiece(
    directory: Path, vocab_size: int = 512, *, family: str = "llama", tokenizer_json: bool = False, **trainer: Any
) -> None:
    """tokenizer.model and tokenizer_config.json of a model of 340 pieces at least, with bytes for what it lacks.

    Args:
        family: "llama" or "gemma": which marks come first.
        tokenizer_json: whether the tokenizers library's form of it is written, too.
        trainer: further options of sentencepiece's trainer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    marks = SENTENCEPIECE_MARKS[family]
    (directory / "tokenizer.model").write_bytes(_trained_pieces(marks, vocab_size, trainer))
    if tokenizer_json:
        _tokenizers_form(directory / "tokenizer.model", marks, prefixed=family == "llama").save(
            str(directory / "tokenizer.json")
        )
    name = {"llama": "LlamaTokenizer", "gemma": "GemmaTokenizer"}[family]
    named = {f"{mark.strip('<>/')}_token": mark for mark in marks if mark.strip("<>/") != "s"}
    if family == "llama":
        named |= {"bos_token": "<s>", "eos_token": "</s>"}
    decoder = {str(number): {"content": mark, "special": True} for number, mark in enumerate(marks)}
    config = {
        "tokenizer_class": name,
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        **named,
    }
    _write_json(directory / "tokenizer_config.json", config)


def write_bpe(
    directory: Path,
    pre: str = "llama-bpe",
    vocab_size: int = 512,
    *,
    pairs: bool = False,
    lines: Sequence[str] | None = None,
) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level model of 300 tokens at least.

    Args:
        pre: a name of `BPE_FORMS`.
        pairs: whether merges are written as pairs, as newer files have them, or as "a b".
        lines: texts to learn merges from that know of no words: every cut of the pre-tokenizer then shows in them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    form = BPE_FORMS[pre]
    data = json.loads(_trained_merges(form, vocab_size - len(form.marks), lines))
    data["added_tokens"] = [_added(vocab_size - len(form.marks) + at, mark) for at, mark in enumerate(form.marks)]
    data["post_processor"] = _template(form, data["added_tokens"]) if form.adds_bos else byte_level(regex=True)
    data["model"]["ignore_merges"] = form.ignore_merges
    if not pairs:
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    _write_json(directory / "tokenizer.json", data)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(token.pop("id")): token for token in data["added_tokens"]},
        "chat_template": CHAT_TEMPLATE,
        "bos_token": form.bos,
        "eos_token": form.eos,
        **form.config,
    }
    _write_json(directory / "tokenizer_config.json", config)


def sentences(count: int = 400) -> list[str]:
    """Text to train on: syllables in several scripts, digits and signs, the same on every machine."""
    source = random.Random(7)
    syllables = [*_SYLLABLES.split(), *"中文éüßال"]
    ends = [".", ",", "!", "?", "'s", "'ll", " 12", " 345", "  ", "\n", "...", " = ", "()"]
    lines = []
    for _ in range(count):
        words = ["".join(source.choices(syllables, k=source.randint(1, 4))) for _ in range(8)]
        lines.append(" ".join(word.title() if source.random() < 0.2 else word for word in words) + source.choice(ends))
    return lines


def _trained_pieces(marks: Sequence[str], vocab_size: int, options: Mapping[str, Any]) -> bytes:
    import sentencepiece

    roles = ("unk", "bos", "eos") if "<s>" in marks else ("pad", "eos", "bos", "unk")
    places = {role: number for number, role in enumerate(roles)}
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=out,
        vocab_size=vocab_size,
        minloglevel=2,
        num_threads=1,
        **{f"{role}_id": places.get(role, -1) for role in ("unk", "bos", "eos", "pad")},
        **{f"{role}_piece": marks[number] for role, number in places.items()},
        **{
            "model_type": "bpe",
            "byte_fallback": True,
            "character_coverage": 1.0,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": True,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "user_defined_symbols": list(marks[len(roles) :]),
            **options,
        },
    )
    return out.getvalue()


def _tokenizers_form(model: Path, marks: Sequence[str], *, prefixed: bool) -> Any:
    """As transformers converts such a model: a merge for each way in which a piece consists of two others."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    source = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = {source.IdToPiece(number): number for number in range(source.vocab_size())}
    merges = []
    for piece, number in sorted(ids.items(), key=lambda item: (-source.GetScore(item[1]), item[1])):
        if piece in marks or source.IsByte(number):
            continue
        parts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        found = [pair for pair in parts if pair[0] in ids and pair[1] in ids]
        merges += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replaced = normalizers.Replace(" ", _SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replaced]) if prefixed else replaced
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    made.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    return made


def _trained_merges(form: BpeForm, vocab_size: int, lines: Sequence[str] | None) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    empty = Tokenizer(models.BPE())
    data = json.loads(empty.to_str())
    data |= {"pre_tokenizer": form.pre_tokenizer, "normalizer": form.normalizer, "decoder": byte_level(regex=True)}
    if lines is not None:
        data["pre_tokenizer"] = byte_level()
    made = Tokenizer.from_str(json.dumps(data))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=1,
    )
    made.train_from_iterator(lines or sentences(), trainer)
    assert made.get_vocab_size() == vocab_size, f"{made.get_vocab_size()} tokens, not {vocab_size}: text too short"
    return json.dumps(json.loads(made.to_str()) | {"pre_tokenizer": form.pre_tokenizer})


def _added(number: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


def _template(form: BpeForm, added: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    assert form.bos is not None
    bos, text = {"SpecialToken": {"id": form.bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": form.bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    number = next(token["id"] for token in added if token["content"] == form.bos)
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, *second],
        "special_tokens": {form.bos: {"id": form.bos, "ids": [number], "tokens": [form.bos]}},
    }


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")

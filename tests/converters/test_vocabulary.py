"""Vocabularies. Oracles: the sentencepiece and tokenizers libraries on the same files, and GGUF files' own bytes.

tests/conformance/test_vocabulary.py has upstream's converter and llama.cpp's tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from tokenizers_tiny import BPE_FORMS, write_bpe, write_sentencepiece
from vocabularies import SCORES, TOKENS, TYPES, add_tokens, edit, read, value

from converters.errors import FileMissingError, MismatchError, UnsupportedError
from converters.vocabulary.merging import reaches_all
from converters.vocabulary.pre_tokenizer import SPELLINGS, names
from converters.vocabulary.sentencepiece_model import read_sentencepiece_model

_BOS, _PREFIX = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"family": "gemma"},
        {"user_defined_symbols": ["<|x|>", "▁▁▁"], "control_symbols": ["<ctl>"]},
        {"model_type": "unigram", "hard_vocab_limit": False},
        {"byte_fallback": False, "add_dummy_prefix": False},
    ],
    ids=str,
)
def test_pieces_are_sentencepieces(options: dict[str, Any], tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, 420, **options)
    found = read_sentencepiece_model(tmp_path / "tokenizer.model")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    kinds = {2: oracle.IsUnknown, 3: oracle.IsControl, 5: oracle.IsUnused, 6: oracle.IsByte}
    assert [piece.text.decode() for piece in found.pieces] == [oracle.IdToPiece(at) for at in range(len(oracle))]
    assert [piece.score for piece in found.pieces] == [oracle.GetScore(at) for at in range(len(oracle))]
    for kind, is_kind in kinds.items():
        assert [piece.kind == kind for piece in found.pieces] == [is_kind(at) for at in range(len(oracle))]
    assert found.unigram == (options.get("model_type") == "unigram")
    assert found.space_prefix == options.get("add_dummy_prefix", True)


def test_a_model_that_puts_no_space_in_front_says_so(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, add_dummy_prefix=False)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert not oracle.EncodeAsPieces("the")[0].startswith("▁")
    assert value(read(tmp_path), _PREFIX, tmp_path) is False


def test_unigram_models_carry_a_note(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, 420, model_type="unigram", hard_vocab_limit=False)
    assert any("unigram" in note for note in read(tmp_path).notes)


@pytest.mark.parametrize("as_object", [False, True])
def test_whether_bos_is_added_is_what_the_tokenizer_does(as_object: bool, tmp_path: Path) -> None:
    """Oracle: the tokenizers library's tokens. Upstream is wrong where tokenizer_config.json has an object."""
    write_bpe(tmp_path, "llama-bpe")
    if as_object:
        named = {"__type": "AddedToken", "content": "<|begin_of_text|>"}
        edit(tmp_path / "tokenizer_config.json", lambda data: data.update(bos_token=named))
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("the").ids
    vocabulary = read(tmp_path)
    assert value(vocabulary, _BOS, tmp_path) is True
    assert value(vocabulary, "tokenizer.ggml.bos_token_id", tmp_path) == ids[0]


def test_a_name_for_which_llama_cpp_adds_bos_comes_with_a_no(tmp_path: Path) -> None:
    """llama.cpp adds one for llama-bpe, unless told otherwise (llama-vocab.cpp); this tokenizer does not."""
    write_bpe(tmp_path, "llama-bpe")
    edit(tmp_path / "tokenizer.json", lambda data: data.update(post_processor=None))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("the").ids[0] != 507
    assert value(read(tmp_path), _BOS, tmp_path) is False


_REST = r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
PUBLISHED = {
    "dbrx": rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}|{_REST}",
}
LINES = (
    "I'm he'S they'LL 'tis",
    " \n \n\n x \r\n\t\n",
    "12345 a1b2",
    "...!!\n\n?? é-ü (x)",
    "中文12 🚀\n",
    "  a\u00a0 b",
    "\r\n",
)


def _step(place: int, **values: Any) -> Callable[[Any], None]:
    return lambda data: data["pre_tokenizer"]["pretokenizers"][place].update(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(pre_tokenizer={"type": "Whitespace"}),
        lambda data: data.update(pre_tokenizer=None),
        lambda data: data.update(normalizer={"type": "Lowercase"}),
        lambda data: data.update(decoder={"type": "WordPiece"}),
        lambda data: data["model"].update(end_of_word_suffix="</w>"),
        lambda data: data["model"].update(type="WordPiece"),
        _step(0, pattern={"Regex": r"\s+|\S+"}),
        _step(0, pattern={"String": " "}),
        _step(0, behavior="MergedWithNext"),
        _step(0, behavior="Removed"),
        _step(1, add_prefix_space=True),
        _step(1, use_regex=True),
        lambda data: data["pre_tokenizer"]["pretokenizers"].reverse(),
        lambda data: data["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}),
    ],
)
def test_another_pre_tokenizer_is_never_guessed(change: Callable[[Any], None], tmp_path: Path) -> None:
    write_bpe(tmp_path, "llama-bpe")
    edit(tmp_path / "tokenizer.json", change)
    with pytest.raises(UnsupportedError, match=r"--vocab-from FILE\.gguf"):
        read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        _step(0, invert=True),
        _step(0, behavior="Removed", invert=True),
        lambda data: data.update(decoder={"type": "Sequence", "decoders": [data["decoder"]]}),
        lambda data: data["model"].update(dropout=0.0),
    ],
)
def test_other_words_for_the_same(change: Callable[[Any], None], tmp_path: Path) -> None:
    """Oracle: the tokenizers library's tokens before and after."""
    write_bpe(tmp_path, "llama-bpe")
    path, line = tmp_path / "tokenizer.json", "the Kato-Mira's 12345\n\n x  \t y"
    before, vocabulary = Tokenizer.from_file(str(path)).encode(line), read(tmp_path)
    edit(path, change)
    after = Tokenizer.from_file(str(path))
    assert (after.encode(line).ids, after.decode(before.ids)) == (before.ids, line)
    assert read(tmp_path).entries == vocabulary.entries


@pytest.mark.parametrize("name", PUBLISHED)
def test_spellings_of_the_same_expression_have_the_same_name(name: str, tmp_path: Path) -> None:
    """Oracle: the tokenizers library cuts alike by both."""
    write_bpe(tmp_path, name)
    path = tmp_path / "tokenizer.json"
    before = Tokenizer.from_file(str(path)).pre_tokenizer
    edit(path, _step(0, pattern={"Regex": PUBLISHED[name]}))
    after = Tokenizer.from_file(str(path)).pre_tokenizer
    assert [after.pre_tokenize_str(line) for line in LINES] == [before.pre_tokenize_str(line) for line in LINES]
    assert value(read(tmp_path, 512, "qwen2"), "tokenizer.ggml.pre", tmp_path) == name


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("spelling", "plain"), SPELLINGS)
def test_every_spelling_means_what_stands_for_it(name: str, spelling: str, plain: str, tmp_path: Path) -> None:
    """Oracle: the tokenizers library, with one spelling after the other put into the plain expression."""
    write_bpe(tmp_path, name)
    path = tmp_path / "tokenizer.json"
    before = Tokenizer.from_file(str(path)).pre_tokenizer
    regex = json.loads(path.read_text(encoding="utf-8"))["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    edit(path, _step(0, pattern={"Regex": regex.replace(plain, spelling)}))
    after = Tokenizer.from_file(str(path)).pre_tokenizer
    assert [after.pre_tokenize_str(line) for line in LINES] == [before.pre_tokenize_str(line) for line in LINES]
    assert value(read(tmp_path, 512, "qwen2"), "tokenizer.ggml.pre", tmp_path) == name


@pytest.mark.parametrize("extra", [False, True])
def test_ignoring_merges_matters_only_for_tokens_that_they_do_not_make(extra: bool, tmp_path: Path) -> None:
    """Oracle: the tokenizers library's tokens of every token, with and without `ignore_merges`."""
    write_bpe(tmp_path, "qwen2")
    path = tmp_path / "tokenizer.json"
    if extra:

        def change(data: Any) -> None:
            data["model"]["vocab"] = {**data["model"]["vocab"], "zqzq": 509}
            for token in data["added_tokens"]:
                token["id"] += 1

        edit(path, change)
    edit(path, lambda data: data["model"].update(ignore_merges=True))
    ignoring = Tokenizer.from_file(str(path))
    edit(path, lambda data: data["model"].update(ignore_merges=False))
    merging, data = Tokenizer.from_file(str(path)), json.loads(path.read_text(encoding="utf-8"))
    # Single tokens, given to the model past the pre-tokenizer.
    same = all(
        [token.value for token in ignoring.model.tokenize(word)]
        == [token.value for token in merging.model.tokenize(word)]
        for word in data["model"]["vocab"]
    )
    merges = [tuple(merge.split(" ")) for merge in data["model"]["merges"]]
    assert reaches_all(data["model"]["vocab"], merges) == same == (not extra)
    edit(tmp_path / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    edit(path, lambda data: data["model"].update(ignore_merges=True))
    if extra:
        with pytest.raises(UnsupportedError, match="ignore_merges"):
            read(tmp_path, 513, "qwen2")
    else:
        assert value(read(tmp_path, 512, "qwen2"), "tokenizer.ggml.pre", tmp_path) == "qwen2"


@pytest.mark.parametrize("change", ["order", "missing"])
def test_merges_that_scores_cannot_express_are_refused(change: str, tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, tokenizer_json=True)
    (tmp_path / "tokenizer.model").unlink()

    def broken(data: Any) -> None:
        merges = data["model"]["merges"]
        twice = next(at for at in range(1, len(merges)) if "".join(merges[at]) == "".join(merges[at - 1]))
        moved = merges.pop(twice)
        if change == "order":
            merges.append(moved)

    edit(tmp_path / "tokenizer.json", broken)
    with pytest.raises(UnsupportedError, match=r"--vocab-from FILE\.gguf"):
        read(tmp_path)


def test_an_overlay_brings_its_added_tokens(tmp_path: Path) -> None:
    """Beside an adapter lies tokenizer.json alone; the scores stay those of the model's own tokenizer.model."""
    write_sentencepiece(tmp_path / "model")
    write_sentencepiece(tmp_path / "adapter", tokenizer_json=True)
    (tmp_path / "adapter" / "tokenizer.model").unlink()
    edit(tmp_path / "adapter" / "tokenizer_config.json", lambda data: data.pop("added_tokens_decoder"))
    add_tokens(tmp_path / "adapter", "<|new|>", "<|other|>")
    vocabulary = read(tmp_path / "model", 514, overlay=tmp_path / "adapter")
    oracle = Tokenizer.from_file(str(tmp_path / "adapter" / "tokenizer.json"))
    assert value(vocabulary, TOKENS, tmp_path) == [oracle.id_to_token(number) for number in range(514)]
    before = value(read(tmp_path / "model"), SCORES, tmp_path)
    assert value(vocabulary, SCORES, tmp_path)[3:512] == before[3:]
    assert value(vocabulary, TYPES, tmp_path)[512:] == [3, 3]


def test_an_overlay_of_another_model_is_refused(tmp_path: Path) -> None:
    write_bpe(tmp_path / "model", "qwen2")
    write_bpe(tmp_path / "other", "llama-bpe", 514)
    with pytest.raises(MismatchError, match="the tokenizer of another model"):
        read(tmp_path / "model", 514, "qwen2", overlay=tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileMissingError, match="has no tokenizer"):
        read(tmp_path / "model", 514, "qwen2", overlay=tmp_path / "empty")


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match=r"no tokenizer\.model or tokenizer\.json; add it, or .*--vocab-from"):
        read(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"tekken\.json is not read here.*--vocab-from"):
        read(tmp_path)


def test_every_name_has_a_form_to_be_tried_with() -> None:
    assert set(BPE_FORMS) == set(names())

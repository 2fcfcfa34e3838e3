"""Vocabularies taken from the GGUF file of another model. Oracles: the tokenizers library's tokens, and the gguf
package's reader."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from models import Sizes, config, save_model, weights
from tokenizers import Tokenizer
from tokenizers_tiny import write_bpe, write_sentencepiece
from vocabularies import edit

from converters.changes import Edits
from converters.errors import MismatchError, UnsupportedError
from converters.model_output import ModelOutput, ModelRequest, plan_model_output
from converters.opening import open_model

ROWS = 384
SIZES = Sizes(vocab=ROWS)


def model(directory: Path, **settings: object) -> Path:
    return save_model(directory, weights(SIZES, 1), {**config(SIZES), **settings})


def with_bpe(directory: Path, form: str = "llama-bpe", size: int = ROWS, **settings: object) -> Path:
    model(directory, **settings)
    write_bpe(directory, form, size)
    return directory


def plan(source: Path, out: Path, vocab_from: Path | None = None, **request: object) -> ModelOutput:
    return plan_model_output(open_model(source), Edits(), ModelRequest(out, vocab_from=vocab_from, **request))  # type: ignore[arg-type]


def in_gguf(directory: Path, name: str) -> Path:
    out = directory / name
    plan(directory / name.removesuffix(".gguf"), out).write({})
    return out


def tokens_of(path: Path) -> list[str]:
    return gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()


def swapped(tokenizer: dict) -> None:  # type: ignore[type-arg]
    """Three tokens of the vocabulary take each other's numbers; merges still know them."""
    vocab = tokenizer["model"]["vocab"]
    first, second, third = (token for token, number in vocab.items() if number in (100, 120, 140))
    vocab[first], vocab[second], vocab[third] = vocab[second], vocab[third], vocab[first]


def test_tokens_at_other_places(tmp_path: Path) -> None:
    own, other = with_bpe(tmp_path / "own"), with_bpe(tmp_path / "other")
    edit(other / "tokenizer.json", swapped)
    path = in_gguf(tmp_path, "other.gguf")
    known, theirs = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (own, other))
    different = [number for number in range(known.get_vocab_size())
                 if known.id_to_token(number) != theirs.id_to_token(number)]  # fmt: skip
    assert different == [100, 120, 140]
    for source in (own, in_gguf(tmp_path, "own.gguf")):
        with pytest.raises(MismatchError, match=r"3 of its tokens .* token 100,.*another model") as caught:
            plan(source, tmp_path / "out.gguf", path)
        assert str(caught.value.file) == str(path)
    plan(own, tmp_path / "out.gguf", tmp_path / "own.gguf").write({})
    assert tokens_of(tmp_path / "out.gguf") == tokens_of(tmp_path / "own.gguf")


def unknown_to_llama_cpp(tokenizer: dict) -> None:  # type: ignore[type-arg]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[xyz]+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}  # fmt: skip


@pytest.mark.parametrize("change", [None, swapped])
def test_an_unknown_pre_tokenizer_hides_no_other_tokens(change: Callable[..., None] | None, tmp_path: Path) -> None:
    with_bpe(tmp_path / "known")
    path = in_gguf(tmp_path, "known.gguf")
    own = Path(shutil.copytree(tmp_path / "known", tmp_path / "own"))
    edit(own / "tokenizer.json", unknown_to_llama_cpp)
    with pytest.raises(UnsupportedError, match="--vocab-from"):
        plan(own, tmp_path / "out.gguf")
    if change is None:
        assert plan(own, tmp_path / "out.gguf", path).notes == ()
        return
    edit(own / "tokenizer.json", change)
    with pytest.raises(MismatchError, match="3 of its tokens"):
        plan(own, tmp_path / "out.gguf", path)


def test_another_architecture(tmp_path: Path) -> None:
    own = with_bpe(tmp_path / "own")
    writer = gguf.GGUFWriter(tmp_path / "qwen.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(ROWS)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(MismatchError, match="'qwen2', expected 'llama'"):
        plan(own, tmp_path / "out.gguf", tmp_path / "qwen.gguf")


@pytest.mark.parametrize("size", [ROWS, ROWS - 8])
def test_without_a_tokenizer_of_its_own(size: int, tmp_path: Path) -> None:
    with_bpe(tmp_path / "other", size=size)
    path = in_gguf(tmp_path, "other.gguf")
    notes = plan(model(tmp_path / "own"), tmp_path / "out.gguf", path).notes
    assert any("could not be compared" in note and "no tokenizer" in note for note in notes)
    assert not any("more than padding" in note for note in notes)


def test_far_fewer_tokens_than_rows(tmp_path: Path) -> None:
    sizes = Sizes(vocab=4096)
    own = save_model(tmp_path / "own", weights(sizes, 1), config(sizes))
    with_bpe(tmp_path / "other")
    notes = plan(own, tmp_path / "out.gguf", in_gguf(tmp_path, "other.gguf")).notes
    unused = 4096 - len({token for token in tokens_of(tmp_path / "other.gguf") if not re.match(r"\[PAD\d", token)})
    assert any(f"{unused} of the embedding's 4096 rows have no token" in note for note in notes), notes


def test_sentencepiece_and_places_that_are_free(tmp_path: Path) -> None:
    """Where the model's own vocabulary has padding, the other file may have tokens."""
    own = model(tmp_path / "own")
    write_sentencepiece(own, vocab_size=ROWS - 4)
    other = model(tmp_path / "other")
    for file in own.glob("*token*"):
        shutil.copy(file, other)
    table = {str(ROWS - 4): {"content": "<|new|>", "special": True}}
    edit(other / "tokenizer_config.json", lambda found: found.update(added_tokens_decoder=table))
    path = in_gguf(tmp_path, "other.gguf")
    assert tokens_of(path)[ROWS - 4] == "<|new|>"
    assert plan(own, tmp_path / "out.gguf", path).notes == ()
    plan(own, tmp_path / "a.gguf").write({})
    with pytest.raises(MismatchError, match=f"1 of its tokens .* token {ROWS - 4},"):
        plan(other, tmp_path / "out.gguf", tmp_path / "a.gguf")
    assert json.loads((other / "config.json").read_text())["vocab_size"] == ROWS

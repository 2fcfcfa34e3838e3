"""Oracles: upstream's own set_vocab, key for key, and llama.cpp's tokens against those of the tokenizers library.

Small tokenizers of every form that published ones have, with what people do to them. Upstream finds the
pre-tokenizer's name by a hash of published vocabularies; here it is given ours, whose meaning the second oracle judges:
its vocabularies have learned merges that know of no words, so that every cut which llama.cpp makes elsewhere shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conformance.families import HERE
from conformance.vocabulary_cases import CASES, OF_FORM
from tokenizers import Tokenizer
from tokenizers_tiny import BPE_FORMS, write_bpe, write_sentencepiece

from converters.architectures import find_architecture
from converters.gguf_file import entry_bytes, float32, start_bytes, text, uint32
from converters.gguf_header import read_gguf_header
from converters.vocabulary import Vocabulary, read_vocabulary

_PRE = "tokenizer.ggml.pre"
TEXTS = (
    *("", "a", " ", "  ", "   x", "\n", " \n \n", "   \t\t  \n\n   ", "Hello, world!"),
    *("the Kato-Mira's\n\n\n x \n\t y  \r\n z", "I'm he's they'LL WE'VE don't 'tis"),
    *("'s'S 't ''s", "don’t “x” …—–", "x=1;//c\n\tif(a){b}\n", "_foo_bar __x__"),
    *("1 12 123 1234 12345 3.14 ٣٤٥ ½ Ⅷ", "a1b22c333d4444", "......!!!!!!?????? ''''''``````\"\"\"\"", "#!$%^&*()_+"),
    *("中文日本語 テスト かな", "日本12中文345、。「」", "🚀 (normal) 😶‍🌫️ ✅ 🦙🦙", "ａｂｃ１２３！", "ﬁ ½ ²³ ①"),
    *("ÀÉ éA éÀ ǅ ß STRASSE", "aÉb ÉA", "ABCdef GHIjkl ÄÖÜäöü", "\x01\x7f", "ſ 'ſ K", "привет МИР Мир"),
    *("नमस्ते ថា", "a\u0308 o\u0302x", "a\u00a0x\u2003y", "x\u3000z"),
)  # fmt: skip
MARKS = {"नमस्ते ថា", "a\u0308 o\u0302x"}
ELSEWHERE = {
    "tekken": MARKS | {"aÉb ÉA"},  # llama.cpp ends a word at a combining mark, and knows the case of ASCII alone.
    "gpt-4o": MARKS | {"aÉb ÉA"},
    "qwen2": {"a\u0308 o\u0302x"},  # No normalization joins a letter and its mark.
    "deepseek-coder": {"x\u3000z", "a\u00a0x\u2003y"},  # Of spaces, its ranges know ASCII's alone.
}
"""Texts that llama.cpp cuts in another way than the model does, known for its own converter's files as well."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("vocabularies")
    made = {}
    for number, (name, case) in enumerate(CASES.items()):
        made[name] = root / str(number)
        case.write(made[name])
        config = {"architectures": [case.model_class], "vocab_size": case.rows, **case.config}
        (made[name] / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def ours(directories: Mapping[str, Path]) -> Mapping[str, Vocabulary]:
    return {
        name: ours_of(directory, CASES[name].model_class, CASES[name].rows) for name, directory in directories.items()
    }


@pytest.fixture(scope="module")
def upstream(
    directories: Mapping[str, Path], ours: Mapping[str, Vocabulary], llama_cpp_sources: Path
) -> Iterator[Callable[[str], Mapping[str, Any]]]:
    files = {name: directory / "upstream.gguf" for name, directory in directories.items()}
    jobs = [[str(directories[name]), pre_of(ours[name]), str(files[name])] for name in directories]
    command = [sys.executable, str(HERE / "vocabulary_child.py"), str(llama_cpp_sources)]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    yield lambda name: keys_of(files[name])


def ours_of(directory: Path, model_class: str, rows: int) -> Vocabulary:
    table = find_architecture(model_class)
    assert table is not None
    path = directory / "config.json"
    return read_vocabulary(directory, json.loads(path.read_text()) if path.exists() else {}, table, rows)


def written(vocabulary: Vocabulary, path: Path) -> Path:
    """A file with a vocabulary and as much of a model as llama.cpp asks for."""
    sizes = {"context_length": 128, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64} | {
        "attention.head_count": 4, "rope.dimension_count": 16,
    }  # fmt: skip
    keys = [("general.architecture", text("llama")), ("llama.attention.layer_norm_rms_epsilon", float32(1e-5))]
    keys += [(f"llama.{key}", uint32(value)) for key, value in sizes.items()]
    entries = [*(entry_bytes(key, value) for key, value in keys), *(entry for _, entry in vocabulary.entries)]
    path.write_bytes(start_bytes(0, len(entries)) + b"".join(entries))
    return path


def keys_of(path: Path) -> Mapping[str, Any]:
    header = read_gguf_header(path)
    return {
        key: (entry.kind, entry.item, entry.count, header.value(key))
        for key, entry in header.entries.items()
        if key.startswith("tokenizer.")
    }


def pre_of(vocabulary: Vocabulary) -> str:
    return dict(vocabulary.entries)[_PRE][8 + len(_PRE) + 12 :].decode()


@pytest.mark.conformance
@pytest.mark.parametrize("name", CASES)
def test_every_key_is_upstreams(
    name: str, ours: Mapping[str, Vocabulary], upstream: Callable[[str], Mapping[str, Any]], tmp_path: Path
) -> None:
    found = keys_of(written(ours[name], tmp_path / "ours.gguf"))
    wanted = upstream(name)
    assert len(wanted) > 4
    assert {key: found.get(key) for key in {**found, **wanted}} == {key: wanted.get(key) for key in {**found, **wanted}}
    assert ours[name].size == len(wanted["tokenizer.ggml.tokens"][3])


@pytest.mark.parametrize("form", BPE_FORMS)
def test_the_name_is_the_one_that_upstream_gives_the_published_models(
    form: str, ours: Mapping[str, Vocabulary]
) -> None:
    assert pre_of(ours[f"bpe {form}"]) == form


@pytest.fixture(scope="module")
def tokens_of() -> Callable[[list[tuple[Path, bool]]], list[list[list[int]]]]:
    pytest.importorskip("llama_cpp")

    def run(files: list[tuple[Path, bool]]) -> list[list[list[int]]]:
        jobs = [[str(path), TEXTS, special] for path, special in files]
        command = [sys.executable, str(HERE / "vocabulary_tokens_child.py")]
        done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found: list[list[list[int]]] = json.loads(done.stdout)
        return found

    return run


@pytest.mark.llama
@pytest.mark.conformance
@pytest.mark.parametrize("form", BPE_FORMS)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(form: str, tmp_path: Path, tokens_of: Any) -> None:
    write_bpe(tmp_path, form, 620, lines=[*TEXTS, *TEXTS])
    vocabulary = ours_of(tmp_path, OF_FORM.get(form, "LlamaForCausalLM"), 620)
    (found,) = tokens_of([(written(vocabulary, tmp_path / "vocabulary.gguf"), True)])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    elsewhere = {line for line, tokens in zip(TEXTS, found, strict=True) if tokens != tokenizer.encode(line).ids}
    assert elsewhere == ELSEWHERE.get(form, set())


@pytest.mark.llama
@pytest.mark.conformance
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_sentencepiece_tokens_with_and_without_its_file(family: str, tmp_path: Path, tokens_of: Any) -> None:
    """Without tokenizer.model the scores come from the merges of tokenizer.json."""
    write_sentencepiece(tmp_path, family=family, tokenizer_json=True)
    model_class = {"llama": "LlamaForCausalLM", "gemma": "Gemma2ForCausalLM"}[family]
    files = [written(ours_of(tmp_path, model_class, 512), tmp_path / "with.gguf")]
    (tmp_path / "tokenizer.model").unlink()
    files.append(written(ours_of(tmp_path, model_class, 512), tmp_path / "without.gguf"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    wanted = [tokenizer.encode(line).ids for line in TEXTS]
    assert tokens_of([(path, False) for path in files]) == [wanted, wanted]

"""Oracle: the contract, for everything that `convert model`, `merge` and `run` read beside tensors: configurations,
tokenizers, templates, cards, other models' vocabularies, importance matrices and recipes. Exit 3, or 2 for a recipe's
options, with one sentence; nothing written, and neither time nor memory spent."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf_bytes import FLOAT32, I32, INT32, STRING, UINT32, Tensor
from hostile_checkpoints import LIES, config
from hostile_files import P
from hostile_gguf import GGUF
from hostile_process import Ask, Child, check_cost, check_refusal, listing
from hostile_recipes import CARDS, JOURNALS, RECIPE_PATHS, RECIPES

FAMILY = Path(__file__).parents[2] / "safelora_gguf" / "tiny_family"
ROWS = 896
TOKENS = [P.string(f"t{number}") for number in range(ROWS)]
SUMS, COUNTS = "blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"


@pytest.fixture(scope="module")
def children() -> Iterator[list[Child]]:
    made: list[Child] = []
    yield made
    for child in made:
        child.close()


@pytest.fixture
def ask(children: list[Child], tmp_path: Path) -> Iterator[Ask]:
    """The child, once every command has run in it; a new one if the last case killed it."""
    if not children or not children[-1].alive:
        children.append(Child())
        out = tmp_path / "warm"
        for more in (["--card"], ["--outtype", "q8_0"]):
            children[-1].ask("convert", "model", FAMILY / "aligned", "--out", out / "a.gguf", "--force", *more)
        for name in ("b", "b.gguf"):
            children[-1].ask(*_merge(FAMILY / "aligned", out / name), "--card")
        children[-1].ask("run", tmp_path / "nowhere.toml")
        shutil.rmtree(out)
    yield children[-1].ask
    shutil.rmtree(tmp_path, ignore_errors=True)  # some of these files are large


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    for file in (FAMILY / "aligned").iterdir():
        (made / file.name).symlink_to(file)
    return made


def _convert(source: Path, out: Path, *more: object) -> list[object]:
    return ["convert", "model", source, "--out", out, "--json", *more]


def _merge(model: Path, out: Path) -> list[object]:
    return ["merge", "--model", model, "--adapter", FAMILY / "adapter", "--out", out, "--json", "--device", "cpu"]


def refused(ask: Ask, place: Path, expected: str, command: list[object], *statuses: int) -> None:
    before = listing(place)
    outcome = ask(*command)
    told = f"{command[:2]}: {outcome}"
    check_cost(outcome, told)
    check_refusal(outcome, told, *statuses)
    assert re.search(expected, outcome["stderr"]), told
    assert listing(place) == before


@pytest.mark.parametrize("name", LIES)
def test_a_checkpoint_that_lies(name: str, ask: Ask, checkpoint: Path, tmp_path: Path) -> None:
    change, expected = LIES[name]
    change(checkpoint)
    refused(ask, tmp_path, expected, _convert(checkpoint, tmp_path / "out.gguf"))
    refused(ask, tmp_path, expected, _merge(checkpoint, tmp_path / "merged.gguf"))


def test_a_sound_checkpoint_is_taken(ask: Ask, checkpoint: Path, tmp_path: Path) -> None:
    """Or nothing here would say anything."""
    config(vocab_size=ROWS)(checkpoint)
    for command in (_convert(checkpoint, tmp_path / "a.gguf"), _merge(checkpoint, tmp_path / "b.gguf")):
        assert ask(*command)["status"] == 0


@pytest.mark.parametrize("name", CARDS)
def test_a_card_that_lies(name: str, ask: Ask, checkpoint: Path, tmp_path: Path) -> None:
    """Nothing depends on a card: it is taken for none."""
    CARDS[name](checkpoint / "README.md")
    outs = (tmp_path / "a.gguf", tmp_path / "b.gguf")
    for command in (_convert(checkpoint, outs[0], "--card"), [*_merge(checkpoint, outs[1]), "--card"]):
        outcome = ask(*command)
        told = f"{command[:2]}: {outcome}"
        check_cost(outcome, told)
        assert outcome["status"] == 0, told
    for out in outs:
        card = out.with_suffix(".md").read_text()
        assert len(card) < 20_000 and "\x1b" not in card and "lol" not in card
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


@pytest.mark.parametrize("option", ["--vocab-from", "--imatrix"])
@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_beside_that_lies(name: str, option: str, ask: Ask, tmp_path: Path) -> None:
    case = GGUF[name]
    (tmp_path / "x").mkdir()
    path = case.make(tmp_path / "x", "aligned" if "model" in case.roles else "adapter")
    command = _convert(FAMILY / "aligned", tmp_path / "out.gguf", option, path, "--outtype", "Q4_K_M")
    refused(ask, tmp_path, re.escape(path.name), command)


def vocabulary(**changed: bytes | None) -> bytes:
    """A GGUF file of nothing but a vocabulary for the packaged model, with other values, or without some."""
    keys = {
        "general.architecture": P.text("llama"),
        "tokenizer.ggml.model": P.text("llama"),
        "tokenizer.ggml.tokens": P.array(STRING, TOKENS),
        "tokenizer.ggml.token_type": P.array(INT32, [struct.pack("<i", 1)] * ROWS),
        "tokenizer.ggml.scores": P.array(FLOAT32, [bytes(4)] * ROWS),
    } | {f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": value for key, value in changed.items()}
    return P.file([(key, value) for key, value in keys.items() if value is not None])


VOCABULARIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "too many tokens": (lambda: vocabulary(tokens=P.array(STRING, [*TOKENS, P.string("x")])), "another model"),
    "a million tokens": (lambda: vocabulary(tokens=P.array(STRING, [P.string("")] * 10**6)), "another model"),
    "no tokens": (lambda: vocabulary(tokens=None), "no vocabulary"),
    "tokens of numbers": (lambda: vocabulary(tokens=P.array(UINT32, [bytes(4)] * ROWS)), "no list of texts"),
    "a model that is a number": (lambda: vocabulary(model=P.uint32(1)), "no vocabulary"),
    "types for three": (lambda: vocabulary(token_type=P.array(INT32, [bytes(4)] * 3)), "holds 3 values"),
    "types that are a text": (lambda: vocabulary(token_type=P.text("x")), "expected 896"),
    "scores that are a text": (lambda: vocabulary(scores=P.text("x")), "expected 896"),
    "a template of 100 MB": (lambda: vocabulary(chat_template=P.text("x" * (100 << 20))), "longer than"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_that_lies(name: str, ask: Ask, tmp_path: Path) -> None:
    make, expected = VOCABULARIES[name]
    (tmp_path / "v.gguf").write_bytes(make())
    command = _convert(FAMILY / "aligned", tmp_path / "out.gguf", "--vocab-from", tmp_path / "v.gguf")
    refused(ask, tmp_path, expected, command)


def of(value: float) -> Callable[[Tensor], bytes]:
    return lambda tensor: struct.pack("<f", value) * (tensor.size // 4)


PAIR = (Tensor(SUMS, (1, 256)), Tensor(COUNTS, (1, 1)))
MATRICES: dict[str, tuple[tuple[Tensor, ...], float, str]] = {
    "no counts": (PAIR[:1], 1.0, "has sums and no"),
    "sums without end": (PAIR, float("inf"), "not finite"),
    "counts of nothing": ((PAIR[0], Tensor(COUNTS, (0,))), 1.0, "don't divide"),
    "counts that don't divide": ((PAIR[0], Tensor(COUNTS, (3, 1))), 1.0, "don't divide"),
    "whole numbers": ((Tensor(SUMS, (1, 256), I32), PAIR[1]), 1.0, "stored as I32"),
    "escapes": ((Tensor("\x1b[2J.in_sum2", (1, 256)),), 1.0, "has sums and no"),
    "nothing": ((), 1.0, "no importance matrix"),
}


@pytest.mark.llama
@pytest.mark.parametrize("name", MATRICES)
def test_an_importance_matrix_that_lies(name: str, ask: Ask, tmp_path: Path) -> None:
    tensors, value, expected = MATRICES[name]
    (tmp_path / "i.gguf").write_bytes(P.file([("general.type", P.text("imatrix"))], tensors, content=of(value)))
    command = _convert(
        FAMILY / "aligned", tmp_path / "out.gguf", "--imatrix", tmp_path / "i.gguf", "--outtype", "Q4_K_M"
    )
    refused(ask, tmp_path, expected, command)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_lies(name: str, ask: Ask, tmp_path: Path) -> None:
    text, expected = RECIPES[name]
    (tmp_path / "r.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    for more in ([], ["--dry-run"]):
        refused(ask, tmp_path, expected, ["run", tmp_path / "r.toml", "--json", *more], 2, 3)


@pytest.mark.parametrize("name", RECIPE_PATHS)
def test_a_path_that_is_no_recipe(name: str, ask: Ask, tmp_path: Path) -> None:
    make, expected = RECIPE_PATHS[name]
    make(tmp_path / "r.toml")
    refused(ask, tmp_path, expected, ["run", tmp_path / "r.toml", "--json"])


@pytest.mark.parametrize("name", JOURNALS)
def test_a_journal_that_lies(name: str, ask: Ask, tmp_path: Path) -> None:
    """It is no journal: everything is run, and what stands there already is not taken for the recipe's own."""
    (tmp_path / "r.toml").write_text(f'[convert-model]\nsource = "{FAMILY / "aligned"}"\nout = "y.gguf"\n')
    (tmp_path / ".r.toml.safelora-gguf.json").write_text(JOURNALS[name])
    outcome = ask("run", tmp_path / "r.toml", "--json", "--quiet")
    check_cost(outcome, str(outcome))
    assert outcome["status"] == 0 and (tmp_path / "y.gguf").exists(), outcome
    (tmp_path / "y.gguf").write_bytes(b"mine")
    (tmp_path / ".r.toml.safelora-gguf.json").write_text(JOURNALS[name])
    refused(ask, tmp_path, "exists already", ["run", tmp_path / "r.toml", "--json", "--quiet"])

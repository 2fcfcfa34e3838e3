"""Tables of tokens when adapters are merged: tied, parted, extended, cut.

Oracles: PEFT's and mlx-lm's formulas in float64; the rows that adapter and model hold; the tokenizers beside them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import models
import pytest
import torch
from gguf_models import finish, put
from merging_cases import (
    EMBEDDING,
    HEAD,
    PREFIX,
    SIZES,
    TIED,
    checkpoint,
    embedding_pair,
    merged,
    mlx_adapter,
    noise,
    plan,
    with_whole,
)

from converters.errors import MismatchError, UnsupportedError


@pytest.mark.parametrize("dora", [False, True])
def test_mlx_acts_on_both_of_two_tied_tables(dora: bool, tmp_path: Path) -> None:
    """mlx-lm's LoRAEmbedding and DoRAEmbedding are the output matrix, too (as_linear); lengths are the tokens'."""
    model, before = checkpoint(tmp_path / "model", TIED)
    a, b, m = noise(SIZES.vocab, 4), noise(4, SIZES.hidden), 1 + noise(SIZES.vocab)
    tensors = {f"{EMBEDDING}.lora_a": a, f"{EMBEDDING}.lora_b": b}
    if dora:
        tensors[f"{EMBEDDING}.m"] = m
    adapter = mlx_adapter(tmp_path / "mlx", tensors, fine_tune_type="dora" if dora else "lora")
    found = plan(model, (adapter, 1.0))
    table = before[f"{EMBEDDING}.weight"].double() + 3.0 * a.double() @ b.double()
    wanted = (m.double() / table.norm(dim=1))[:, None] * table if dora else table
    assert found.edits.config == {}
    assert set(found.rows) == {f"{EMBEDDING}.weight"}
    torch.testing.assert_close(merged(model, (adapter, 1.0))[f"{EMBEDDING}.weight"], wanted, rtol=1e-5, atol=1e-6)


def test_a_pair_on_one_of_two_tied_tables_parts_them(tmp_path: Path) -> None:
    """In memory PEFT's input has the pair and its output has not."""
    model, before = checkpoint(tmp_path / "model", TIED)
    pair = embedding_pair()
    adapter = models.save_adapter(tmp_path / "adapter", pair, models.adapter_config())
    found = plan(model, (adapter, 1.0))
    assert found.edits.config == {"tie_word_embeddings": False}
    assert found.edits.changes["lm_head.weight"].after == f"{EMBEDDING}.weight"
    assert any("different tables of tokens" in note for note in found.notes)
    after = merged(model, (adapter, 1.0))
    a, b = (tensor.double() for tensor in pair.values())
    old = before[f"{EMBEDDING}.weight"].double()
    torch.testing.assert_close(after[f"{EMBEDDING}.weight"], old + 2.0 * (b @ a).T, rtol=1e-5, atol=1e-6)
    assert torch.equal(after["lm_head.weight"], old)


def gemma(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "gemma")
    writer.add_head_count(4)
    put(writer, "token_embd.weight", noise(SIZES.vocab, SIZES.hidden).numpy())
    put(writer, "blk.0.attn_q.weight", noise(SIZES.hidden, SIZES.hidden).numpy())
    finish(writer)
    return path


def test_tables_that_llama_cpp_cannot_part(tmp_path: Path) -> None:
    adapter = models.save_adapter(tmp_path / "adapter", embedding_pair(), models.adapter_config())
    with pytest.raises(UnsupportedError, match=r"gemma has one for both in llama\.cpp"):
        plan(gemma(tmp_path / "gemma.gguf"), (adapter, 1.0))


def tokenizer(adapter: Path, added: Sequence[tuple[int, str]] = ()) -> None:
    tokens = [{"id": number, "content": text} for number, text in added]
    (adapter / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))


def tables(rows: int, seed: int = 7) -> dict[str, torch.Tensor]:
    return {f"{EMBEDDING}.weight": noise(rows, SIZES.hidden, seed=seed),
            f"{HEAD}.weight": noise(rows, SIZES.hidden, seed=seed + 1)}  # fmt: skip


def test_a_larger_vocabulary(tmp_path: Path) -> None:
    model, _ = checkpoint(tmp_path / "model")
    new = tables(SIZES.vocab + 3)
    adapter = with_whole(tmp_path / "adapter", new)
    tokenizer(adapter)
    found = plan(model, (adapter, 0.5))
    assert found.edits.config == {"vocab_size": SIZES.vocab + 3}
    assert found.edits.tokenizer == adapter
    assert found.shapes[f"{HEAD}.weight"] == (SIZES.vocab + 3, SIZES.hidden)
    after = merged(model, (adapter, 0.5))
    for name, table in new.items():  # half of the way where there was a row, all of it where there was none
        assert torch.equal(after[name][SIZES.vocab :], table[SIZES.vocab :].double())


def test_a_larger_vocabulary_without_its_tokenizer(tmp_path: Path) -> None:
    model, _ = checkpoint(tmp_path / "model")
    adapter = with_whole(tmp_path / "adapter", tables(SIZES.vocab + 3))
    with pytest.raises(UnsupportedError, match=r"from 128 to 131 tokens, and holds no tokenizer.*tokenizer\.json"):
        plan(model, (adapter, 1.0))


def test_a_larger_table_for_input_alone(tmp_path: Path) -> None:
    model, _ = checkpoint(tmp_path / "model")
    table = {f"{EMBEDDING}.weight": noise(SIZES.vocab + 3, SIZES.hidden)}
    adapter = with_whole(tmp_path / "adapter", table)
    tokenizer(adapter)
    with pytest.raises(MismatchError, match="different sizes"):
        plan(model, (adapter, 1.0))


def test_a_table_without_its_padding(tmp_path: Path) -> None:
    """Rows behind the tokenizer's last token were cut off before training: the model keeps its own."""
    model, before = checkpoint(tmp_path / "model")
    new = tables(SIZES.vocab - 5)
    adapter = with_whole(tmp_path / "adapter", new)
    after = merged(model, (adapter, 1.0))
    for name, table in new.items():
        assert torch.equal(after[name], torch.cat([table, before[name][-5:]]).double())
    assert sum("stay as they are" in note for note in plan(model, (adapter, 1.0)).notes) == 2


def test_a_table_of_another_model(tmp_path: Path) -> None:
    sizes = models.Sizes(vocab=2000)
    model, _ = checkpoint(tmp_path / "model", sizes)
    adapter = with_whole(tmp_path / "adapter", tables(500))
    with pytest.raises(MismatchError, match=r"is a table of 500 tokens, and .* has 2000"):
        plan(model, (adapter, 1.0))


def test_new_tokens_in_rows_that_were_padding(tmp_path: Path) -> None:
    """The tables keep their size, and the tokenizer is the one that knows the tokens."""
    model, _ = checkpoint(tmp_path / "model")
    tokenizer(model, [(3, "<old>")])
    adapter = with_whole(tmp_path / "adapter", tables(SIZES.vocab))
    tokenizer(adapter, [(3, "<old>"), (120, "<new>")])
    assert plan(model, (adapter, 1.0)).edits.tokenizer == adapter
    tokenizer(adapter, [(3, "<old>")])
    assert plan(model, (adapter, 1.0)).edits.tokenizer is None


def test_a_trained_token_beyond_the_last(tmp_path: Path) -> None:
    model, _ = checkpoint(tmp_path / "model")
    rows = {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": noise(1, SIZES.hidden)}
    adapter = with_whole(tmp_path / "adapter", rows, trainable_token_indices=[SIZES.vocab + 2])
    tokenizer(adapter)
    with pytest.raises(MismatchError, match=r"trains the token 130, and .* has 128"):
        plan(model, (adapter, 1.0))


def test_a_frozen_table_is_no_change(tmp_path: Path) -> None:
    """PEFT saves the table under a pair along: the pair alone changes it."""
    model, before = checkpoint(tmp_path / "model")
    pair = embedding_pair()
    frozen = {f"{PREFIX}{EMBEDDING}.base_layer.weight": before[f"{EMBEDDING}.weight"],
              f"{PREFIX}{HEAD}.base_layer.weight": before[f"{HEAD}.weight"]}  # fmt: skip
    adapter = models.save_adapter(tmp_path / "adapter", {**pair, **frozen}, models.adapter_config())
    assert set(plan(model, (adapter, 1.0)).rows) == {f"{EMBEDDING}.weight"}


def test_tied_tables_that_are_stored_twice(tmp_path: Path) -> None:
    """As some trainers save them; transformers goes by the configuration and ignores the second."""
    before = models.weights(SIZES, 1) | {"lm_head.weight": models.weights(SIZES, 1)[f"{EMBEDDING}.weight"].clone()}
    model = models.save_model(tmp_path / "model", before, models.config(TIED))
    pair = models.save_adapter(tmp_path / "pair", embedding_pair(), models.adapter_config())
    found = plan(model, (pair, 1.0))
    assert found.edits.config == {"tie_word_embeddings": False}
    assert set(found.rows) == {f"{EMBEDDING}.weight"}
    tokens = {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": noise(1, SIZES.hidden)}
    trained = with_whole(tmp_path / "tokens", tokens, trainable_token_indices=[5])
    assert plan(model, (trained, 1.0)).edits.config == {}
    after = merged(model, (trained, 1.0))
    assert torch.equal(after["lm_head.weight"], after[f"{EMBEDDING}.weight"])
    assert torch.equal(after["lm_head.weight"][5], next(iter(tokens.values()))[0].double())

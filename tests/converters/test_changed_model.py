"""A stored model seen with its edits. Oracles: tensors put in by hand, and the same model written and opened again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_models import write_gguf_model
from models import Sizes, config, save_model, save_sharded, weights
from rewriting import rows_of, write

from converters.bridge import Bridge
from converters.changed_model import ChangedModel
from converters.changes import Change, Edits
from converters.checkpoint import open_checkpoint
from converters.converted_model import ConvertedModel
from converters.gguf_model import open_gguf_model
from converters.layouts import find_table
from converters.model_config import ties_of

SIZES = Sizes()
QUERY, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


def grown() -> tuple[dict[str, torch.Tensor], Edits]:
    """New tensors by name: other values, another shape, and one that was not there."""
    generator = torch.Generator().manual_seed(5)
    values = {QUERY: torch.randn(64, 64, generator=generator), EMBEDDING: torch.randn(132, 64, generator=generator),
              "lm_head.weight": torch.randn(132, 64, generator=generator)}  # fmt: skip
    changes = {QUERY: Change(QUERY, rows_of(values[QUERY])),
               EMBEDDING: Change(EMBEDDING, rows_of(values[EMBEDDING]), (132, 64)),
               "lm_head.weight": Change("lm_head.weight", rows_of(values["lm_head.weight"]), (132, 64),
                                        after=EMBEDDING)}  # fmt: skip
    return values, Edits(changes, {"vocab_size": 132, "tie_word_embeddings": False})


def test_everything_is_as_in_the_written_model(tmp_path: Path) -> None:
    sizes = Sizes(tied=True)
    source = open_checkpoint(save_sharded(tmp_path / "a", weights(sizes, 1, torch.bfloat16), config(sizes)))
    values, edits = grown()
    changed = ChangedModel(source, edits)
    assert changed.infos.keys() == {*source.infos, "lm_head.weight"}
    for name, info in changed.infos.items():
        wanted = values[name] if name in values else source.load(name)
        assert info.shape == wanted.shape and info.nbytes == 2 * wanted.numel() and info.dtype == "BF16"
        assert torch.equal(changed.load(name), wanted)
        matrix = wanted.reshape(-1, wanted.shape[-1])
        last = len(matrix)
        assert torch.equal(changed.rows(name, last // 2, last), matrix[last // 2 :])
        changed.check_type(name)
        changed.prefetch(name)
    assert source.tied_embeddings and not changed.tied_embeddings
    assert changed.config["vocab_size"] == 132 and ties_of(changed.config) is False
    assert source.config["vocab_size"] == 128
    assert changed.file_of("lm_head.weight") == source.file_of(EMBEDDING)


def test_seen_as_gguf_it_is_what_the_written_model_is(tmp_path: Path) -> None:
    source = save_model(tmp_path / "a", weights(SIZES, 1), config(SIZES))
    values = {QUERY: torch.randn(64, 64), "model.norm.weight": torch.randn(64)}
    write(source, tmp_path / "b", values)
    edits = Edits({name: Change(name, rows_of(tensor)) for name, tensor in values.items()})
    written, changed = open_checkpoint(tmp_path / "b"), ChangedModel(open_checkpoint(source), edits)
    table = find_table(written)
    assert table is not None
    ours, theirs = (ConvertedModel(model, Bridge.of(table, model)) for model in (changed, written))
    assert ours.infos == theirs.infos
    for name in theirs.infos:
        assert torch.equal(ours.load(name).float(), theirs.load(name).float())


def test_a_changed_model_is_changed_again(tmp_path: Path) -> None:
    """W + 1 and then that times 2; the shape and place of the first step stay."""
    sizes = Sizes(tied=True)
    source = open_checkpoint(save_model(tmp_path / "a", weights(sizes, 1), config(sizes)))
    values, edits = grown()
    first = ChangedModel(source, edits)
    double = {name: Change(name, lambda start, stop, name=name: 2 * first.rows(name, start, stop))
              for name in ("lm_head.weight", "model.norm.weight")}  # fmt: skip
    second = ChangedModel(first, Edits(double, {"vocab_size": 132}, tmp_path))
    assert second.stored is source and second.edits.tokenizer == tmp_path
    assert torch.equal(second.load("lm_head.weight"), 2 * values["lm_head.weight"])
    assert torch.equal(second.load("model.norm.weight"), 2 * source.load("model.norm.weight"))
    assert torch.equal(second.load(QUERY), values[QUERY])
    assert second.infos["lm_head.weight"].shape == (132, 64) and ties_of(second.config) is False


def test_keys_of_both_halves_of_a_composite(tmp_path: Path) -> None:
    settings = {**config(SIZES), "text_config": {"vocab_size": 128, "hidden_size": 64}, "tie_word_embeddings": True}
    source = open_checkpoint(save_model(tmp_path / "a", weights(SIZES, 1), settings))
    edited = ChangedModel(source, Edits({}, {"vocab_size": 9, "tie_word_embeddings": False})).config
    assert edited["vocab_size"] == edited["text_config"]["vocab_size"] == 9
    assert edited["tie_word_embeddings"] is False and "tie_word_embeddings" not in edited["text_config"]


def test_gguf_and_its_rounding(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "a.gguf", weights(SIZES, 1), config(SIZES))
    source = open_gguf_model(path)
    new = torch.randn(130, 64)
    changed = ChangedModel(source, Edits({"token_embd.weight": Change("token_embd.weight", rows_of(new), (130, 64))}))
    assert torch.equal(changed.load("token_embd.weight"), new)
    assert changed.rounding("token_embd.weight", 0, 1) is None and changed.config == {}
    assert changed.fingerprint() == source.fingerprint()


def test_a_tensor_from_nowhere_is_our_own_fault(tmp_path: Path) -> None:
    source = open_checkpoint(save_model(tmp_path / "a", weights(SIZES, 1), config(SIZES)))
    with pytest.raises(AssertionError, match="odd"):
        _ = ChangedModel(source, Edits({"odd": Change("odd", rows_of(torch.ones(1, 1)))})).infos

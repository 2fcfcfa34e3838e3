"""Tables of tokens that grow, or were saved without their padding; and the tokenizer that then belongs to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.adapters.lora import LoraAdapter
from converters.changed_model import ChangedModel
from converters.errors import Error, MismatchError, UnsupportedError
from converters.gguf_model import GgufModel
from converters.models import Model
from converters.paths import read_json_object
from safelora_gguf.merging.rows import Update
from safelora_gguf.merging.tables import Tables

Updates = Mapping[str, Sequence[Update]]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_MOST_PADDING = 1024  # rows behind the last token; the largest of published models has about 400
_LARGEST_TOKENIZER = 256 << 20


def rows_of_tables(model: Model, tables: Tables, updates: Updates, adapters: Sequence[LoraAdapter]) -> dict[str, int]:
    """How many rows each table of tokens that changes will have: as before, or more.

    Raises:
        MismatchError: a table or a pair is for another vocabulary, or new rows are missing.
    """
    found = {}
    for name in (tables.embedding, tables.head):
        if name is None or name not in updates:
            continue
        assert tables.embedding is not None, "the output matrix is found beside it"
        stored = model.infos[name if name in model.infos else tables.embedding].shape
        height = max([stored[0], *(update.rows() for update in updates[name])])
        for update in updates[name]:
            _check_rows(update, stored, height, adapters[update.adapter], model)
        found[name] = height
        _check_covered(updates[name], range(stored[0], height), adapters, model)
    return found


def check_tables(model: Model, tables: Tables, heights: Mapping[str, int], *, split: bool) -> None:
    """That input and output still have the same tokens.

    Raises:
        MismatchError: they don't.
    """
    if tables.embedding is None or not (split or tables.stored_head):
        return
    rows = {name: heights.get(name) or model.infos[name].shape[0] for name in (tables.embedding, tables.head)
            if name in heights or name in model.infos}  # fmt: skip
    before = {name: model.infos[name].shape[0] for name in rows if name in model.infos}
    if len(set(rows.values())) > 1 and rows != before:
        told = " and ".join(f"{name} {count}" for name, count in rows.items())
        raise MismatchError(f"would get tables of different sizes ({told} rows): the adapter holds one of them alone",
                            file=model.path)  # fmt: skip


def trimmed(model: Model, tables: Tables, updates: Updates) -> list[str]:
    """A sentence for every table that was saved with fewer rows than the model's."""
    found = []
    for name in (tables.embedding, tables.head):
        if name is None or name not in model.infos:
            continue
        stored = model.infos[name].shape[0]
        rows = [update.replaces.whole.shape[0] for update in updates.get(name, ()) if update.replaces]
        found += [
            f"{name}: the adapter's table has {count} rows and the model's {stored}; those behind them stay as they are"
            for count in rows
            if count < stored
        ]
    return found


def tokenizer_of(
    model: Model,
    updates: Updates,
    heights: Mapping[str, int],
    adapters: Sequence[LoraAdapter],
    vocab_from: Path | None = None,
) -> tuple[Path | None, list[str]]:
    """The directory whose tokenizer the merged model needs, None for the model's own; and a sentence about it.

    Args:
        vocab_from: a file that has the merged model's vocabulary.

    Raises:
        UnsupportedError: new tokens, and nothing says what they are.
    """
    for name, height in heights.items():
        whole = [update for update in updates[name] if update.is_whole]
        stored = model.infos[name].shape[0] if name in model.infos else height
        for update in whole:
            adapter = adapters[update.adapter]
            there = any((adapter.path / file).is_file() for file in _TOKENIZERS)
            if update.rows() > stored:
                if vocab_from is not None:
                    return None, [f"the vocabulary grows from {stored} to {height} tokens, which are those of "
                                  f"{vocab_from}"]  # fmt: skip
                if not there:
                    raise UnsupportedError(
                        f"extends the vocabulary from {stored} to {update.rows()} tokens, and holds no tokenizer that "
                        f"says what they are: put the tokenizer.json (or tokenizer.model) that it was trained with "
                        f"beside it, or for GGUF name a file that has them with --vocab-from",
                        file=adapter.path,
                    )
                return adapter.path, [f"the vocabulary grows from {stored} to {height} tokens; the tokenizer is that "
                                      f"of {adapter.path}"]  # fmt: skip
            if there and (new := _new_tokens(adapter.path, model)):
                return adapter.path, [f"the tokenizer is that of {adapter.path}, which has tokens that the model's "
                                      f"lacks: {', '.join(new[:5])}"]  # fmt: skip
    return None, []


def _check_rows(update: Update, stored: tuple[int, ...], height: int, adapter: LoraAdapter, model: Model) -> None:
    own = update.replaces.whole.shape[0] if update.replaces else None
    if own is not None and own < stored[0] - _MOST_PADDING:
        assert update.replaces is not None, "it has rows"
        told = f"is a table of {own} tokens, and {model.path} has {stored[0]}: the adapter is for another model"
        raise MismatchError(told, file=adapter.tensor_file, tensor=update.replaces.whole.key)
    for placed in update.pairs:
        if placed.pair.shape[0] not in (stored[0], height, own) or placed.pair.shape[1:] != stored[1:]:
            raise MismatchError(
                f"is a pair for a table of {list(placed.pair.shape)}, and {model.path} has {list(stored)}: the adapter "
                f"is for another model, or the vocabulary grew and its table was not saved along "
                f"(save_embedding_layers)",
                file=adapter.tensor_file,
                tensor=placed.pair.tensors[0],
            )


def _check_covered(updates: Sequence[Update], new: range, adapters: Sequence[LoraAdapter], model: Model) -> None:
    """That one adapter gives every new row."""
    if not new:
        return
    for update in updates:
        given = {row for placed in update.tokens for row in placed.whole.rows}
        whole = update.replaces.whole.shape[0] if update.replaces else 0
        if all(row in given or row < whole for row in new):
            return
    trained = next(update for update in updates if update.rows() > new.start)
    raise MismatchError(
        f"trains the token {new.stop - 1}, and {model.path} has {new.start}: the vocabulary was resized, and the table "
        f"was not saved along (save_embedding_layers)",
        file=adapters[trained.adapter].tensor_file,
    )


def _new_tokens(directory: Path, model: Model) -> list[str]:
    """Tokens that an adapter's tokenizer added and its model's hasn't; none where that can't be told."""
    added = _added_tokens(directory)
    stored = model.stored if isinstance(model, ChangedModel) else model
    if not added:
        return []
    if isinstance(stored, GgufModel):
        known = stored.headers[0].value("tokenizer.ggml.tokens")
        if not isinstance(known, list):
            return []
        return [text for number, text in added.items() if number >= len(known) or known[number] != text]
    place = stored.path if stored.path.is_dir() else stored.path.parent
    own = _added_tokens(place)
    return [text for number, text in added.items() if own.get(number) != text] if own is not None else []


def _added_tokens(directory: Path) -> dict[int, str] | None:
    """The added tokens of a tokenizer.json; None where there is none that can be read."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        entries: Any = read_json_object(file, "the tokenizer", _LARGEST_TOKENIZER).get("added_tokens")
    except Error:
        return None
    found = entries if isinstance(entries, list) else []
    return {one["id"]: one["content"] for one in found if isinstance(one, dict) and type(one.get("id")) is int
            and isinstance(one.get("content"), str)}  # fmt: skip

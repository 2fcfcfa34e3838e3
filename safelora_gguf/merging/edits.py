"""Adapters merged into a model, as edits of what is stored: every changed tensor's rows, computed when asked for.

Each adapter is taken against the model as it is: W' = W + sum over adapters of scale * (W_i - W), W_i being the weight
with that adapter alone. For plain pairs that is the sum of their deltas; DoRA's delta is its whole one, lengths
included, measured on W. Rows of new tokens, which W hasn't, are an adapter's own.

Input and output tables that are one tensor (tied) stay one where an adapter does the same to both. Where it doesn't,
the function that was trained has two: the model gets an output matrix of its own. PEFT's merge_and_unload then differs
from its own unmerged adapter; this does not. An adapter of MLX acts on both, as mlx-lm trains it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from converters.adapters.lora import LoraAdapter
from converters.changed_model import ChangedModel
from converters.changes import Change, Edits
from converters.checkpoint import Checkpoint
from converters.errors import MismatchError, UnsupportedError
from converters.ggml import QType
from converters.model_config import ties_of
from converters.models import Model
from safelora_gguf.merging.biases import check_new_biases, config_of_biases
from safelora_gguf.merging.pairs import left_out
from safelora_gguf.merging.plan import check_floats, check_scale, updates_of
from safelora_gguf.merging.rows import MergedRows, Update
from safelora_gguf.merging.same import same_update, same_values
from safelora_gguf.merging.tables import Tables, tables_of
from safelora_gguf.merging.templates import template_notes
from safelora_gguf.merging.tokens import check_tables, rows_of_tables, tokenizer_of, trimmed

Updates = Mapping[str, Sequence[Update]]


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        rows: by tensor, in the model's order; each knows its relative change once it was written.
        adapters: by tensor, which adapters change it, counted from 0.
        shapes: by tensor, as they become.
        notes: a sentence each.
        losses: what belongs to an adapter's update and its files lack, or the model has no place for.
        parted: whether tied tables of tokens become two.
    """

    edits: Edits
    rows: Mapping[str, MergedRows]
    adapters: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    parted: bool = False


@dataclass
class _Found:
    """What all adapters do, while it is collected.

    Attributes:
        vocab_from: see `plan_merge`.
    """

    vocab_from: Path | None = None
    updates: dict[str, list[Update]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)


def merge_edits(model: Model, adapters: Sequence[tuple[LoraAdapter, float]], device: torch.device) -> Edits:
    """What merging adapters changes in a model; see `plan_merge`."""
    return plan_merge(model, adapters, device).edits


def plan_merge(
    model: Model, adapters: Sequence[tuple[LoraAdapter, float]], device: torch.device, vocab_from: Path | None = None
) -> MergePlan:
    """Plans a merge. Reads headers, and of values those that decide what becomes of tables of tokens.

    Args:
        model: as it is stored, or changed by an earlier step.
        adapters: each with its scale, 1 as it was trained; one with 0 does nothing.
        device: where products are computed.
        vocab_from: a file with the output's vocabulary, if it doesn't come from model and adapters.

    Raises:
        UsageError: a scale out of range.
        MismatchError: an adapter is for another model, or two contradict each other.
        UnsupportedError: a part that can't be merged, named. FormatError: damaged values.
    """
    if device.type == "mps" and any(adapter.magnitudes for adapter, _ in adapters):
        device = torch.device("cpu")  # DoRA's lengths are float64, which mps lacks
    check_floats(model)
    tables, found = tables_of(model), _Found(vocab_from)
    tied: dict[int, tuple[Update | None, Update | None]] = {}
    for number, (adapter, scale) in enumerate(adapters):
        check_scale(scale)
        if scale == 0:
            found.notes.append(f"{adapter.path}: its scale is 0, and nothing of it is merged")
            continue
        updates, seen = updates_of(model, adapter, scale, number, tables)
        found.losses += [*adapter.missing, *left_out(model, seen)]
        found.notes += adapter.notes
        for tensor, update in updates.items():
            if not tables.tied or tensor not in (tables.embedding, tables.head):
                found.updates.setdefault(tensor, []).append(update)
        if tables.tied and tables.embedding is not None:
            tied[number] = _both_tables(updates.get(tables.embedding), updates.get(tables.head), adapter)
    split = _settle_tables(model, tables, tied, found, [adapter for adapter, _ in adapters])
    return _planned(model, tables, found, [adapter for adapter, _ in adapters], device, split=split)


def _both_tables(
    embedding: Update | None, head: Update | None, adapter: LoraAdapter
) -> tuple[Update | None, Update | None]:
    """What an adapter does to input and output of tied tables.

    PEFT ties the head to an embedding's trained tokens, though not to a pair; mlx-lm to a pair, too.
    """
    if embedding is None:
        return None, head
    if adapter.format == "mlx" and head is None:
        return embedding, embedding
    if not embedding.tokens or (head is not None and head.tokens):
        return embedding, head
    return embedding, replace(head or replace(embedding, pairs=(), replaces=None), tokens=embedding.tokens)


def _settle_tables(
    model: Model,
    tables: Tables,
    tied: Mapping[int, tuple[Update | None, Update | None]],
    found: _Found,
    adapters: Sequence[LoraAdapter],
) -> bool:
    """Decides whether tied tables stay one tensor, and adds what is done to them; whether they part."""
    if tables.embedding is None or not any(update for both in tied.values() for update in both):
        return False
    apart = [number for number, both in tied.items() if not same_update(*both)]
    ones = [update for update, _ in tied.values() if update is not None]
    if not apart:
        found.updates[tables.embedding] = ones
        if tables.stored_head:
            found.updates[tables.head] = ones
        return False
    path = adapters[apart[0]].path
    if tables.never_apart:
        raise UnsupportedError(
            f"gives input and output different tables of tokens, and {model.architecture} has one for both in "
            f"llama.cpp: merge it into the model in safetensors, or leave out that part",
            file=path,
        )
    if ones:
        found.updates[tables.embedding] = ones
    heads = [update for _, update in tied.values() if update is not None]
    if heads or not tables.stored_head:
        found.updates[tables.head] = heads
    found.notes.append(
        f"{path} was trained with different tables of tokens at input and output, which are one tensor in "
        f"{model.path} (tied): the output has its own, {tables.head}, in the merged model"
    )
    return True


def _planned(
    model: Model,
    tables: Tables,
    found: _Found,
    adapters: Sequence[LoraAdapter],
    device: torch.device,
    *,
    split: bool,
) -> MergePlan:
    for name, several in found.updates.items():
        found.updates[name] = _without_rivals(several, name, adapters, found.notes)
    heights = rows_of_tables(model, tables, found.updates, adapters)
    check_tables(model, tables, heights, split=split)
    check_new_biases(model, [name for name in found.updates if name not in (*model.infos, tables.head)])
    order = {name: place for place, name in enumerate(model.infos)}
    rows, shapes, changes = {}, {}, {}
    for name in sorted(found.updates, key=lambda name: order.get(name, order.get(_after(name, tables), -1))):
        source = name if name in model.infos else tables.embedding if name == tables.head else None
        shape = _shape(model, name, source, found.updates[name], heights.get(name))
        rows[name] = MergedRows(model, source, shape, found.updates[name], device)
        shapes[name] = shape
        changes[name] = _change(model, name, shape, rows[name], tables)
    tokenizer, notes = tokenizer_of(model, found.updates, heights, adapters, found.vocab_from)
    if found.vocab_from is None:
        notes += template_notes(model, adapters, tokenizer)
    edits = Edits(changes, _config(model, tables, found.updates, heights, split=split), tokenizer)
    notes = [*found.notes, *notes, *trimmed(model, tables, found.updates)]
    users = {name: tuple(update.adapter for update in updates) for name, updates in found.updates.items()}
    return MergePlan(edits, rows, {name: users[name] for name in rows}, shapes, tuple(notes), tuple(found.losses),
                     parted=split)  # fmt: skip


def _after(name: str, tables: Tables) -> str:
    """The stored tensor that a new one follows."""
    return str(tables.embedding) if name == tables.head else f"{name.removesuffix('.bias')}.weight"


def _shape(
    model: Model, name: str, source: str | None, updates: Sequence[Update], height: int | None
) -> tuple[int, ...]:
    if source is None:
        return model.infos[f"{name.removesuffix('.bias')}.weight"].shape[:-1]
    shape = model.infos[source].shape
    return shape if height is None else (height, *shape[1:])


def _change(model: Model, name: str, shape: tuple[int, ...], rows: MergedRows, tables: Tables) -> Change:
    if name in model.infos:
        return Change(name, rows, None if shape == model.infos[name].shape else shape)
    vector = int(QType.F32) if model.layout == "gguf" and len(shape) == 1 else None
    source = tables.embedding if name == tables.head and not rows.is_changed else None
    copied = source if source is not None and _is_stored_so(model, source, shape) else None
    return Change(name, rows, shape, qtype=vector, after=_after(name, tables), copy_of=copied)


def _is_stored_so(model: Model, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor's values are those of the file, as many as these."""
    edited = isinstance(model, ChangedModel) and name in model.edits.changes
    return not edited and model.infos[name].shape == shape


def _without_rivals(
    several: Sequence[Update], name: str, adapters: Sequence[LoraAdapter], notes: list[str]
) -> list[Update]:
    """Two adapters can't both say what a tensor, or a token's row, is to be; where they say the same, one does. One
    that is named twice counts as often, with its whole values as with its pairs."""
    kept: list[Update] = []
    for other in several:
        own = adapters[other.adapter]
        rivals = [one for one in kept if _both_decide(one, other)]
        rivals = [one for one in rivals if adapters[one.adapter].fingerprint() != own.fingerprint()]
        for one in rivals:
            if one.scale == other.scale and same_values(one, other):
                notes.append(f"{adapters[one.adapter].path} and {own.path} hold the same values of {name}: they count "
                             f"once")  # fmt: skip
                continue
            raise MismatchError(
                f"and {own.path} both hold whole values of {name}: merge one of them, or the one after the other",
                file=adapters[one.adapter].path,
            )
        kept.append(replace(other, replaces=None, tokens=()) if rivals else other)
    return kept


def _both_decide(one: Update, other: Update) -> bool:
    rows = [{row for placed in update.tokens for row in placed.whole.rows} for update in (one, other)]
    if one.replaces is not None or other.replaces is not None:
        return one.is_whole and other.is_whole
    return bool(rows[0] & rows[1])


def _config(
    model: Model, tables: Tables, updates: Updates, heights: Mapping[str, int], *, split: bool
) -> dict[str, Any]:
    """What of config.json follows from the tensors."""
    if not isinstance(model, Checkpoint | ChangedModel) or model.layout == "gguf":
        return {}
    changed: dict[str, Any] = {}
    if any(name in model.infos and height != model.infos[name].shape[0] for name, height in heights.items()):
        changed["vocab_size"] = max(heights.values())
    one_alone = (tables.embedding in updates) != (tables.head in updates)
    if split or (tables.stored_head and one_alone and ties_of(model.config) is not False):
        changed["tie_word_embeddings"] = False
    return changed | config_of_biases([name for name in updates if name not in model.infos and name != tables.head])

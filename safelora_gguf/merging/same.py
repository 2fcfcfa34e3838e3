"""Whether values of an adapter are the model's own already."""

from __future__ import annotations

import torch

from converters.adapters.lora import LoraAdapter
from converters.models import Model
from safelora_gguf.merging.pairs import PlacedPair
from safelora_gguf.merging.rows import OwnValues, Update

_PIECE = 1 << 21  # elements that are compared at once
_ROUNDED_ALIKE = 1.5  # times the energy that rounding is expected to have


def is_stored(model: Model, tensor: str, adapter: LoraAdapter, key: str) -> bool:
    """Whether a whole tensor is the stored one as far as both have rows: equal in either's type, or within the
    rounding errors of a quantized one. One with more rows is not."""
    if tensor not in model.infos:
        return False
    theirs = adapter.load_whole(key)
    columns = theirs.shape[-1]
    theirs = theirs.reshape(-1, columns)
    ours = model.infos[tensor].elements // columns
    if len(theirs) > ours:
        return False
    model.check_type(tensor)
    off = expected = 0.0
    step = max(1, _PIECE // columns)
    for start in range(0, len(theirs), step):
        stop = min(start + step, len(theirs))
        stored, saved = model.rows(tensor, start, stop), theirs[start:stop]
        rounding = model.rounding(tensor, start, stop)
        if rounding is None:
            if not (torch.equal(stored.to(saved.dtype), saved) or torch.equal(stored, saved.to(stored.dtype))):
                return False
            continue
        variances, run = rounding
        expected += run * float(variances.double().sum())
        off += float(torch.linalg.vector_norm(stored.double() - saved.double()) ** 2)
    return off <= _ROUNDED_ALIKE * expected


def same_update(one: Update | None, other: Update | None) -> bool:
    """Whether two tables of one adapter are changed alike. PEFT writes a pair of tied tables twice: once on the
    embedding, and on the head with its factors in each other's place (ensure_weight_tying)."""
    if one is None or other is None:
        return one is other
    if not same_values(one, other) or len(one.pairs) != len(other.pairs):
        return False
    return all(_same_pair(*both) for both in zip(one.pairs, other.pairs, strict=True))


def same_values(one: Update, other: Update) -> bool:
    """Whether two updates have the same whole values."""
    mine, theirs = ([*([update.replaces] if update.replaces else []), *update.tokens] for update in (one, other))
    kinds = [[placed.whole.kind for placed in values] for values in (mine, theirs)]
    return kinds[0] == kinds[1] and all(_same_values(*both) for both in zip(mine, theirs, strict=True))


def _same_values(one: OwnValues, other: OwnValues) -> bool:
    return one == other or (one.whole.rows == other.whole.rows and torch.equal(one.load(), other.load()))


def _same_pair(one: PlacedPair, other: PlacedPair) -> bool:
    if one == other:
        return True
    first, second = one.pair, other.pair
    magnitudes = one.module in one.adapter.magnitudes or other.module in other.adapter.magnitudes
    if first.rank != second.rank or first.scaling != second.scaling or first.shape != second.shape or magnitudes:
        return False
    (a, b), (c, d) = one.adapter.load(one.module), other.adapter.load(other.module)
    if first.embedding != second.embedding:
        c, d = d.T, c.T
    return torch.equal(a, c) and torch.equal(b, d)

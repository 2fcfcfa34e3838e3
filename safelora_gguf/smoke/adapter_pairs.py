"""Two GGUF adapters' pairs held against each other, and the random counterpart of what was done to one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from converters.adapters.gguf import GgufAdapter, open_gguf_adapter
from converters.adapters.output import Origin
from converters.adapters.plan import plan_output
from converters.gguf_model import open_gguf_model
from converters.products import gram, inner, norm
from safelora_gguf._version import __version__
from safelora_gguf.projection import random_projection
from safelora_gguf.smoke.protocol import AdapterChoice

_SAME = 0.99
"""Cosine from which on two A, or two B, are one but for a factor; storing one as Q8_0 leaves 0.9999."""

_NEARER = 1e-6
"""Cosines this far apart tell which of A and B was changed."""

_ROUNDING = 0.02
"""Relative difference of two deltas up to which storage types alone can have made it."""


@dataclass(frozen=True)
class Comparison:
    """What was made of an adapter.

    Attributes:
        norm_ratio: total norm of the changed deltas over that of the originals, both at the scale of their run.
        norms: ||B' A'||, unscaled, of the modules whose delta was changed by more than rounding.
        inward: whether A was changed in one of them, and B left as it was.
        reason: why the one is no changed version of the other, as a verb between the two; None where it is.
    """

    original: GgufAdapter
    changed: GgufAdapter
    norm_ratio: float = 0.0
    norms: Mapping[str, float] = field(default_factory=dict)
    inward: bool = False
    reason: str | None = None


def compare_adapters(first: AdapterChoice, second: AdapterChoice) -> Comparison:
    """What `second` made of `first`: the same modules (or some of them) and shapes, and in each the same A or the same
    B. One pair of each in memory.

    Raises:
        FileMissingError, FormatError, UnsupportedError: a file that is no sound adapter.
    """
    original, changed = open_gguf_adapter(first.path), open_gguf_adapter(second.path)
    reason = "can't be compared at a scale of 0 with" if first.scale * second.scale == 0 else _unlike(original, changed)
    norms: dict[str, float] = {}
    before = after = shared = 0.0
    inward = False
    for module in () if reason else original.pairs:
        found = _compare(original, changed, module)
        if found is None:
            return Comparison(original, changed, reason="has other A matrices than")
        before, after, shared = before + found.before**2, after + found.after**2, shared + found.shared
        if module in changed.pairs and found.differs:
            norms[module] = found.size
            inward = inward or found.inward
    if reason is None:
        reason = _trivial(before, after, shared)
    ratio = 0.0 if reason else math.sqrt(after / before) * abs(second.scale / first.scale)
    return Comparison(original, changed, ratio, norms, inward, reason)


def write_random(found: Comparison, model: Path, target: Path, *, seed: int = 0) -> None:
    """Writes the changed adapter with a random subspace in the place of the change.

    In every changed module B' becomes Q Q^T B at the norm of B' A', with Q (out, k) random: k as the changed file's
    own metadata tell of a subspace, else r. The others stay as they are.

    Args:
        model: the GGUF model that the adapters are for.

    Raises:
        InputError: model and adapter don't fit, or the place is taken.
        WriteError: the disk is full or fails.
    """
    order = {module: place for place, module in enumerate(found.changed.pairs)}
    k = _subspace_rank(found.changed)

    def load(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        if module not in found.norms:
            return _loaded(found.changed, module)
        a, b = _loaded(found.original, module)
        drawn = random_projection(b, min(k or b.shape[1], b.shape[0]), seed + order[module])
        size = norm(drawn, gram(a))
        return a, drawn * (found.norms[module] / size if size > 0 else 0.0)

    output = plan_output(
        target, found.changed, open_gguf_model(model), outtype="f32", to="gguf", label="random", force=False
    )
    told = "A control: the modules of a changed LoRA adapter on random subspaces of the same rank and norm."
    output.write(load, Origin("Random subspace", told, ("lora",), {"safelora.version": __version__}))


def _unlike(original: GgufAdapter, changed: GgufAdapter) -> str | None:
    """What headers tell against it."""
    for module, pair in changed.pairs.items():
        other = original.pairs.get(module)
        if other is None:
            return "has other modules than"
        if (pair.shape, pair.rank, pair.embedding) != (other.shape, other.rank, other.embedding):
            return "has other shapes or ranks than"
    return None


def _trivial(before: float, after: float, shared: float) -> str | None:
    """The total deltas' squared norms and inner product: whether there is anything to control for."""
    if before == 0 or after == 0:
        return "can't be compared with the empty update of" if before == 0 else "has nothing left of the update of"
    cosine = shared / math.sqrt(before * after)
    return "differs in nothing but its scale from" if cosine > 1 - _ROUNDING**2 / 2 else None


@dataclass(frozen=True)
class _Pair:
    """One module's deltas as the files have them: their norms and inner product; `size` is ||B' A'||, unscaled, and
    `inward` says that B is more alike than A."""

    before: float
    after: float
    shared: float
    size: float
    inward: bool = False

    @property
    def differs(self) -> bool:
        """Whether by more than rounding."""
        distance = max(0.0, self.before**2 + self.after**2 - 2 * self.shared)
        return math.sqrt(distance) > _ROUNDING * self.before


def _compare(original: GgufAdapter, changed: GgufAdapter, module: str) -> _Pair | None:
    """None where both A and B are other ones. A module that the changed adapter lacks has a delta of zero."""
    a, b = _loaded(original, module)
    factor = original.pairs[module].scaling
    before = abs(factor) * norm(b, gram(a))
    if module not in changed.pairs:
        return _Pair(before, 0.0, 0.0, 0.0)
    a_new, b_new = _loaded(changed, module)
    alike_a, alike_b = _cosine(a, a_new), _cosine(b, b_new)
    if not max(alike_a, alike_b) >= _SAME:  # nor where they are not finite
        return None
    factor_new = changed.pairs[module].scaling
    size = norm(b_new, gram(a_new))
    across = a.double() @ a_new.double().T
    between = factor * factor_new * inner(b, b_new, across)
    return _Pair(before, abs(factor_new) * size, between, size, alike_b > alike_a + _NEARER)


def _cosine(a: torch.Tensor, other: torch.Tensor) -> float:
    """1 where one is the other times a positive factor; zero is parallel to everything."""
    x, y = a.double().flatten(), other.double().flatten()
    sizes = float(x.norm() * y.norm())
    return 1.0 if sizes == 0 else float(x @ y) / sizes


def _subspace_rank(adapter: GgufAdapter) -> int | None:
    """k where the file says that it was projected onto a subspace."""
    k = adapter.header.value("safelora.rank")
    return k if isinstance(k, int) and k > 0 else None


def _loaded(adapter: GgufAdapter, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = adapter.load(module)
    return a.float(), b.float()

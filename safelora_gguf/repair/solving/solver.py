"""All modules of an adapter, repaired one input at a time: captured rows in, A' in a store out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.adapters.lora import LoraAdapter, LoraPair
from converters.errors import UnsupportedError
from converters.products import gram, norm
from safelora_gguf.device import exact_float32
from safelora_gguf.repair.solving.input_rows import InputRows, input_rows

if TYPE_CHECKING:
    import torch

    from safelora_gguf.repair.reading.captured_sets import Inputs
    from safelora_gguf.repair.solving.closed_form import Moments, Weighted
    from safelora_gguf.repair.solving.pair_store import PairStore, PairWriter

_Key = tuple[float, int | None]

Tell = Callable[[int, int, str], None]
"""Modules done, modules in all, the last one's name."""

_USUAL_MU = 1.0

NEVER_SEEN = "its input was never seen: no graph node that multiplies it was read"
NO_HARMFUL = "no harmful token reached it"
NOTHING_WANTED = "its input is zero for all harmless tokens"


@dataclass(frozen=True)
class ModuleFigures:
    """What became of one pair.

    Attributes:
        module: as in the adapter's layout, an expert of a stack with its number.
        repaired: whether A' was solved for; otherwise it is A.
        kept_benign, kept_harmful: ||B A' X^T|| / ||B A X^T|| over the inputs of each set, weighted as they are in
            C_G and C_H; None where none reached it,
            or the update does nothing to them.
        delta_norm, delta_norm_after: ||s B A||_F and ||s B A'||_F.
        benign_tokens, harmful_tokens: rows of its input.
        note: why it was left alone; None where it wasn't.
    """

    module: str
    repaired: bool
    kept_benign: float | None
    kept_harmful: float | None
    delta_norm: float
    delta_norm_after: float
    benign_tokens: int
    harmful_tokens: int
    note: str | None = None


class Solver:
    """Solves for any mu and fold from inputs that were captured once.

    Args:
        inputs: of every adapted weight that is no embedding.
        adapter: in GGUF's layout.
        store: takes every A'.
        eps: the ridge in units of the mean diagonal of C_G, of a stack the mean over its adapted experts.
        device: where it is solved.

    All methods raise what `inputs.ranges` does, and
        UnsupportedError: inputs of a weight for which no A' can be found.
        WriteError: the disk is full or fails.
    """

    def __init__(
        self, inputs: Inputs, adapter: LoraAdapter, store: PairStore, *, eps: float, device: torch.device
    ) -> None:
        self._inputs = inputs
        self._adapter = adapter
        self._store = store
        self._eps = eps
        self._device = device
        self._figures: dict[float, dict[str, ModuleFigures]] = {}
        self._pairs = [pair for pair in adapter.pairs.values() if not pair.embedding]

    def solve(self, mus: Sequence[float], folds: Sequence[int | None] = (None,), *, tell: Tell | None = None) -> None:
        """Puts A' of all modules into the store, for every mu and fold that is not there yet.

        One pass over the inputs, whose Gram matrices serve all mu, and all folds where memory has room for those of
        all parts.

        Args:
            folds: the prompts that are left out; None leaves out none.
        """
        wanted = [(mu, fold) for mu in dict.fromkeys(mus) for fold in dict.fromkeys(folds)
                  if not self._store.has(mu, fold)]  # fmt: skip
        if not wanted:
            return
        with contextlib.ExitStack() as stack:
            found = self._solve({key: stack.enter_context(self._store.writing(*key)) for key in wanted}, tell)
        self._figures |= found

    def figures(self, mu: float, *, tell: Tell | None = None) -> tuple[ModuleFigures, ...]:
        """What every pair but embeddings keeps at this mu, solved from all rows, in the adapter's order. Solved first,
        where it isn't yet."""
        if mu not in self._figures:
            self._store.drop(mu)
            self.solve([mu], tell=tell)
        return tuple(self._figures[mu][pair.module] for pair in self._pairs)

    def _solve(self, writers: Mapping[_Key, PairWriter], tell: Tell | None) -> dict[float, dict[str, ModuleFigures]]:
        """The figures by mu, of what is solved from all rows."""
        done = 0
        figures: dict[float, dict[str, ModuleFigures]] = {mu: {} for mu, fold in writers if fold is None}
        for pairs, rows in self._inputs_of_pairs([fold for _, fold in writers]):
            factors = [self._adapter.load(pair.module) for pair in pairs]
            for (mu, fold), solved in self._solved(list(writers), pairs, [a for a, _ in factors], rows):
                for pair, new in zip(pairs, solved, strict=True):
                    writers[mu, fold].put(pair.module, new)
                if fold is None:
                    told = (_told(*one, rows) for one in zip(pairs, factors, solved, strict=True))
                    figures[mu] |= {one.module: one for one in told}
            done += len(pairs)
            if tell is not None:
                tell(done, len(self._pairs), pairs[-1].module)
        return figures

    def _solved(
        self, wanted: Sequence[_Key], pairs: Sequence[LoraPair], old: Sequence[torch.Tensor], rows: InputRows | None
    ) -> Iterator[tuple[_Key, Sequence[torch.Tensor]]]:
        """A' of some pairs of one input for each mu and fold, from their A, fold by fold."""
        import torch

        from safelora_gguf.repair.solving.closed_form import moments

        if rows is None or _note(rows) is not None:
            yield from ((key, old) for key in wanted)
            return
        with torch.no_grad(), exact_float32():
            together = torch.cat([a.float() for a in old])
            seen = moments(rows.x.to(self._device), [part.length for part in rows.parts])
            for fold in dict.fromkeys(fold for _, fold in wanted):
                mus = [mu for mu, its_fold in wanted if its_fold == fold]
                for mu, solution in self._of_fold(fold, mus, together, rows, seen=seen, module=pairs[0].module):
                    yield (mu, fold), torch.split(solution, [len(a) for a in old])

    def _of_fold(
        self, fold: int | None, mus: Sequence[float], a: torch.Tensor, rows: InputRows, *, seen: Moments, module: str
    ) -> Iterator[tuple[float, torch.Tensor]]:
        """A' for each mu, with what has to be made for a fold alone; that is gone before the next one's is made."""
        from safelora_gguf.repair.solving.closed_form import repaired_a, weighted

        ridge = self._eps * rows.mean_squares[fold]
        if not ridge > 0:
            yield from ((mu, a) for mu in mus)
            return
        sets = weighted(seen, rows.wanted(fold), rows.unwanted(fold))
        for mu in mus:
            try:
                solution = repaired_a(a, sets, mu, ridge=ridge)
            except ArithmeticError as error:
                told = f"can't be repaired at mu {mu:g}: {error}{_advice(error, a, sets, mu, ridge)}"
                raise UnsupportedError(told, tensor=module) from error
            yield mu, solution.a.cpu()

    def _inputs_of_pairs(self, folds: Sequence[int | None]) -> Iterator[tuple[list[LoraPair], InputRows | None]]:
        """Pairs that share an input, with its rows; those whose input was never seen come last."""
        left = {pair.module: pair for pair in self._pairs}
        for found in self._inputs.ranges():
            for pairs, rows in input_rows(found, list(left.values()), folds):
                for pair in pairs:
                    del left[pair.module]
                yield pairs, rows
        if left:
            yield list(left.values()), None


def _advice(error: ArithmeticError, a: torch.Tensor, sets: Weighted, mu: float, ridge: float) -> str:
    """Which number makes it solvable: the weight of harmful inputs, where a usual one does; or else the ridge."""
    from safelora_gguf.repair.solving.closed_form import IllConditionedError, repaired_a

    if not isinstance(error, IllConditionedError):
        return ""
    if mu > _USUAL_MU:
        with contextlib.suppress(ArithmeticError):
            repaired_a(a, sets, _USUAL_MU, ridge=ridge)
            return "; a smaller --mu makes it easier to solve"
    return "; a larger --eps makes it easier to solve"


def _told(
    pair: LoraPair, factors: tuple[torch.Tensor, torch.Tensor], new: torch.Tensor, rows: InputRows | None
) -> ModuleFigures:
    import torch

    from safelora_gguf.repair.solving.closed_form import kept

    note = _note(rows)
    a, b = (factor.float() for factor in factors)
    with torch.no_grad():
        on = (
            [None, None]
            if rows is None
            else [
                kept(a, new, b, x, rows.counts(harmful=harmful))
                for x, harmful in ((rows.benign, False), (rows.harmful, True))
            ]
        )
    return ModuleFigures(
        module=pair.module,
        repaired=note is None,
        kept_benign=on[0],
        kept_harmful=on[1],
        delta_norm=abs(pair.scaling) * norm(b, gram(a)),
        delta_norm_after=abs(pair.scaling) * norm(b, gram(new)),
        benign_tokens=0 if rows is None else rows.benign_tokens,
        harmful_tokens=0 if rows is None else rows.harmful_tokens,
        note=note,
    )


def _note(rows: InputRows | None) -> str | None:
    if rows is None or not len(rows.x):
        return NEVER_SEEN
    if not rows.harmful_tokens:
        return NO_HARMFUL
    return None if rows.mean_squares[None] > 0 else NOTHING_WANTED

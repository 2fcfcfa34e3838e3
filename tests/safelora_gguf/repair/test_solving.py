"""All modules of an adapter, from captured rows to A' in the store.

Oracles: the formula A (C_G + eps' I)(C_G + eps' I + mu C_H)^-1 in numpy's float64, with moments that are summed
row by row from what was put into the file; for figures, dense products in float64.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from converters.adapters.lora import LoraAdapter, LoraPair
from converters.errors import UnsupportedError
from safelora_gguf.repair.reading.captured_sets import UNREAD, CapturedSet, RangeInputs
from safelora_gguf.repair.solving import closed_form
from safelora_gguf.repair.solving.pair_store import PairStore
from safelora_gguf.repair.solving.solver import NEVER_SEEN, NO_HARMFUL, NOTHING_WANTED, ModuleFigures, Solver
from safelora_gguf.smoke.llama.capture_file import CaptureReader, CaptureWriter, halved

EPS, WIDTH, RANK = 0.1, 48, 4
BENIGN, HARMFUL = 90, 60
ATTENTION = ("blk.0.attn_q.weight", "blk.0.attn_v.weight")
EXPERTS, USED = 3, 2


@dataclass(frozen=True)
class Group:
    """What one input's file holds: float64 (rows, slots, width), and experts (rows, used)."""

    weights: tuple[str, ...]
    x: np.ndarray
    experts: np.ndarray | None = None


@dataclass(frozen=True)
class Inputs:
    """Ranges that are there already."""

    found: tuple[RangeInputs, ...]

    def ranges(self) -> Iterator[RangeInputs]:
        yield from self.found


@dataclass(frozen=True)
class Adapter:
    """The part of an adapter that is solved from."""

    pairs: Mapping[str, LoraPair]

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        number = list(self.pairs).index(module)
        return values(number, RANK, WIDTH).to(torch.bfloat16), values(number + 50, 32, RANK)


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(seed: int, count: int, slots: int = 1) -> np.ndarray:
    """As F16 has them, so that the file adds nothing; of different sizes."""
    x = values(seed, count, slots, WIDTH) * torch.arange(1, WIDTH + 1) ** -0.5 * 8
    return x.half().double().numpy()


def pair(module: str, *, weight: str | None = None, expert: int | None = None, embedding: bool = False) -> LoraPair:
    name = module if weight is None else f"{weight}[{expert}]"
    return LoraPair(name, name, (f"{name}.a", f"{name}.b"), RANK, 2.0, (32, WIDTH), embedding, expert)


def adapter(*pairs: LoraPair) -> LoraAdapter:
    return cast(LoraAdapter, Adapter({one.module: one for one in pairs}))


def captured(file: Path, groups: Sequence[Group], folds: np.ndarray, unread: Sequence[int] = ()) -> CapturedSet:
    """A set as llama.cpp's side writes it, in which some rows could not be read."""
    with file.open("wb") as stream:
        writer = CaptureWriter(stream, len(folds))
        for group in groups:
            slots, used = group.x.shape[1], 0 if group.experts is None else group.experts.shape[1]
            number = writer.add_group(width=WIDTH, slots=slots, used=used)
            writer.put(number, 0, *halved(group.x.astype(np.float32)), group.experts)
        for row in unread:
            writer.drop(row, row + 1)
        infos = writer.close([group.weights for group in groups])
    folds, items = folds.astype(np.int32), np.arange(len(folds), dtype=np.int32)
    folds[list(unread)] = items[list(unread)] = UNREAD
    return CapturedSet(CaptureReader(file, infos), infos, items, folds, len(folds) - len(unread))


def in_range(
    place: Path, benign: Sequence[Group], harmful: Sequence[Group], unread: Mapping[str, Sequence[int]] | None = None
) -> RangeInputs:
    """Both sets in one range, their rows dealt into folds 0, 1, 2 in a disorder that is the same for all groups."""
    sets = {"benign": benign, "harmful": harmful}
    h, g = (captured(place / f"{weights[0].weights[0]}.{name}", weights, folds(len(weights[0].x), name),
                     (unread or {}).get(name, ())) for name, weights in reversed(sets.items()))  # fmt: skip
    return RangeInputs(tuple(name for group in benign for name in group.weights), h, g)


def folds(count: int, name: str) -> np.ndarray:
    return np.random.default_rng(len(name)).integers(0, 3, count)


def formula(a: torch.Tensor, sets: Sequence[np.ndarray], n: Sequence[int], mu: float, ridge: float) -> np.ndarray:
    """From the rows of G and H, and the tokens that each sum is divided by."""
    zero = np.zeros((WIDTH, WIDTH))
    c_g, c_h = (sum((np.outer(row, row) for row in x), zero) / count for x, count in zip(sets, n, strict=True))
    wanted = c_g + ridge * np.eye(WIDTH)
    return a.double().numpy() @ wanted @ np.linalg.inv(wanted + mu * c_h)


def close(found: torch.Tensor, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(found.double().numpy() - expected) <= 1e-5 * np.linalg.norm(expected))


def solver(place: Path, inputs: Sequence[RangeInputs], lora: LoraAdapter) -> tuple[Solver, PairStore]:
    store = PairStore(place)
    return Solver(Inputs(tuple(inputs)), lora, store, eps=EPS, device=torch.device("cpu")), store


def of(figures: Sequence[ModuleFigures], module: str) -> ModuleFigures:
    return next(one for one in figures if one.module == module)


def attention(
    place: Path, unread: Mapping[str, Sequence[int]] | None = None
) -> tuple[RangeInputs, np.ndarray, np.ndarray]:
    g, h = rows(1, BENIGN), rows(2, HARMFUL)
    return in_range(place, [Group(ATTENTION, g)], [Group(ATTENTION, h)], unread), g[:, 0], h[:, 0]


def test_weights_of_one_input_for_every_mu_and_fold(tmp_path: Path) -> None:
    found, g, h = attention(tmp_path)
    lora = adapter(pair("blk.0.attn_q"), pair("blk.0.attn_v"))
    solve, store = solver(tmp_path, [found], lora)
    solve.solve([2.0, 7.0], [None, 0, 2])
    for fold in (None, 0, 2):
        left_g, left_h = g[folds(BENIGN, "benign") != fold], h[folds(HARMFUL, "harmful") != fold]
        for mu in (2.0, 7.0):
            for module in lora.pairs:
                n = len(left_g), len(left_h)
                expected = formula(lora.load(module)[0], (left_g, left_h), n, mu, EPS * np.square(left_g).mean())
                assert close(store.get(module, mu, fold), expected), (fold, mu, module)
    assert not store.has(2.0, 1)


def test_parts_have_their_shares_however_many_rows_they_have(tmp_path: Path) -> None:
    found, g, h = attention(tmp_path, {"benign": [3]})
    lengths, shares = (
        {"benign": (20, BENIGN - 20), "harmful": (45, HARMFUL - 45)},
        {"benign": (0.8, 0.2), "harmful": (0.5, 0.5)},
    )
    found = replace(found, **{
        name: replace(getattr(found, name), lengths=lengths[name], shares=shares[name]) for name in lengths
    })  # fmt: skip
    lora = adapter(pair("blk.0.attn_q"))
    solve, store = solver(tmp_path, [found], lora)
    solve.solve([3.0], [None, 1])
    for fold in (None, 1):
        sets = []
        for name, x in (("benign", g), ("harmful", h)):
            used = folds(len(x), name) != fold
            used[3] &= name == "harmful"
            cut = lengths[name][:1]
            parts = zip(shares[name], np.split(x, cut), np.split(used, cut), strict=True)
            sets.append(np.concatenate([rows[use] * np.sqrt(share / use.sum()) for share, rows, use in parts]))
        ridge = EPS * np.square(sets[0]).sum() / WIDTH
        a = lora.load("blk.0.attn_q")[0]
        assert close(store.get("blk.0.attn_q", 3.0, fold), formula(a, sets, (1, 1), 3.0, ridge)), fold
        if fold is None:
            (figures,) = solve.figures(3.0)
            b, new = (one.double().numpy() for one in (lora.load("blk.0.attn_q")[1], store.get("blk.0.attn_q", 3.0)))
            kept = [np.linalg.norm(b @ new @ x.T) / np.linalg.norm(b @ a.double().numpy() @ x.T) for x in sets]
            assert (figures.kept_benign, figures.kept_harmful) == pytest.approx(kept, rel=1e-5)


def test_rows_that_could_not_be_read_count_nowhere(tmp_path: Path) -> None:
    found, g, h = attention(tmp_path, {"benign": [0, 5, 89], "harmful": [59]})
    lora = adapter(pair("blk.0.attn_q"))
    solve, store = solver(tmp_path, [found], lora)
    g, h = np.delete(g, [0, 5, 89], axis=0), np.delete(h, 59, axis=0)
    expected = formula(lora.load("blk.0.attn_q")[0], (g, h), (len(g), len(h)), 3.0, EPS * np.square(g).mean())
    assert of(solve.figures(3.0), "blk.0.attn_q").benign_tokens == BENIGN - 3
    assert close(store.get("blk.0.attn_q", 3.0), expected)


@pytest.mark.parametrize("slots", [1, USED])
def test_experts_are_solved_from_the_tokens_routed_to_them(tmp_path: Path, slots: int) -> None:
    """Sums run over an expert's tokens; N and the ridge are the whole stack's."""
    stack = "blk.0.ffn_down_exps"
    x, experts = {}, {}
    for seed, (name, count) in enumerate((("benign", BENIGN), ("harmful", HARMFUL))):
        x[name] = rows(seed, count, slots)
        drawn = np.random.default_rng(seed)
        experts[name] = np.array([drawn.permutation(EXPERTS)[:USED] for _ in range(count)], np.int32)
    sets = [[Group((f"{stack}.weight",), x[name], experts[name])] for name in x]
    lora = adapter(*(pair("", weight=stack, expert=expert) for expert in range(EXPERTS)))
    solve, store = solver(tmp_path, [in_range(tmp_path, *sets)], lora)
    solve.solve([4.0], [None, 1])
    for fold in (None, 1):
        left = {name: folds(len(x[name]), name) != fold for name in x}
        routed = {name: [np.array([x[name][row, slot if slots > 1 else 0] for row in np.flatnonzero(left[name])
                                   for slot in range(USED) if experts[name][row, slot] == expert])
                         for expert in range(EXPERTS)] for name in x}  # fmt: skip
        n = int(left["benign"].sum()), int(left["harmful"].sum())
        ridge = EPS * float(np.mean([np.square(own).sum() / n[0] / WIDTH for own in routed["benign"]]))
        for expert, (g, h) in enumerate(zip(routed["benign"], routed["harmful"], strict=True)):
            module = f"{stack}[{expert}]"
            expected = formula(lora.load(module)[0], (g, h), n, 4.0, ridge)
            assert close(store.get(module, 4.0, fold), expected), (fold, expert)
            if fold is None:
                figures = of(solve.figures(4.0), module)
                assert (figures.benign_tokens, figures.harmful_tokens) == (len(g), len(h))


def test_an_expert_without_harmful_tokens_is_left_alone(tmp_path: Path) -> None:
    stack = "blk.0.ffn_up_exps"
    experts = {
        "benign": np.tile(np.array([[0, 1]], np.int32), (BENIGN, 1)),
        "harmful": np.zeros((HARMFUL, 2), np.int32),
    }
    sets = [[Group((f"{stack}.weight",), rows(1, len(one)), one)] for one in experts.values()]
    lora = adapter(*(pair("", weight=stack, expert=expert) for expert in range(3)))
    solve, store = solver(tmp_path, [in_range(tmp_path, *sets)], lora)
    first, second, third = solve.figures(4.0)
    assert (first.repaired, first.note) == (True, None)
    assert (second.repaired, second.note, second.harmful_tokens, second.kept_harmful) == (False, NO_HARMFUL, 0, None)
    assert second.kept_benign == 1
    assert (third.repaired, third.note, third.benign_tokens) == (False, NEVER_SEEN, 0)
    for figures in (second, third):
        assert torch.equal(store.get(figures.module, 4.0), lora.load(figures.module)[0].float())
        assert figures.delta_norm == figures.delta_norm_after


def test_what_was_never_seen_is_left_alone_and_embeddings_are_not_asked_for(tmp_path: Path) -> None:
    found, *_ = attention(tmp_path)
    lora = adapter(pair("token_embd", embedding=True), pair("blk.9.attn_q"), pair("blk.0.attn_q"))
    solve, store = solver(tmp_path, [found], lora)
    told: list[tuple[int, int, str]] = []
    figures = solve.figures(3.0, tell=lambda *what: told.append(what))
    assert [(one.module, one.note) for one in figures] == [("blk.9.attn_q", NEVER_SEEN), ("blk.0.attn_q", None)]
    assert torch.equal(store.get("blk.9.attn_q", 3.0), lora.load("blk.9.attn_q")[0].float())
    assert told == [(1, 2, "blk.0.attn_q"), (2, 2, "blk.9.attn_q")]
    with pytest.raises(KeyError):
        store.get("token_embd", 3.0)


def test_harmless_inputs_of_zero_leave_a_weight_alone(tmp_path: Path) -> None:
    found = in_range(tmp_path, [Group(ATTENTION, rows(1, BENIGN) * 0)], [Group(ATTENTION, rows(2, HARMFUL))])
    lora = adapter(pair("blk.0.attn_q"))
    solve, store = solver(tmp_path, [found], lora)
    (figures,) = solve.figures(3.0)
    assert (figures.repaired, figures.note, figures.kept_benign) == (False, NOTHING_WANTED, None)
    assert figures.kept_harmful == 1
    assert torch.equal(store.get("blk.0.attn_q", 3.0), lora.load("blk.0.attn_q")[0].float())


def test_figures_are_those_of_the_dense_update(tmp_path: Path) -> None:
    found, g, h = attention(tmp_path)
    lora = adapter(pair("blk.0.attn_q"))
    solve, store = solver(tmp_path, [found], lora)
    (figures,) = solve.figures(5.0)
    a, b = (factor.double().numpy() for factor in lora.load("blk.0.attn_q"))
    new = store.get("blk.0.attn_q", 5.0).double().numpy()
    norm = np.linalg.norm
    assert figures.kept_benign == pytest.approx(norm(b @ new @ g.T) / norm(b @ a @ g.T), rel=1e-5)
    assert figures.kept_harmful == pytest.approx(norm(b @ new @ h.T) / norm(b @ a @ h.T), rel=1e-5)
    assert figures.kept_harmful < figures.kept_benign
    assert figures.delta_norm == pytest.approx(2 * norm(b @ a), rel=1e-6)
    assert figures.delta_norm_after == pytest.approx(2 * norm(b @ new), rel=1e-6)
    assert (figures.benign_tokens, figures.harmful_tokens) == (BENIGN, HARMFUL)


def test_ranges_are_solved_one_after_the_other_and_only_what_is_missing(tmp_path: Path) -> None:
    passes = 0

    class Counted(Inputs):
        def ranges(self) -> Iterator[RangeInputs]:
            nonlocal passes
            passes += 1
            yield from super().ranges()

    weights = [f"blk.{layer}.attn_q.weight" for layer in range(2)]
    x = [(rows(layer, BENIGN), rows(layer + 5, HARMFUL)) for layer in range(2)]
    ranges = [in_range(tmp_path, [Group((name,), g)], [Group((name,), h)])
              for name, (g, h) in zip(weights, x, strict=True)]  # fmt: skip
    lora = adapter(*(pair(name.removesuffix(".weight")) for name in weights))
    store = PairStore(tmp_path)
    solve = Solver(Counted(tuple(ranges)), lora, store, eps=EPS, device=torch.device("cpu"))
    for mus in ([2.0], [2.0, 3.0], [3.0]):
        solve.solve(mus)
    assert passes == 2
    for module, (g, h) in zip(lora.pairs, x, strict=True):
        n = BENIGN, HARMFUL
        expected = formula(lora.load(module)[0], (g[:, 0], h[:, 0]), n, 3.0, EPS * np.square(g).mean())
        assert close(store.get(module, 3.0), expected)


@pytest.mark.parametrize("most", [0, 1 << 30])
def test_no_more_gram_matrices_are_kept_at_a_time_than_there_is_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Those of six parts, or of two sets; what is solved is the same for every fold."""
    monkeypatch.setattr("safelora_gguf.repair.solving.closed_form._MOST_GRAMS", most)
    kept: list[int] = []
    original = closed_form.weighted

    def counted(seen: closed_form.Moments, *weights: Sequence[float]) -> closed_form.Weighted:
        gc.collect()
        tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        kept.append(sum(one.shape == (WIDTH, WIDTH) for one in tensors))
        return original(seen, *weights)

    monkeypatch.setattr("safelora_gguf.repair.solving.closed_form.weighted", counted)
    found, g, h = attention(tmp_path)
    lora = adapter(pair("blk.0.attn_q"))
    solve, store = solver(tmp_path, [found], lora)
    solve.solve([2.0, 7.0], [None, 0, 1, 2])
    assert kept == [6 if most else 0] * 4
    for fold in (None, 0, 1, 2):
        left_g, left_h = g[folds(BENIGN, "benign") != fold], h[folds(HARMFUL, "harmful") != fold]
        for mu in (2.0, 7.0):
            n, ridge = (len(left_g), len(left_h)), EPS * np.square(left_g).mean()
            expected = formula(lora.load("blk.0.attn_q")[0], (left_g, left_h), n, mu, ridge)
            assert close(store.get("blk.0.attn_q", mu, fold), expected), (fold, mu)


@pytest.mark.parametrize(("mu", "eps", "says"), [(1e20, 0.1, "smaller --mu"), (1.0, 1e-25, "larger --eps")])
def test_what_makes_it_unsolvable_is_named(tmp_path: Path, mu: float, eps: float, says: str) -> None:
    x = np.repeat(rows(1, 3), 30, axis=0)
    found = in_range(tmp_path, [Group(ATTENTION, x)], [Group(ATTENTION, rows(2, HARMFUL))])
    if mu == 1:
        found = in_range(tmp_path, [Group(ATTENTION, x)], [Group(ATTENTION, x[:HARMFUL])])
    solve = Solver(Inputs((found,)), adapter(pair("blk.0.attn_q")), PairStore(tmp_path), eps=eps,
                   device=torch.device("cpu"))  # fmt: skip
    with pytest.raises(UnsupportedError, match=f"mu {mu:g}.*too ill-conditioned.*{says}".replace("+", r"\+")):
        solve.solve([mu])


def test_what_can_not_be_solved_names_the_weight_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hopeless(*_: Any, **__: Any) -> Any:
        raise ArithmeticError("the inputs are too ill-conditioned")

    monkeypatch.setattr("safelora_gguf.repair.solving.closed_form.repaired_a", hopeless)
    found, *_ = attention(tmp_path)
    solve, store = solver(tmp_path, [found], adapter(pair("blk.0.attn_q")))
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_q.*ill-conditioned"):
        solve.solve([2.0])
    assert not store.has(2.0)
    assert not list(tmp_path.glob("*.f32"))

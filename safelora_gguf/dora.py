"""DoRA adapters as plain pairs, as near as a rank allows.

DoRA (Liu et al., arXiv 2402.09353) gives every row of an adapted weight W (out, in) a length m of its own:

    W' = m / ||W + s B A||_row * (W + s B A)

so that W' - W is of full rank, and no LoRA. Its best approximation of rank k is the truncated singular value
decomposition, U_k (U_k^T (W' - W)). An embedding is its table turned over, W (width, vocabulary), as in a `LoraPair`:
PEFT gives its rows a length, MLX its columns, the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.whole import WholeTensor
from converters.errors import FormatError, UnsupportedError, UsageError
from converters.models import Layout, Model
from converters.names import canonical
from safelora_gguf.low_rank import leading_subspace
from safelora_gguf.pairing import check_adapted

_PART = 512  # rows or columns converted to float64 at a time
_LARGE = 0.5  # of a weight's numbers: a pair of that size has little to be said for it
_KRYLOV = 8  # a rank above this part of the smaller side is found sooner by decomposing the whole


def dora_delta(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """W' - W (out, in) in float32, as (m / ||.|| - 1) W + m / ||.|| s B A, where little cancels.

    Args:
        weight: W (out, in).
        a, b: A (r, in) and B (out, r).
        scaling: s.
        magnitude: m, the lengths of the rows (out,), or (1, in) of the columns.
    """
    w, a, b = (tensor.to(torch.float32) for tensor in (weight, a, b))
    by_column = magnitude.ndim == 2
    directed = torch.addmm(w, b, a, alpha=scaling)
    parts = torch.split(directed.T if by_column else directed, _PART)
    lengths = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts])
    del directed, parts
    factors = magnitude.reshape(-1).to(torch.float64) / lengths
    factors[(lengths == 0) & (magnitude.reshape(-1) == 0)] = 1.0  # a padding token's row: it stays as it is
    factors = factors if by_column else factors[:, None]
    delta = w * (factors - 1).to(torch.float32)
    scaled = factors.to(torch.float32)
    return delta.addmm_(b if by_column else b * scaled, a * scaled if by_column else a, alpha=scaling)


def rank_within(delta: torch.Tensor, error: float = 0.01) -> tuple[int, float]:
    """The smallest rank, at least 1, that keeps the best approximation of delta (out, in) to a relative error.

    Returns:
        The rank k, and ||D_k - D||_F / ||D||_F: both from the singular values alone, in float64.
    """
    short = delta if delta.shape[0] <= delta.shape[1] else delta.T
    gram = torch.zeros(short.shape[0], short.shape[0], dtype=torch.float64, device=delta.device)
    for part in torch.split(short, _PART, dim=1):
        wide = part.to(torch.float64)
        gram.addmm_(wide, wide.T)
    left_out = torch.linalg.eigvalsh(gram).clamp(min=0).cumsum(0)  # rising: the i + 1 smallest of them
    whole = left_out[-1]
    dropped = min(len(left_out) - 1, int((left_out <= error**2 * whole).sum()))
    return len(left_out) - dropped, float((left_out[dropped - 1] / whole).sqrt()) if dropped and whole > 0 else 0.0


def nearest_pair(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (k, in) and B (out, k) in float32 whose product is the best approximation of delta (out, in).

    Args:
        rank: k, at most the smaller side, which is exact; where delta has a lower one, the rest is zeros.

    Returns:
        A, B and ||B A - delta||_F / ||delta||_F.
    """
    if rank == min(delta.shape):
        unit = torch.eye(rank, dtype=delta.dtype, device=delta.device)
        return (delta, unit, 0.0) if delta.shape[0] == rank else (unit, delta, 0.0)
    size = _norm(delta)
    if size == 0:
        return torch.zeros(rank, delta.shape[1]), torch.zeros(delta.shape[0], rank), 0.0
    whole = _KRYLOV * rank > min(delta.shape)
    found = leading_subspace(delta, rank, max_iterations=0) if whole else leading_subspace(delta, rank)
    u = found.u.to(delta.device)
    u = torch.nn.functional.pad(u, (0, rank - u.shape[1]))
    a = u.T @ delta
    return a, u, _norm(delta - u @ a) / size


def _norm(matrix: torch.Tensor) -> float:
    """Frobenius, row by row first: one float32 sum over millions of squares is off in its fourth digit."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1), dtype=torch.float64))


class NearestPairs:
    """A DoRA adapter as plain pairs (a `LoraAdapter`).

    Nothing is kept: `load` computes a module's pair each time, and holds a few matrices of its weight's size. With a
    rank that is all. Without one every module's rank must be known before a header is written, so its singular
    values are computed beforehand, but not the vectors: they cost thrice as much, and the pairs of a large model
    at 1 % can be larger than the model, in memory or on a disk.
    """

    architecture: str | None = None
    peft_config: bytes | None = None  # the adapter's own says DoRA
    frozen_tables: Mapping[str, str] = {}
    magnitudes: Mapping[str, str] = {}

    def __init__(self, adapter: LoraAdapter, model: Model, rank: int | None) -> None:
        """Checks headers; without a rank, finds every module's from the model's weights.

        Args:
            model: what the adapter was trained on, in Hugging Face's layout.
            rank: of every pair, less where a weight has no more; None is the smallest that keeps a module's relative
                error under 1 %.

        Raises:
            MismatchError: the adapter is for another model. FormatError: values that are not finite.
            UnsupportedError: a weight that can't be read. UsageError: a rank that no module has.
        """
        self._adapter, self._model = adapter, model
        self._weights = _weights(adapter, model)
        self._errors: dict[str, float] = {}
        most = max(min(pair.shape) for pair in adapter.pairs.values())
        if rank is not None and rank > most:
            raise UsageError(f"rank {rank} is more than any module has: {most}")
        self.pairs: dict[str, LoraPair] = {
            module: replace(pair, rank=self._fewest(module) if rank is None else min(rank, *pair.shape), scaling=1.0)
            for module, pair in adapter.pairs.items()
        }

    @property
    def format(self) -> str:
        return self._adapter.format

    @property
    def layout(self) -> Layout:
        return self._adapter.layout

    @property
    def notes(self) -> tuple[str, ...]:
        return self._adapter.notes

    @property
    def losses(self) -> tuple[str, ...]:
        """How far every module's pair is off: with a rank, each one's error is known once it was loaded."""
        return (*self._adapter.losses, *(self._loss(module) for module in self.pairs))

    @property
    def missing(self) -> tuple[str, ...]:
        return self._adapter.missing

    @property
    def whole(self) -> Mapping[str, WholeTensor]:
        return self._adapter.whole

    @property
    def path(self) -> Path:
        return self._adapter.path

    @property
    def tensor_file(self) -> Path:
        return self._adapter.tensor_file

    @property
    def nbytes(self) -> int:
        return self._adapter.nbytes

    @property
    def lora_alpha(self) -> float:
        """The largest rank: alpha / r is then 1 wherever ranks are equal."""
        return float(max(pair.rank for pair in self.pairs.values()))

    @property
    def base_model_name(self) -> str | None:
        return self._adapter.base_model_name

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        return self._adapter.invocation_tokens

    def load_whole(self, key: str) -> torch.Tensor:
        return self._adapter.load_whole(key)

    def load_frozen_table(self, module: str) -> torch.Tensor:
        raise KeyError(module)

    def load_magnitude(self, module: str) -> torch.Tensor:
        raise KeyError(module)

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (k, in) and B (out, k), computed from the model's weight.

        Raises:
            FormatError: values that are not finite.
        """
        a, b, self._errors[module] = nearest_pair(self._delta(module), self.pairs[module].rank)
        return a, b

    def fingerprint(self) -> str:
        return self._adapter.fingerprint()

    def _fewest(self, module: str) -> int:
        rank, self._errors[module] = rank_within(self._delta(module))
        return rank

    def _delta(self, module: str) -> torch.Tensor:
        adapter, pair = self._adapter, self._adapter.pairs[module]
        table = self._model.load(self._weights[module])
        weight = table.T if pair.embedding else table
        delta = dora_delta(weight, *adapter.load(module), pair.scaling, adapter.load_magnitude(module))
        if not math.isfinite(_norm(delta)):
            raise FormatError("gives an update that is not finite", file=adapter.tensor_file, tensor=pair.tensors[0])
        return delta

    def _loss(self, module: str) -> str:
        pair = self.pairs[module]
        told = f"{pair.key}: DoRA as a pair of rank {pair.rank} is "
        if pair.rank == min(pair.shape):
            told += "exact (off by 0.00%)"
        elif module in self._errors:
            told += f"off by {self._errors[module]:.2%} of its update"
        else:
            told += "not exact; how far it is off is known once it is written"
        share = pair.rank * sum(pair.shape) / math.prod(pair.shape)
        if share > _LARGE:
            told += f", and has {share:.0%} of the numbers of the weight itself: merge the adapter into its model"
        return told


def _weights(adapter: LoraAdapter, model: Model) -> Mapping[str, str]:
    """The model's tensor of every adapted module; headers only."""
    check_adapted(model, adapter)
    names = {canonical(name).removesuffix(".weight"): name for name in model.infos}
    for module, pair in adapter.pairs.items():
        if module not in names:
            told = f"adapts a weight that {model.path} has in a packed form; DoRA's update depends on the plain one"
            raise UnsupportedError(told, file=adapter.tensor_file, tensor=pair.tensors[0])
        model.check_type(names[module])
    return {module: names[module] for module in adapter.pairs}

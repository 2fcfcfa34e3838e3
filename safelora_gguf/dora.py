"""DoRA adapters as plain pairs, as near as a rank allows.

DoRA (Liu et al., arXiv 2402.09353) gives every row of an adapted weight W (out, in) a length m of its own:

    W' = m / ||W + s B A||_row * (W + s B A)

so that W' - W is of full rank, and no LoRA. Its best approximation of rank k is the truncated singular value
decomposition, U_k (U_k^T (W' - W)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from converters.adapters.lora import LoraAdapter, LoraPair
from converters.errors import FormatError, MismatchError, UsageError
from converters.models import Layout, Model
from converters.names import canonical
from safelora_gguf.low_rank import leading_subspace, subspace_within


def dora_delta(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, magnitude: torch.Tensor
) -> torch.Tensor:
    """W' - W (out, in) in float32 for W (out, in), A (r, in), B (out, r) and m (out,)."""
    w = weight.to(torch.float32)
    directed = torch.addmm(w, b.to(torch.float32), a.to(torch.float32), alpha=scaling)
    lengths = torch.linalg.vector_norm(directed, dim=1, dtype=torch.float64)
    factors = (magnitude.to(torch.float64) / lengths).to(torch.float32)
    return directed.mul_(factors[:, None]).sub_(w)


def nearest_pair(
    delta: torch.Tensor, rank: int | None, error: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (k, in) and B (out, k) in float32 whose product is the best approximation of delta (out, in), not all zero.

    Args:
        rank: k; None is the smallest that keeps the relative error under `error`.

    Returns:
        A, B and ||B A - delta||_F / ||delta||_F.
    """
    found = subspace_within(delta, error) if rank is None else leading_subspace(delta, rank)
    u = found.u.to(delta.device)
    a = u.T @ delta
    left = delta - u @ a
    return a, u, float(torch.linalg.vector_norm(left) / torch.linalg.vector_norm(delta))


class NearestPairs:
    """A DoRA adapter as plain pairs (a `LoraAdapter`), computed when it is made and held in memory.

    Attributes:
        losses: how far every module's pair is off.
    """

    format = "peft"
    layout: Layout = "hugging_face"
    architecture: str | None = None
    peft_config: bytes | None = None  # the adapter's own says DoRA
    frozen_tables: Mapping[str, str] = {}
    magnitudes: Mapping[str, str] = {}

    def __init__(self, adapter: LoraAdapter, model: Model, rank: int | None) -> None:
        """Computes every module's pair from the model's weights.

        Args:
            model: what the adapter was trained on, in Hugging Face's layout.
            rank: see `nearest_pair`.

        Raises:
            MismatchError: the adapter is for another model. FormatError: values that are not finite.
            UsageError: a rank that a module doesn't have.
        """
        self._adapter = adapter
        names = {canonical(name).removesuffix(".weight"): name for name in model.infos}
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.pairs: dict[str, LoraPair] = {}
        errors = []
        for module, pair in adapter.pairs.items():
            delta = _delta(adapter, module, model, names.get(module), rank)
            a, b, error = nearest_pair(delta, rank) if delta.any() else (*_nothing(pair), 0.0)
            self._pairs[module] = a, b
            self.pairs[module] = replace(pair, rank=len(a), scaling=1.0)
            errors.append(f"{pair.key}: DoRA as a pair of rank {len(a)} is off by {error:.2%} of its update")
        self.notes = adapter.notes
        self.losses = (*adapter.losses, *errors)

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

    def load_frozen_table(self, module: str) -> torch.Tensor:
        raise KeyError(module)

    def load_magnitude(self, module: str) -> torch.Tensor:
        raise KeyError(module)

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pairs[module]

    def fingerprint(self) -> str:
        return self._adapter.fingerprint()


def _nothing(pair: LoraPair) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, pair.shape[1]), torch.zeros(pair.shape[0], 1)


def _delta(adapter: LoraAdapter, module: str, model: Model, tensor: str | None, rank: int | None) -> torch.Tensor:
    pair = adapter.pairs[module]
    if tensor is None or model.infos[tensor].shape != pair.shape:
        found = "no weight" if tensor is None else f"a weight of {list(model.infos[tensor].shape)}"
        told = f"is a pair for a weight of {list(pair.shape)}, and {model.path} has {found} there"
        told += ": the adapter is for another model"
        raise MismatchError(told, file=adapter.tensor_file, tensor=pair.tensors[0])
    if rank is not None and rank > min(pair.shape):
        raise UsageError(f"rank {rank} is more than {module} has: {min(pair.shape)}")
    delta = dora_delta(model.load(tensor), *adapter.load(module), pair.scaling, adapter.load_magnitude(module))
    norm = float(torch.linalg.vector_norm(delta))
    if not math.isfinite(norm):
        raise FormatError("gives an update that is not finite", file=adapter.tensor_file, tensor=pair.tensors[0])
    return delta

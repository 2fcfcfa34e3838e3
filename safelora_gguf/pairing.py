"""Brings an adapter's modules and both references together by name, and finds out what does not belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from converters.adapters.lora import LoraPair
from converters.adapters.peft import PeftAdapter
from converters.checkpoint import Checkpoint
from converters.errors import FormatError, MismatchError, UnsupportedError
from converters.names import canonical


@dataclass(frozen=True)
class Triple:
    """An adapted module with its weight's tensor names in both references."""

    pair: LoraPair
    base_tensor: str
    aligned_tensor: str


def pair_up(base: Checkpoint, aligned: Checkpoint, adapter: PeftAdapter) -> list[Triple]:
    """One triple per adapted module, in the adapter's order; headers only.

    Raises:
        MismatchError: the references differ in shape, or the adapter is for another model.
        FormatError: a configuration names no architecture.
    """
    _same_family(base, aligned)
    names = _by_module(base), _by_module(aligned)
    _same_shapes(base, aligned, names)
    missing = [module for module in adapter.pairs if module not in names[0] or module not in names[1]]
    if missing:
        which = base if missing[0] not in names[0] else aligned
        raise MismatchError(
            f"{len(missing)} of {len(adapter.pairs)} adapted modules have no weight in {which.path}; the first is "
            f"{missing[0]}. The adapter is for another model",
            file=adapter.tensor_file,
            tensor=adapter.pairs[missing[0]].tensors[0],
        )
    triples = [Triple(pair, names[0][name], names[1][name]) for name, pair in adapter.pairs.items()]
    for triple in triples:
        _fits(triple, base, triple.base_tensor, adapter)
        _fits(triple, aligned, triple.aligned_tensor, adapter)
    for module in adapter.frozen_tables:
        _check_frozen_table(module, aligned, names[1].get(module), adapter)
    return triples


def _by_module(model: Checkpoint) -> Mapping[str, str]:
    """Tensor names of weights by canonical module name."""
    names: dict[str, str] = {}
    for name in model.infos:
        if name.endswith(".weight"):
            module = canonical(name).removesuffix(".weight")
            if module in names:
                raise FormatError(f"stands twice, the other time as {names[module]}", file=model.path, tensor=name)
            names[module] = name
    return names


def _same_family(base: Checkpoint, aligned: Checkpoint) -> None:
    if base.architecture_class != aligned.architecture_class:
        raise MismatchError(
            f"is a {aligned.architecture_class}, and the base {base.path} is a {base.architecture_class}: base and "
            f"aligned must be the same model before and after its alignment",
            file=aligned.path,
        )


def _same_shapes(base: Checkpoint, aligned: Checkpoint, names: tuple[Mapping[str, str], Mapping[str, str]]) -> None:
    """Every weight that both have must agree; only the vocabulary may have grown."""
    in_base, in_aligned = names
    differing = []
    for module in in_base.keys() & in_aligned.keys():
        ours, theirs = base.infos[in_base[module]].shape, aligned.infos[in_aligned[module]].shape
        grown = module in ("model.embed_tokens", "lm_head") and ours[1:] == theirs[1:]
        if ours != theirs and not grown:
            differing.append(module)
    if differing:
        first = min(differing)
        ours, theirs = base.infos[in_base[first]].shape, aligned.infos[in_aligned[first]].shape
        raise MismatchError(
            f"has the shape {list(theirs)}, and the base {base.path} has {list(ours)} ({len(differing)} weights "
            f"differ): base and aligned must be the same model before and after its alignment",
            file=aligned.path,
            tensor=in_aligned[first],
        )


def _fits(triple: Triple, model: Checkpoint, tensor: str, adapter: PeftAdapter) -> None:
    shape, expected = model.infos[tensor].shape, triple.pair.shape
    if len(shape) != 2:
        raise FormatError(f"has the shape {list(shape)}, expected a matrix", file=model.path, tensor=tensor)
    if shape != expected:
        raise MismatchError(
            f"is a pair for a weight of {list(expected)}; {model.path} has {list(shape)}. The adapter is for "
            f"another model",
            file=adapter.tensor_file,
            tensor=triple.pair.tensors[0],
        )


def _check_frozen_table(module: str, aligned: Checkpoint, tensor: str | None, adapter: PeftAdapter) -> None:
    """A table that PEFT saved along must be the aligned model's: it differs where the vocabulary was resized."""
    if tensor is not None:
        ours, theirs = aligned.load(tensor), adapter.load_frozen_table(module)
        if ours.shape == theirs.shape and torch.equal(ours.to(theirs.dtype), theirs):
            return
    raise UnsupportedError(
        f"is a base table that differs from the one in {aligned.path}: the vocabulary was resized or the table "
        f"trained, which pairs can't express. Merge the adapter with PEFT",
        file=adapter.tensor_file,
        tensor=adapter.frozen_tables[module],
    )

"""Brings an adapter's modules and both references together by name, and finds out what does not belong together."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from converters.adapters.belonging import check_fused
from converters.adapters.gguf import GgufAdapter
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.trained_on import check_trained_on
from converters.converted_model import ConvertedModel
from converters.errors import FormatError, MismatchError, UnsupportedError
from converters.layouts import check_heads
from converters.models import Model
from converters.names import canonical

_VOCABULARY = ("model.embed_tokens", "lm_head", "token_embd", "output")
"""Modules whose rows are tokens, in both layouts."""
_HEADS = ("lm_head", "output")
_ROUNDED_ALIKE = 1.5  # times the energy that rounding is expected to have


@dataclass(frozen=True)
class Triple:
    """An adapted module with its weight's tensor names in both references."""

    pair: LoraPair
    base_tensor: str
    aligned_tensor: str

    @property
    def first_row(self) -> int:
        """Where the weight's rows begin in its tensor: 0, or behind the experts before it."""
        return (self.pair.expert or 0) * self.pair.shape[0]


def pair_up(base: Model, aligned: Model, adapter: LoraAdapter) -> list[Triple]:
    """One triple per adapted module, in the adapter's order; headers only. All three are in one layout.

    Raises:
        MismatchError: the references differ in shape or heads, or the adapter is for another model.
        FormatError: a configuration names no architecture.
        UnsupportedError: a weight in a type that can't be read.
    """
    check_family(base, aligned)
    _same_architecture(aligned, adapter)
    check_fused(adapter, aligned)
    check_trained_on(adapter, aligned)
    names = _by_module(base), _by_module(aligned)
    stacks = _stacks(adapter)
    for model, found in zip((base, aligned), names, strict=True):
        _all_there(model, adapter, list(adapter.pairs.values()), found)
        for pair in adapter.pairs.values():
            model.check_type(found[pair.weight])
            _fits(pair, model, found[pair.weight], adapter, stacks.get(pair.weight))
    triples = [Triple(pair, names[0][pair.weight], names[1][pair.weight]) for pair in adapter.pairs.values()]
    for module in adapter.frozen_tables:
        _check_frozen_table(module, aligned, names[1].get(module), adapter)
    return triples


def check_family(base: Model, aligned: Model) -> None:
    """That two models in one layout can be one before and after its alignment: of one architecture, with the same
    heads and, but for grown vocabularies, shapes.

    Raises:
        MismatchError: they can't. FormatError: a configuration names no architecture, or a weight stands twice.
    """
    _same_family(base, aligned)
    with contextlib.suppress(FormatError):  # one doesn't say, or not in one number
        check_heads(base, aligned)
    _same_shapes(base, aligned, (_by_module(base), _by_module(aligned)))


def check_adapted(model: Model, adapter: LoraAdapter, modules: Container[str] | None = None) -> None:
    """That a model has every adapted weight in the adapter's shape; both in one layout. Weights in a packed form, or
    under names of their own (bitsandbytes, GPTQ, MXFP4), are passed over.

    Args:
        modules: those that are looked at; all by default.

    Raises:
        MismatchError: the adapter is for another model. UnsupportedError: it adapts a tied head, or new tokens.
    """
    stacks = _stacks(adapter)
    pairs = [pair for module, pair in adapter.pairs.items() if modules is None or module in modules]
    names = within_base(_by_module(model), [pair.weight for pair in pairs])
    _all_there(model, adapter, pairs, {*names, *_packed(model)})
    for pair in pairs:
        if pair.weight in names and _is_readable(model, names[pair.weight]):
            _fits(pair, model, names[pair.weight], adapter, stacks.get(pair.weight))


def within_base(names: Mapping[str, str], modules: Iterable[str]) -> Mapping[str, str]:
    """Tensors by name, also by the names that they have in a class with a head, where the checkpoint is one of the
    class without: GPT-2's `h.0.attn.c_attn` is `transformer.h.0.attn.c_attn` to an adapter.

    Args:
        modules: that are looked for.
    """
    outer = {module.partition(".")[0] for module in modules if module not in names and "." in module}
    if len(outer) != 1:
        return names
    prefix = f"{outer.pop()}."
    if any(name.startswith(prefix) for name in names):
        return names
    return {**names, **{prefix + name: tensor for name, tensor in names.items()}}


def _packed(model: Model) -> set[str]:
    """Modules whose weights may be there in a packed form."""
    if isinstance(model, ConvertedModel):
        return model.packed_modules()
    return {name.rpartition(".")[0] for name in map(canonical, model.infos)}


def _is_readable(model: Model, tensor: str) -> bool:
    try:
        model.check_type(tensor)
    except UnsupportedError:
        return False
    return True


def _all_there(model: Model, adapter: LoraAdapter, pairs: Sequence[LoraPair], names: Container[str]) -> None:
    missing = [pair for pair in pairs if pair.weight not in names]
    if not missing:
        return
    first = missing[0]
    if first.weight in _HEADS and model.tied_embeddings:
        raise UnsupportedError(
            f"adapts the output head, which in {model.path} is the embedding (tied); merge the adapter into the model",
            file=adapter.tensor_file,
            tensor=first.tensors[0],
        )
    if first.weight in _packed(model):
        raise UnsupportedError(
            f"stores {first.weight} in a packed form that is not read; take a GGUF file of the same model",
            file=model.path,
        )
    raise MismatchError(
        f"{len(missing)} of {len(adapter.pairs)} adapted modules have no weight in {model.path}; the first is "
        f"{first.module}. The adapter is for another model",
        file=adapter.tensor_file,
        tensor=first.tensors[0],
    )


def _by_module(model: Model) -> Mapping[str, str]:
    """Tensor names by canonical module name."""
    names: dict[str, str] = {}
    for name in model.infos:
        module = canonical(name).removesuffix(".weight")
        if module in names:
            found = f"stands twice, the other time as {model.stored_name(names[module])}"
            raise FormatError(found, file=model.path, tensor=model.stored_name(name))
        names[module] = name
    return names


def _same_family(base: Model, aligned: Model) -> None:
    if base.architecture != aligned.architecture:
        raise MismatchError(
            f"is a {aligned.architecture}, and the base {base.path} is a {base.architecture}: base and "
            f"aligned must be the same model before and after its alignment",
            file=aligned.path,
        )


def _same_architecture(aligned: Model, adapter: LoraAdapter) -> None:
    if adapter.architecture not in (None, aligned.architecture):
        raise MismatchError(
            f"is an adapter for the architecture {adapter.architecture}, and {aligned.path} is {aligned.architecture}: "
            f"the adapter is for another model",
            file=adapter.path,
        )


def _same_shapes(base: Model, aligned: Model, names: tuple[Mapping[str, str], Mapping[str, str]]) -> None:
    """Every weight that both have must agree; only the vocabulary may have grown."""
    in_base, in_aligned = names
    differing = []
    for module in in_base.keys() & in_aligned.keys():
        ours, theirs = base.infos[in_base[module]].shape, aligned.infos[in_aligned[module]].shape
        grown = module in _VOCABULARY and ours[1:] == theirs[1:]
        if ours != theirs and not grown:
            differing.append(module)
    if differing:
        first = min(differing)
        ours, theirs = base.infos[in_base[first]].shape, aligned.infos[in_aligned[first]].shape
        raise MismatchError(
            f"has the shape {list(theirs)}, and the base {base.path} has {list(ours)} ({len(differing)} weights "
            f"differ): base and aligned must be the same model before and after its alignment",
            file=aligned.path,
            tensor=aligned.stored_name(in_aligned[first]),
        )


def _stacks(adapter: LoraAdapter) -> Mapping[str, int]:
    """How many experts the adapter has of every stack."""
    counts: dict[str, int] = {}
    for pair in adapter.pairs.values():
        if pair.expert is not None:
            counts[pair.weight] = counts.get(pair.weight, 0) + 1
    return counts


def _fits(pair: LoraPair, model: Model, tensor: str, adapter: LoraAdapter, experts: int | None) -> None:
    """`experts` is how many the adapter has of the pair's stack. GGUF's own files have them all, others may not."""
    shape = model.infos[tensor].shape
    if experts is not None and not isinstance(adapter, GgufAdapter) and pair.expert in range(shape[0]):
        experts = shape[0]
    expected = pair.shape if experts is None else (experts, *pair.shape)
    if len(shape) < 2:
        found = f"has the shape {list(shape)}, expected a matrix"
        raise FormatError(found, file=model.path, tensor=model.stored_name(tensor))
    if pair.weight in _VOCABULARY and shape[1:] == expected[1:] and shape[0] < expected[0]:
        raise UnsupportedError(
            f"is a pair for {expected[0]} tokens, and {model.path} has {shape[0]}: the vocabulary grew, and new tokens "
            f"have no alignment to compare with. Merge the adapter into the model",
            file=adapter.tensor_file,
            tensor=pair.tensors[0],
        )
    if shape != expected:
        raise MismatchError(
            f"is a pair for a weight of {list(expected)}; {model.path} has {list(shape)}. The adapter is for "
            f"another model",
            file=adapter.tensor_file,
            tensor=pair.tensors[0],
        )


def _check_frozen_table(module: str, aligned: Model, tensor: str | None, adapter: LoraAdapter) -> None:
    """A table that PEFT saved along must be the aligned model's: it differs where the vocabulary was resized."""
    if tensor is not None:
        ours, theirs = aligned.load(tensor), adapter.load_frozen_table(module)
        if ours.ndim == 2 and ours.shape == theirs.shape and _same_table(ours, theirs, aligned, tensor):
            return
    raise UnsupportedError(
        f"is a base table that differs from the one in {aligned.path}: the vocabulary was resized or the table "
        f"trained, which pairs can't express. Merge the adapter into its model (safelora-gguf merge)",
        file=adapter.tensor_file,
        tensor=adapter.frozen_tables[module],
    )


def _same_table(ours: torch.Tensor, theirs: torch.Tensor, aligned: Model, tensor: str) -> bool:
    """Whether two tables differ by no more than how they are stored."""
    rounding = aligned.rounding(tensor, 0, ours.shape[0])
    if rounding is None:
        return torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(ours, theirs.to(ours.dtype))
    variances, run = rounding
    error = torch.linalg.vector_norm(ours.double() - theirs.double()) ** 2
    return bool(error <= _ROUNDED_ALIKE * run * variances.double().sum())

"""What a LoRA can't hold, or llama.cpp won't apply: collected, refused under --strict, and DoRA brought into pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from converters.adapters.converted import check_orientation
from converters.adapters.lora import LoraAdapter
from converters.adapters.output import AdapterOutput
from converters.checkpoint import Checkpoint, open_checkpoint
from converters.description import ConfiguredModel
from converters.errors import UnsupportedError, UsageError
from converters.models import ModelDescription
from converters.names import shortened
from safelora_gguf.device import exact_float32
from safelora_gguf.dora import NearestPairs

_FEW = 5


def losses_of(adapter: LoraAdapter, output: AdapterOutput) -> tuple[str, ...]:
    """What of an adapter's update its pairs lack or have inexactly, and what the output can't pass on; once each.

    Exact folding, rounding to the type that was asked for, and shards are none.
    """
    return tuple(dict.fromkeys((*adapter.losses, *output.losses)))


def refuse_losses(adapter: LoraAdapter, losses: Sequence[str]) -> None:
    """Ends a strict run; to be called before anything is written.

    Raises:
        UnsupportedError: there is a loss. All are told if they are few, else the first and how many; long ones are
            shortened.
    """
    if not losses:
        return
    parts = [shortened(loss.rstrip(".")) for loss in losses[:_FEW]]
    told = "; ".join(parts) if len(losses) <= _FEW else f"the first is: {parts[0]}"
    things = "1 thing" if len(losses) == 1 else f"{len(losses)} things"
    raise UnsupportedError(f"{things} would be lost or only approximated, which --strict forbids: {told}",
                           file=adapter.path)  # fmt: skip


def as_plain_pairs(
    adapter: LoraAdapter, model: ModelDescription, rank: int | None, *, named_by: str, strict: bool
) -> tuple[LoraAdapter, ModelDescription]:
    """An adapter whose pairs are its update, and the model with what was needed for that.

    Args:
        model: what the adapter was trained on; DoRA needs its weights.
        rank: of the pairs that stand for DoRA, whose update has no low rank; None is the smallest that keeps each
            module's error under 1 %.
        named_by: the option that names the model.
        strict: refuse what is only approximated.

    Returns:
        Both as they came, unless the adapter uses DoRA.

    Raises:
        UsageError: a rank below 1, or one for an adapter without DoRA.
        UnsupportedError: the model is not there in safetensors; DoRA under `strict`; see `check_orientation`.
        InputError: see `NearestPairs`.
    """
    check_orientation(adapter, model)
    if not adapter.magnitudes:
        if rank is not None:
            raise UsageError("a rank is for DoRA adapters; the pairs of others keep theirs")
        return adapter, model
    if rank is not None and rank < 1:
        raise UsageError(f"the rank for DoRA is {rank}, expected at least 1")
    if strict:
        dora = f"DoRA in {len(adapter.magnitudes)} modules, whose update has no low rank: merge the adapter instead"
        refuse_losses(adapter, (*adapter.losses, dora))
    checkpoint = _with_weights(adapter, model, named_by)
    with exact_float32(), torch.inference_mode():
        return NearestPairs(adapter, checkpoint, rank), checkpoint


def _with_weights(adapter: LoraAdapter, model: ModelDescription, named_by: str) -> Checkpoint:
    """The model with its weights, where it was named by its config.json or its directory."""
    if isinstance(model, ConfiguredModel):  # opening it again says what is missing or damaged
        model = open_checkpoint(model.described_by.parent if model.path == model.described_by else model.path)
    if not isinstance(model, Checkpoint):
        raise UnsupportedError(
            f"uses DoRA, whose update depends on the weights that it was trained on; name that model in safetensors "
            f"with {named_by}",
            file=adapter.path,
        )
    return model

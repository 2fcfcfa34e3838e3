"""The shapes that a model's configuration gives to its matrices, in GGUF's names: what is cut off, or of another
model, is found before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping

from converters.errors import FormatError
from converters.models import Model

_LAYER = re.compile(r"blk\.\d+\.(.+)\.(?:weight|bias)")
_TABLES = ("token_embd.weight", "output.weight")
Sides = tuple[int | None, ...]
"""A shape; None for a side that the configuration doesn't tell."""


def check_shapes(model: Model, vocabulary: int | None = None) -> None:
    """That every matrix of a model in GGUF's layout has the sides that its configuration says, as far as it does, and
    that what each layer has is alike in all of them.

    Args:
        vocabulary: the rows of its tables of tokens, where that is known.

    Raises:
        FormatError: one has not.
    """
    sides, first = _sides(model, vocabulary), dict[str, str]()
    for name, info in model.infos.items():
        match = _LAYER.fullmatch(name)
        module = match[1] if match else name.removesuffix(".weight")
        wanted = sides.get(module, ()) if name.endswith(".weight") else ()
        if wanted and not _agree(info.shape, wanted):
            raise _wrong(model, name, f"{model.described_by.name} makes it {_told(wanted)}")
        one = first.setdefault(name[name.index(module) :], name)
        if info.shape != model.infos[one].shape:
            raise _wrong(model, name, f"{model.stored_name(one)} is {_told(model.infos[one].shape)}")
    both = [name for name in _TABLES if name in model.infos]
    if len({model.infos[name].shape for name in both}) > 1:
        embedding, head = both
        found = f"the embedding {model.stored_name(embedding)} is {_told(model.infos[embedding].shape)}"
        raise _wrong(model, head, found)


def _sides(model: Model, vocabulary: int | None) -> Mapping[str, Sides]:
    """By the part of the name that says what a tensor does."""
    sizes, heads, count = model.sizes(), model.heads(), model.experts or None
    width, inner, expert = sizes.width, sizes.feed_forward, sizes.expert
    query, key = (each * sizes.key if sizes.key else None for each in (heads.query, heads.key_value))
    value, mixed = (each * sizes.value if sizes.value else None for each in (heads.key_value, heads.query))
    gated = any(name.endswith(".ffn_gate.weight") for name in model.infos)
    norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "output_norm")
    return {
        "token_embd": (vocabulary, width),
        "output": (vocabulary, width),
        "attn_q": (query, width),
        "attn_k": (key, width),
        "attn_v": (value, width),
        "attn_qkv": (query + key + value if query and key and value else None, width),
        "attn_output": (width, mixed),
        "ffn_gate": (inner, width),
        "ffn_up": (None if inner is None else inner if gated else 2 * inner, width),  # Phi has the gate in it
        "ffn_down": (width, inner),
        "ffn_gate_inp": (count, width),
        "ffn_gate_exps": (count, expert, width),
        "ffn_up_exps": (count, expert, width),
        "ffn_down_exps": (count, width, expert),
        **dict.fromkeys(norms, (width,)),
    }


def _agree(shape: tuple[int, ...], wanted: Sides) -> bool:
    return len(shape) == len(wanted) and all(
        side is None or size == side for size, side in zip(shape, wanted, strict=True)
    )


def _told(sides: Sides) -> str:
    """`96 x 64`, or where a side is not known what is: `64 wide`."""
    if None not in sides:
        return " x ".join(map(str, sides))
    names = ("wide", "high", "deep")
    known = [f"{side} {name}" for side, name in zip(reversed(sides), names, strict=False) if side is not None]
    return " and ".join(known)


def _wrong(model: Model, name: str, why: str) -> FormatError:
    told = f"is {_told(model.infos[name].shape)}, and {why}: it is cut off, or of another model"
    return FormatError(told, file=model.file_of(name), tensor=model.stored_name(name))

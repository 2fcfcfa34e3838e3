"""Whether an adapter is for a model, as far as the model's configuration or header tells.

Weights tell more, but a conversion needs none: then nothing else stands between a pair for another model, or the wrong
config.json, and a file that looks right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.trained_on import check_trained_on
from converters.architectures import Architecture, HeadCounts, find_architecture
from converters.errors import InputError, MismatchError, UnsupportedError
from converters.models import Model, ModelDescription, ModelSizes

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_EMBEDDING, _HEAD = "token_embd", "output"
_FUSED_FEED_FORWARD = ".gate_up_proj"  # transformers' name of what GGUF keeps under up's

_FUSED = {
    "attn_q": ("attn_qkv", "queries, keys and values", "--fuse-qkv"),
    "attn_k": ("attn_qkv", "queries, keys and values", "--fuse-qkv"),
    "attn_v": ("attn_qkv", "queries, keys and values", "--fuse-qkv"),
    "ffn_gate_exps": ("ffn_gate_up_exps", "gate and up", "--fuse-gate-up-exps"),
    "ffn_up_exps": ("ffn_gate_up_exps", "gate and up", "--fuse-gate-up-exps"),
}
"""What options of llama.cpp's convert_hf_to_gguf.py put into one weight: its name, what it holds, the option."""


@dataclass(frozen=True)
class _Side:
    """How many rows or columns a weight has, and why."""

    count: int
    told: str


_Fault = tuple[int, str]
"""Which half of a pair is wrong, and how; with a gap for the file that says so."""

_Sides = Mapping[str, tuple[_Side | None, _Side | None]]
"""Rows and columns of weights (out, in) by their names in GGUF, without the layer."""


def check_sizes(adapter: LoraAdapter, model: ModelDescription) -> None:
    """That every pair is for a weight that the model can have, by its number of layers, its width and its heads, and
    that no layer is without a pair which should have one (`check_trained_on`).

    What the model doesn't say is not held against a pair; vocabularies are resized and no measure.

    Raises:
        MismatchError: the adapter, or what describes the model, is for another one.
        FormatError: the model names no architecture.
    """
    table, sizes = find_architecture(model.architecture), model.sizes()
    sides = _sides(model, table, sizes) if table is not None else {}
    for pair in adapter.pairs.values():
        names = _names_in_gguf(adapter, pair, table)
        for name in names:
            fault = _layer_fault(name, sizes) or _side_fault(name, pair, sides, whole=len(names) == 1)
            if fault is not None:
                half, told = fault
                raise MismatchError(
                    f"is a pair for {told.format(model.described_by)}. The adapter is for another model, or that file "
                    f"is: name with --base the model that it was trained on",
                    file=adapter.tensor_file,
                    tensor=pair.tensors[half],
                )
    check_trained_on(adapter, model)


def check_ties(adapter: LoraAdapter, model: ModelDescription, *, to_gguf: bool) -> None:
    """That no pair is refused for the sake of tied embeddings which nobody has spoken of.

    Args:
        to_gguf: whether the adapter will be written as GGUF.

    Raises:
        UnsupportedError: the model is only assumed to have them.
    """
    table = find_architecture(model.architecture)
    if model.ties_assumed is None or not model.tied_embeddings:
        return
    if table is not None and not table.to_gguf("lm_head"):  # always tied
        return
    for pair in adapter.pairs.values():
        tables = {_EMBEDDING, _HEAD} & set(_names_in_gguf(adapter, pair, table))
        if tables and (to_gguf or (pair.embedding and adapter.format == "mlx")):
            raise UnsupportedError(
                f"adapts an embedding or output matrix, and it is assumed that the model uses one for both (tied), "
                f"where such a pair can't be kept: {model.ties_assumed}. Otherwise merge the adapter into the model",
                file=adapter.tensor_file,
                tensor=pair.tensors[0],
            )


def check_fused(adapter: LoraAdapter, model: Model) -> None:
    """That no pair is for a part of what the model has in one matrix; both in GGUF's layout.

    Raises:
        MismatchError: one is.
    """
    if adapter.layout != "gguf":
        return
    for pair in adapter.pairs.values():
        block, _, kind = pair.weight.rpartition(".")
        whole, parts, option = _FUSED.get(kind, ("", "", ""))
        fused = f"{block}.{whole}.weight"
        if fused in model.infos and f"{pair.weight}.weight" not in model.infos:
            raise MismatchError(
                f"is a pair for {pair.weight}.weight, and {model.path} has {fused}, {parts} in one, to which it can't "
                f"be added. Name the model converted without {option}, or merge the adapter into the model",
                file=adapter.tensor_file,
                tensor=pair.tensors[0],
            )


def _names_in_gguf(adapter: LoraAdapter, pair: LoraPair, table: Architecture | None) -> Sequence[str]:
    """What a pair's weight is called in GGUF, without `.weight`: several names where it is split; none if unknown."""
    if adapter.layout == "gguf":
        return (pair.weight,)
    return [place.name for place in table.to_gguf(pair.weight)] if table is not None else ()


def _layer_fault(name: str, sizes: ModelSizes) -> _Fault | None:
    found = _LAYER.fullmatch(name)
    if found is None or sizes.layers is None or int(found[1]) < sizes.layers:
        return None
    return 0, f"layer {found[1]} (the first is 0), and {{}} says that there are {sizes.layers}"


def _side_fault(name: str, pair: LoraPair, sides: _Sides, *, whole: bool) -> _Fault | None:
    """Whether rows or columns are others; not the rows where the pair goes to several weights, as its parts."""
    layer = _LAYER.fullmatch(name)
    rows, columns = sides.get(layer[2] if layer else name, (None, None))
    for axis, side in ((1, columns), (0, rows if whole else None)):
        if side is not None and pair.shape[axis] != side.count:
            half = axis if pair.embedding else 1 - axis  # B has a weight's rows, of an embedding its columns
            told = f"{side.count} {('rows', 'columns')[axis]}: {side.told}"
            return half, f"a weight of {list(pair.shape)}, and {{}} says {told}"
    return None


def _sides(model: ModelDescription, table: Architecture, sizes: ModelSizes) -> _Sides:
    """What the model says of its matrices, by their kind."""
    heads = _heads(model)
    width, inner = _side(sizes.width, "the model's width"), _side(sizes.feed_forward, "the feed-forward network's size")
    expert = _side(sizes.expert, "an expert's size")
    queries, keys, values, mixed, fused = _attention(heads, sizes)
    return {
        _EMBEDDING: (None, width),
        _HEAD: (None, width),
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (values, width),
        "attn_qkv": (fused, width),
        "attn_q_a": (None, width),
        "attn_kv_a_mqa": (None, width),
        "attn_output": (width, mixed),
        "ffn_gate": (inner, width),
        "ffn_up": (_twice(inner) if _has_fused_feed_forward(table) else inner, width),
        "ffn_down": (width, inner),
        "ffn_gate_inp": (_side(model.experts or None, "the number of experts"), width),
        "ffn_gate_exps": (expert, width),
        "ffn_up_exps": (expert, width),
        "ffn_down_exps": (width, expert),
        "ffn_gate_inp_shexp": (None, width),
        "ffn_gate_shexp": (None, width),
        "ffn_up_shexp": (None, width),
        "ffn_down_shexp": (width, None),
    }


def _attention(heads: HeadCounts | None, sizes: ModelSizes) -> tuple[_Side | None, ...]:
    """Rows for queries, keys and values, columns for what they are mixed to, and rows for the first three in one."""
    if heads is None or sizes.key is None or sizes.value is None:
        return (None,) * 5
    query, key, value = heads.query * sizes.key, heads.key_value * sizes.key, heads.key_value * sizes.value
    few = f"{heads.key_value} key-value heads of"
    return (
        _Side(query, f"{heads.query} heads of {sizes.key}"),
        _Side(key, f"{few} {sizes.key}"),
        _Side(value, f"{few} {sizes.value}"),
        _Side(heads.query * sizes.value, f"{heads.query} heads of {sizes.value}"),
        _Side(query + key + value, f"{heads.query} heads of {sizes.key}, and keys and values of {heads.key_value}"),
    )


def _heads(model: ModelDescription) -> HeadCounts | None:
    try:
        return model.heads()
    except InputError:
        return None


def _has_fused_feed_forward(table: Architecture) -> bool:
    found = table.to_hugging_face("blk.0.ffn_up")
    return found is not None and found.name.endswith(_FUSED_FEED_FORWARD)


def _side(count: int | None, told: str) -> _Side | None:
    return None if count is None else _Side(count, told)


def _twice(side: _Side | None) -> _Side | None:
    return None if side is None else _Side(2 * side.count, f"twice {side.told}")

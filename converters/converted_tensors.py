"""A checkpoint's tensors as a GGUF model has them: which, in what types, copied or computed, and that none is missing.

Types are those of llama.cpp's converter: vectors, norms and routers in F32, matrices as asked for. What is neither
known nor known to be of no use ends the run: a model that lacks a part loads and talks nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from converters.architectures import Architecture, Rule
from converters.bridge import Bridge
from converters.changed_model import ChangedModel
from converters.checkpoint import Checkpoint
from converters.converted_model import ConvertedModel
from converters.errors import FormatError, UnsupportedError
from converters.expected_biases import IN_LLAMA_CPP, expected_biases
from converters.expected_shapes import check_shapes
from converters.ggml import QType, fits
from converters.gguf_layout import ModelTensor, Rounded, Stored
from converters.left_out_heads import check_head
from converters.model_config import ties_of, vocabulary_of
from converters.names import canonical, first_few
from converters.quantization import FileType
from converters.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

_BUFFERS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
_ALWAYS_FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
_FLOATS = {"F64": QType.F32, "F32": QType.F32, "F16": QType.F16, "BF16": QType.BF16}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"
_DENSE, _MIXTURE = {"ffn_gate", "ffn_up", "ffn_down"}, ("_exps", "ffn_gate_inp", "_shexp")
_OTHER_HALF = (
    "llama.cpp keeps what is not the language model in a file of its own, which its convert_hf_to_gguf.py writes with "
    "--mmproj"
)


@dataclass(frozen=True)
class ConvertedTensors:
    """The tensors of a GGUF model that is made from a checkpoint.

    Attributes:
        tensors: in the order of the file.
        sources: by name, the types that they are stored in before.
        losses: what of the checkpoint is left out, a sentence each.
        notes: what is left out since it holds nothing.
    """

    tensors: tuple[ModelTensor, ...]
    sources: Mapping[str, str]
    losses: tuple[str, ...]
    notes: tuple[str, ...]


def converted_tensors(model: ChangedModel, table: Architecture, wanted: FileType | None) -> ConvertedTensors:
    """The tensors of a checkpoint's language model in GGUF's layout; headers are read, no data.

    Args:
        wanted: a plain type for all matrices; None: each keeps its own.

    Raises:
        FormatError: a tensor is unknown, stands twice, is missing or has an impossible shape.
        UnsupportedError: one is not stored as plain floats, or a bias that llama.cpp doesn't know.
    """
    places, left = _sorted_out(model, table)
    seen = ConvertedModel(model, Bridge.of(table, model))
    assert isinstance(model.stored, Checkpoint), "only checkpoints are converted"
    # A merge says that there are biases where it adds one of them; the others are zeros.
    check_complete(seen.infos, table, model, expected_biases(seen, model.stored.config))
    check_shapes(seen, vocabulary_of(model.config))
    _check_biases(seen)
    for name in seen.infos:
        seen.check_type(name)
    tensors = tuple(_tensor(model, seen, name, places[name], wanted) for name in sorted(seen.infos, key=_place))
    sources = {name: info.dtype for name, info in seen.infos.items()}
    return ConvertedTensors(tensors, sources, tuple(left.losses()), tuple(left.notes()))


def type_of(name: str, shape: Sequence[int], stored: str, wanted: FileType | None) -> QType:
    """What a tensor is stored in, by llama.cpp's rules.

    Args:
        name: GGUF's.
        stored: the type that it has in the checkpoint.
        wanted: see `converted_tensors`.
    """
    if len(shape) < 2 or name.endswith(_ALWAYS_FLOAT32) or not name.endswith(".weight"):
        return QType.F32
    if wanted is None:
        return _FLOATS[stored]
    return QType(wanted.qtype) if fits(tuple(shape), wanted.qtype) else QType.F16


def truncated(tensors: Iterable[ModelTensor], rows: int) -> list[ModelTensor]:
    """The tensors with no more than these first rows in the tables of tokens."""
    return [_truncated(tensor, rows) if tensor.name in (_EMBEDDING, _HEAD) else tensor for tensor in tensors]


def _truncated(tensor: ModelTensor, rows: int) -> ModelTensor:
    data = tensor.data
    if isinstance(data, Stored):
        ((path, offset, size),) = data.pieces
        data = Stored(((path, offset, size // tensor.shape[0] * rows),))
    return ModelTensor(tensor.name, (rows, *tensor.shape[1:]), tensor.qtype, data, tensor.origin)


@dataclass(frozen=True)
class _Part:
    """One stored tensor of those that a GGUF tensor is made of."""

    own: str
    rule: Rule
    expert: int | None


@dataclass
class _LeftOut:
    """Tensors of a checkpoint that go nowhere: buffers, another half of the model, heads that llama.cpp has not.

    Attributes:
        head: what is to be said of those.
    """

    buffers: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    head: str | None = None

    def losses(self) -> Iterator[str]:
        if self.others:
            names = first_few(self.others, 3)
            yield f"left out, {len(self.others)} tensors beside the language model ({names}): {_OTHER_HALF}"

    def notes(self) -> Iterator[str]:
        if self.buffers:
            yield f"left out, since llama.cpp computes them itself: {first_few(self.buffers, 3)}"
        if self.head is not None:
            yield self.head


def _sorted_out(model: ChangedModel, table: Architecture) -> tuple[dict[str, list[_Part]], _LeftOut]:
    """What every GGUF tensor is made of, and what goes nowhere.

    Raises:
        FormatError: a tensor that nobody knows. See also `check_head`.
    """
    places: dict[str, list[_Part]] = {}
    left, unknown = _LeftOut(), list[str]()
    for own in model.infos:
        found = list(table.tensors_in_gguf(canonical(own)))
        for name, to in found:
            places.setdefault(name, []).append(_Part(own, to.rule, to.expert))
        if found:
            continue
        if own.endswith(_BUFFERS):
            left.buffers.append(own)
        elif table.composites and table.no_pairs_because(canonical(own)):
            left.others.append(own)
        elif canonical(own) == "lm_head.weight" and _target(table, "output") is None:
            left.heads.append(own)
        else:
            unknown.append(own)
    if unknown:
        raise _unknown(unknown, model, table)
    if _target(table, "output") is None:
        left.head = check_head(model, next(iter(left.heads), None), table.name)
    return places, left


def _unknown(names: Sequence[str], model: ChangedModel, table: Architecture) -> FormatError:
    return FormatError(
        f"llama.cpp's {table.name} has no place for {first_few(names)}, and a model without would be another one; is "
        f"this a {model.architecture} as it was published, with its weights neither quantized nor wrapped?",
        file=model.file_of(names[0]),
        tensor=names[0],
    )


def check_complete(
    infos: Mapping[str, TensorInfo], table: Architecture, model: ChangedModel, biases: Collection[str] = ()
) -> None:
    """That a model in GGUF's names has all layers, and each of them what it needs.

    Args:
        biases: modules of each layer that must have one.

    Raises:
        FormatError: something is missing, or there are more layers than config.json says.
    """
    layers = model.sizes().layers
    if layers is None:
        raise FormatError("doesn't say how many layers the model has (num_hidden_layers)", file=model.described_by)
    if layers > len(infos):
        told = f"the model is incomplete: {len(infos)} tensors can't be {layers} layers (num_hidden_layers)"
        raise FormatError(told, file=model.described_by)
    found: dict[int, set[str]] = {layer: set() for layer in range(layers)}
    for name in infos:
        match = _LAYER.fullmatch(name)
        if match is not None and int(match[1]) not in found:
            told = f"belongs to layer {match[1]}, and {model.described_by.name} says that there are {layers}"
            raise FormatError(told, file=model.path, tensor=name)
        if match is not None:
            found[int(match[1])].add(match[2])
    inside, outside = _required(table, infos)
    inside |= {f"{module}.bias" for module in biases}.union(*found.values())
    missing = [f"blk.{layer}.{one}" for layer, own in found.items() for one in sorted(inside - own)]
    missing += sorted(outside - infos.keys())
    if _HEAD not in infos and _target(table, "output") is not None and ties_of(model.config) is False:
        missing.append(_HEAD)
    if missing:
        told = f"the model is incomplete: nothing becomes {first_few(missing)}; {_cure(missing, model)}"
        raise FormatError(told, file=model.path, tensor=_source_of(missing[0], table))


def _check_biases(seen: ConvertedModel) -> None:
    """That llama.cpp applies every bias."""
    known = IN_LLAMA_CPP.get(seen.architecture, frozenset())
    for name in seen.infos:
        match = _LAYER.fullmatch(name)
        if match is not None and match[2].endswith(".bias") and match[2].removesuffix(".bias") not in known:
            told = f"is a bias that llama.cpp's {seen.architecture} has no place for: it would not load the model"
            raise UnsupportedError(told, file=seen.file_of(name), tensor=seen.stored_name(name))


def _cure(missing: Sequence[str], model: ChangedModel) -> str:
    if missing != [_HEAD]:
        return "fetch it again"
    return (
        f"fetch it again, or, if its output matrix is the embedding, set tie_word_embeddings to true in "
        f"{model.described_by.name}"
    )


def _required(table: Architecture, infos: Iterable[str]) -> tuple[set[str], set[str]]:
    """The weights that every layer must have, and those outside of layers."""
    targets = {rule.target for rule in table.rules}
    mixture = any(map(_is_of_mixture, infos))
    both = any("_exps" in target for target in targets) and "blk.{i}.ffn_down" in targets
    inside = {target.removeprefix("blk.{i}.") for target in targets if target.startswith("blk.{i}.")}
    if both:
        inside = {one for one in inside if not (_is_of_mixture(one) if not mixture else one in _DENSE)}
    outside = {target for target in targets if not target.startswith("blk.")} - {"output"}
    return {f"{one}.weight" for one in inside}, {f"{one}.weight" for one in outside}


def _is_of_mixture(name: str) -> bool:
    return any(part in name for part in _MIXTURE)


def _target(table: Architecture, target: str) -> Rule | None:
    return next((rule for rule in table.rules if rule.target == target), None)


def _source_of(name: str, table: Architecture) -> str:
    """A checkpoint's name of a GGUF tensor, for messages."""
    module, dot, ending = name.rpartition(".")
    found = table.to_hugging_face(module)
    return name if found is None else found.name + dot + ending


def _place(name: str) -> tuple[int, int]:
    """Input, layers, output."""
    match = _LAYER.fullmatch(name)
    return (1, int(match[1])) if match else (0, 0) if name == _EMBEDDING else (2, 0)


def _tensor(
    model: ChangedModel, seen: ConvertedModel, name: str, parts: Sequence[_Part], wanted: FileType | None
) -> ModelTensor:
    info = seen.infos[name]
    qtype, origin = type_of(name, info.shape, info.dtype, wanted), seen.file_of(name)
    touched = any(part.rule.transforms or part.own in model.edits.changes for part in parts)
    if not touched and all(model.infos[part.own].dtype == qtype.name for part in parts):
        assert isinstance(model.stored, Checkpoint), "only checkpoints are converted"
        ordered = sorted(parts, key=lambda part: part.expert or 0)
        pieces = tuple(_piece(model.stored, part.own) for part in ordered)
        return ModelTensor(name, info.shape, qtype, Stored(pieces), origin)
    rows, ask = partial(_rows, seen, name), partial(seen.prefetch, name)
    return ModelTensor(name, info.shape, qtype, Rounded(rows, prefetch=ask), origin)


def _piece(checkpoint: Checkpoint, own: str) -> tuple[Path, int, int]:
    path = checkpoint.file_of(own)
    file = next(file for file in checkpoint.files if file.path == path)
    return path, file.header.offsets[own], file.infos[own].nbytes


def _rows(seen: ConvertedModel, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows in the type that they are stored in: whoever rounds them widens a few at a time."""
    values = seen.rows(name, start, stop)
    return values.float() if values.itemsize > 4 else values

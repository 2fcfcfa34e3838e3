"""What a GGUF model that is to be written holds, and how a stored GGUF model with its edits becomes that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gguf import GGML_QUANT_VERSION

from converters.changed_model import ChangedModel
from converters.changes import Change
from converters.errors import UnsupportedError
from converters.ggml import QType, block_of, fits
from converters.gguf_file import uint32
from converters.gguf_layout import ModelTensor
from converters.gguf_metadata import GgufHeader, GgufTensor
from converters.gguf_model import GgufModel
from converters.gguf_rewrite import rewritten_parts
from converters.names import first_few
from converters.quantization import FileType, is_quantized_again

_PLAIN = {"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"}
_FLOATS = {"F32": QType.F32, "F16": QType.F16, "BF16": QType.BF16}
_VOCABULARY = "tokenizer."


@dataclass(frozen=True)
class GgufContents:
    """All of a GGUF model.

    Attributes:
        entries: for each key its whole entry, in order.
        tensors: in order.
        sources: by name, the types that the tensors are stored in before; a computed one is missing.
        losses: what of the source is left out, a sentence each.
        notes: what else a careful reader should know.
        reads: files beside the model's own that it is made from.
    """

    entries: Mapping[str, bytes]
    tensors: tuple[ModelTensor, ...]
    sources: Mapping[str, str]
    alignment: int = 32
    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()

    def header(self) -> GgufHeader:
        """The header that it will have, as far as sizes follow from it."""
        tensors = {one.name: GgufTensor(one.name, one.shape, one.qtype, type_name(one.qtype), 0, one.nbytes)
                   for one in self.tensors}  # fmt: skip
        size = sum(len(entry) for entry in self.entries.values()) + 128 * len(tensors)
        return GgufHeader(Path(), 3, "little", {}, tensors, self.alignment, size, size, size)


def stored_contents(model: ChangedModel, wanted: FileType | None, *, floats: bool = False) -> GgufContents:
    """A GGUF model as it is, but for its edits and the types of its matrices.

    Args:
        wanted: a plain type for all matrices; None: each keeps its own.
        floats: changed tensors that are quantized become floats: llama.cpp's quantizer comes next.

    Raises: see `rewritten_parts`.
    """
    stored = model.stored
    assert isinstance(stored, GgufModel), "no other model is GGUF"
    tensors = {tensor.name: tensor for header in stored.headers for tensor in header.tensors.values()}
    changes, types = list[Change](), dict[str, int]()
    for name, info in model.infos.items():  # what is followed comes before what follows it
        change, tensor = model.edits.changes.get(name), tensors.get(name)
        types[name] = _type(tensor, change, wanted, floats=floats) if tensor else _type_of_new(name, model, types)
        if change is not None:
            changes.append(replace(change, shape=info.shape, qtype=types[name]))
        elif tensor is not None and types[name] != tensor.qtype:
            changes.append(Change(name, partial(stored.rows, name), qtype=types[name]))
    numbers = () if wanted is None else (("general.file_type", uint32(wanted.number)),
                                         ("general.quantization_version", uint32(GGML_QUANT_VERSION)))  # fmt: skip
    parts = rewritten_parts(stored, changes, added=numbers)
    sources = {name: tensor.dtype for name, tensor in tensors.items()}
    return GgufContents(dict(parts.entries), tuple(parts.tensors), sources, parts.alignment)


def check_requantizing(model: ChangedModel, wanted: FileType) -> None:
    """That no quantized tensor becomes another type, which adds one rounding to another.

    Raises:
        UnsupportedError: one would.
    """
    assert isinstance(model.stored, GgufModel), "no other model is quantized"
    found = [tensor for header in model.stored.headers for tensor in header.tensors.values()
             if tensor.dtype not in _PLAIN and is_quantized_again(tensor)
             and not (wanted.plain and tensor.qtype == wanted.qtype)]  # fmt: skip
    if found:
        kinds = sorted({tensor.dtype for tensor in found})
        raise UnsupportedError(
            f"is quantized already ({len(found)} tensors in {', '.join(kinds)}), and {wanted.name} would round what is "
            f"rounded; start from a float file of the model, or go on with --allow-requantize",
            file=model.path,
            tensor=found[0].name,
        )


def with_vocabulary(entries: Mapping[str, bytes], vocabulary: Mapping[str, bytes]) -> dict[str, bytes]:
    """Entries with another vocabulary in the place of their own."""
    result: dict[str, bytes] = {}
    for key, entry in entries.items():
        if key.startswith(_VOCABULARY):
            result |= {one: data for one, data in vocabulary.items() if one not in result}
        else:
            result[key] = entry
    return {**result, **{key: data for key, data in vocabulary.items() if key not in result}}


def type_name(qtype: int) -> str:
    """A type's name, or its number where nobody here knows it."""
    kind = block_of(qtype)
    return kind.name if kind else f"type {qtype}"


def flat_note(names: list[str]) -> str:
    """What is to be said of tensors that were quantized without the importance matrix that their types are made for."""
    return (
        f"rounded as if every column counted the same, since there is no importance matrix, for which the type is "
        f"made: {first_few(names)}"
    )


def _type(tensor: GgufTensor, change: Change | None, wanted: FileType | None, *, floats: bool) -> int:
    if wanted is not None and is_quantized_again(tensor):
        return wanted.qtype if fits(tensor.shape, wanted.qtype) else QType.F16
    if change is None:
        return tensor.qtype
    if change.qtype is not None:
        return change.qtype
    return _FLOATS.get(tensor.dtype, QType.F16) if floats else tensor.qtype


def _type_of_new(name: str, model: ChangedModel, types: Mapping[str, int]) -> int:
    """That of the tensor which it follows, as far as its rows allow."""
    change, shape = model.edits.changes[name], model.infos[name].shape
    like = types[str(change.after)] if change.qtype is None else change.qtype
    if len(shape) < 2:
        return QType.F32
    return like if fits(shape, like) else QType.F16

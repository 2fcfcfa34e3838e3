"""Whether llama.cpp can run a GGUF model, as far as headers tell.

Read in llama-model-loader.cpp and llama-model.cpp of llama-cpp-python 0.3.36: a key of another type than expected, a
missing hyperparameter, an unknown tensor type or a tensor without elements ends loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from converters import libggml
from converters.errors import FormatError, InputError, UnsupportedError
from converters.gguf_metadata import GgufHeader, GgufTensor
from converters.gguf_types import Kind

_KINDS = {
    "general.architecture": Kind.STRING,
    "general.name": Kind.STRING,
    "general.file_type": Kind.UINT32,
    "tokenizer.ggml.model": Kind.STRING,
    "tokenizer.ggml.pre": Kind.STRING,
    "tokenizer.ggml.tokens": Kind.ARRAY,
    "tokenizer.chat_template": Kind.STRING,
    "split.count": Kind.UINT16,
    "split.no": Kind.UINT16,
    "split.tensors.count": Kind.INT32,
}
_NEEDED = ("context_length", "embedding_length", "block_count")


def runnable_findings(shards: Sequence[GgufHeader]) -> Iterator[InputError]:
    """What llama.cpp would refuse in a model beyond its byte order and kind; found while it is asked for.

    Args:
        shards: the headers of one model, in order.
    """
    for shard in shards:
        for key, kind in _KINDS.items():
            yield from _of_kind(shard, key, kind)
    first = shards[0]
    name = _architecture(first)
    if name is not None:
        for what in _NEEDED:
            yield from _of_kind(first, f"{name}.{what}", Kind.UINT32, needed=True)
    for shard in shards:
        for tensor in shard.tensors.values():
            yield from _tensor(shard, tensor)


def _architecture(header: GgufHeader) -> str | None:
    try:
        return header.text("general.architecture") or None
    except FormatError:  # which other findings tell
        return None


def _of_kind(header: GgufHeader, key: str, kind: Kind, *, needed: bool = False) -> Iterator[InputError]:
    found = header.kind_of(key)
    if found is None and needed:
        yield FormatError(f"has no {key[:80]!r}, which llama.cpp needs; convert the model again", file=header.path)
    elif found not in (None, kind):
        told = f"{key[:80]!r} is stored as {found.name if found else found}, expected {kind.name}"
        yield FormatError(f"{told}: llama.cpp refuses the file", file=header.path)


def _tensor(header: GgufHeader, tensor: GgufTensor) -> Iterator[InputError]:
    if not tensor.elements:
        found = f"has the shape {list(tensor.shape)} and no elements, with which llama.cpp loads no model"
        yield FormatError(found, file=header.path, tensor=tensor.name)
    if tensor.known:
        return
    library = libggml.library()
    if library is None or library.type_of(tensor.qtype) is None:
        yield UnsupportedError(
            f"has the tensor type {tensor.qtype}, which this version of ggml does not know; update llama-cpp-python, "
            f"or take a file in another type",
            file=header.path,
            tensor=tensor.name,
        )

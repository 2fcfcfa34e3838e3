"""Whether an importance matrix is of the model that is to be quantized with it: known before any work is done.

llama.cpp's quantizer finds a tensor of another size when it comes to it, and one that is missing only where a type
can't do without; a matrix of another model of the same width it takes without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

from converters.errors import MismatchError
from converters.ggml import QType
from converters.gguf_file import entry_bytes, text, uint32
from converters.gguf_layout import ModelTensor
from converters.gguf_metadata import GgufHeader, GgufTensor
from converters.imatrix import SUMS
from converters.names import first_few
from converters.quantization import FileType, is_quantized_again

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_NEEDING = {QType.IQ1_S, QType.IQ1_M, QType.IQ2_XXS, QType.IQ2_XS, QType.IQ2_S, QType.IQ3_XXS}
# Of the layers' matrices those that no mixture stores in a better type (llama-quant.cpp, `llama_tensor_get_type_impl`).
_NEVER_BETTER = re.compile(r"blk\.\d+\.(ffn_gate|ffn_up|attn_q)(_exps|_shexp)?\.weight")
_IGNORING = {"MXFP4_MOE"}
_TERNARY = {"TQ1_0", "TQ2_0"}
_LONGEST = 127  # bytes of a text that llama-quantize writes
_KEYS = "quantize.imatrix."


def check_importance(header: GgufHeader, tensors: Iterable[ModelTensor], wanted: FileType) -> tuple[str, ...]:
    """Compares an importance matrix with the tensors that are to be quantized.

    Args:
        header: the importance matrix's, see `converters.imatrix.check_imatrix`.
        tensors: of the model.

    Returns:
        What a user should know of it, a sentence each.

    Raises:
        MismatchError: it has none of the tensors, one of them has another number of columns or of matrices, or one is
            missing that can't be stored in the type without.
    """
    if wanted.plain:
        return ()
    matrices = {tensor.name: tensor.shape for tensor in tensors if _is_quantized(tensor)}
    sums = {name.removesuffix(SUMS): one for name, one in header.tensors.items() if name.endswith(SUMS)}
    counted = {name for name in matrices if name not in (_EMBEDDING, _OUTPUT)}
    if counted and not counted & sums.keys():
        told = f"has none of the model's {len(counted)} matrices ({first_few(sorted(counted), 2)}), but "
        raise MismatchError(f"{told}{first_few(sorted(sums), 2)}: it is of another model", file=header.path)
    for name in sorted(matrices.keys() & sums.keys() - {_EMBEDDING}):  # whose sums count tokens
        _check_size(header.path, name, sums[name].elements, matrices[name])
    missing = sorted(counted - sums.keys())
    needing = [name for name in missing if _needs(name, matrices[name], wanted)]
    if needing:
        raise MismatchError(
            f"lacks {len(needing)} of the tensors that become {wanted.name}, which is made for an importance matrix; "
            f"take one of this model",
            file=header.path,
            tensor=needing[0],
        )
    return tuple(_notes(missing, len(counted), wanted))


def importance_entries(header: GgufHeader) -> Mapping[str, bytes]:
    """What llama-quantize writes of an importance matrix into the model: its name, without the directory, and what it
    was made from."""
    count = sum(name.endswith(SUMS) for name in header.tensors)
    chunks, data = header.value("imatrix.chunk_count"), header.value("imatrix.datasets")
    values = {"file": text(_short(header.path.name)), "entries_count": uint32(count)}
    if isinstance(data, Sequence) and data and isinstance(data[0], str):
        values["dataset"] = text(_short(data[0]))
    if type(chunks) is int and 0 < chunks < 1 << 32:
        values["chunks_count"] = uint32(chunks)
    return {_KEYS + key: entry_bytes(_KEYS + key, value) for key, value in values.items()}


def _check_size(file: Path, name: str, found: int, shape: tuple[int, ...]) -> None:
    count = prod(shape[:-2])
    if found == count * shape[-1]:
        return
    expected = f"{shape[-1]} columns" if count == 1 else f"{count} matrices of {shape[-1]} columns"
    told = f"has {found} columns in the importance matrix, and {expected} in the model; take one of this model"
    raise MismatchError(told, file=file, tensor=name)


def _needs(name: str, shape: tuple[int, ...], wanted: FileType) -> bool:
    needing = wanted.qtype in _NEEDING or wanted.name == "Q2_K_S"
    return needing and not shape[-1] % wanted.block and _NEVER_BETTER.fullmatch(name) is not None


def _notes(missing: Sequence[str], count: int, wanted: FileType) -> list[str]:
    if wanted.name in _IGNORING:
        return [f"the importance matrix is not used: {wanted.name} takes none"]
    notes = []
    if wanted.name in _TERNARY:
        notes.append(f"the importance matrix is used for the embedding and the output alone: {wanted.name} takes none")
    if missing:
        told = f"the importance matrix lacks {len(missing)} of {count} matrices, whose columns count the same"
        notes.append(f"{told}: {first_few(missing)}")
    return notes


def _is_quantized(tensor: ModelTensor) -> bool:
    return is_quantized_again(GgufTensor(tensor.name, tensor.shape, tensor.qtype, "", 0, 0))


def _short(value: str) -> str:
    return value.encode("utf-8", "surrogateescape")[:_LONGEST].decode("utf-8", "ignore")

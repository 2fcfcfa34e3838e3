"""GGUF models, whole or split, and GGUF adapters, told from their headers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from converters.adapters.gguf_check import NOT_MULTIPLIED, Finding, adapter_findings, model_findings
from converters.adapters.gguf_pairs import EMBEDDING, Pair, four, sort_halves
from converters.architectures import find_architecture
from converters.errors import FormatError, InputError, UnsupportedError
from converters.fingerprint import fingerprint_gguf
from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader, GgufTensor
from converters.gguf_runnable import runnable_findings
from converters.gguf_shards import read_gguf_headers
from converters.gguf_types import Kind
from converters.inspection.findings import FLOATS, TIED, sentences, tied_note, unreadable
from converters.inspection.record import Container, Inspection, Module
from converters.inspection.values import gguf_values
from converters.tensors import TensorInfo

_HEAD = "output.weight"
_INTEGERS = "no command can use integers as weights"
_UNREADABLE = {
    **dict.fromkeys(("I8", "I16", "I32", "I64"), _INTEGERS),
    **dict.fromkeys(("Q8_1", "Q8_K"), "llama.cpp keeps intermediate results in it, never weights"),
    "F64": "llama.cpp can't multiply with it",
}
_UNKNOWN = "no type of ggml's that is known here; a newer llama.cpp may know it"


def inspect_gguf(path: Path) -> Inspection:
    """A GGUF file of any kind; of a split model all shards, where its first is named.

    Raises:
        FileMissingError: it or a shard can't be read. FormatError: a header is damaged.
    """
    headers, findings = _headers(path)
    return _adapter(path, headers[0]) if _is_adapter(headers[0]) else _model(path, headers, findings)


def _headers(path: Path) -> tuple[tuple[GgufHeader, ...], list[Finding]]:
    """All shards; of a split model that is named wrongly the one file alone, and what is wrong."""
    try:
        return read_gguf_headers(path), []
    except FormatError as error:
        if error.file != str(path):
            raise
        return (read_gguf_header(path),), [error]


def _is_adapter(header: GgufHeader) -> bool:
    """Whether anything says so: an adapter whose type is missing is still looked at as one."""
    declared = header.kind_of("general.type") is Kind.STRING and header.value("general.type") == "adapter"
    named = chain(header.entries, header.tensors)
    return declared or any(name.startswith("adapter.") or name.endswith((".lora_a", ".lora_b")) for name in named)


def _model(path: Path, headers: Sequence[GgufHeader], findings: Sequence[Finding]) -> Inspection:
    tensors = [tensor for header in headers for tensor in header.tensors.values()]
    architecture = _architecture(headers[0])
    refused = [found for found in runnable_findings(headers) if isinstance(found, FormatError)]
    told = [*findings, *model_findings(headers), *refused, *_model_warnings(architecture, tensors)]
    return Inspection(
        path=path,
        kind="model",
        format="gguf",
        architecture=architecture,
        files=tuple((header.path, header.file_size) for header in headers),
        fingerprint=fingerprint_gguf(*headers),
        metadata=gguf_values(headers[0]),
        tensors=tuple(_info(tensor) for tensor in tensors),
        warnings=sentences(told, path),
        notes=tuple(_model_notes(architecture, tensors)),
        container=Container.of(headers[0]),
    )


def _architecture(header: GgufHeader) -> str | None:
    try:
        return (header.text("general.architecture") or "")[:200] or None
    except FormatError:  # which `model_findings` and `adapter_findings` tell
        return None


def _info(tensor: GgufTensor) -> TensorInfo:
    return TensorInfo(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes)


def _model_warnings(architecture: str | None, tensors: Sequence[GgufTensor]) -> list[Finding]:
    warnings: list[Finding] = []
    if architecture == "clip":
        warnings.append("is the image or audio half of a model (clip, a projector), no language model")
    elif architecture is not None and not _is_known(architecture):
        warnings.append(
            f"the architecture {architecture[:80]!r} is unknown to the installed gguf package, and may be to llama.cpp"
        )
    if not tensors:
        warnings.append("holds no tensors: a vocabulary or metadata alone, no model that can run")
    odd = [_info(tensor) for tensor in tensors if not tensor.known or tensor.dtype in NOT_MULTIPLIED]
    return [*warnings, *unreadable(odd, _UNREADABLE, _UNKNOWN)]


def _is_known(architecture: str) -> bool:
    if find_architecture(architecture) is not None:
        return True
    from gguf.constants import MODEL_ARCH_NAMES  # brings numpy along: only where our own tables don't tell

    return architecture in MODEL_ARCH_NAMES.values()


def _model_notes(architecture: str | None, tensors: Sequence[GgufTensor]) -> list[str]:
    names = {tensor.name for tensor in tensors}
    notes = []
    if EMBEDDING in names and _HEAD not in names:
        notes.append(TIED)
    blocks = {tensor.dtype for tensor in tensors if tensor.known} - FLOATS - NOT_MULTIPLIED
    if blocks:
        notes.append(
            f"is quantized ({', '.join(sorted(blocks))}): as a reference it carries rounding noise, which project "
            f"measures and may refuse"
        )
    return notes + table_notes(architecture, "GGUF")


def table_notes(architecture: str | None, layout: str) -> list[str]:
    """What an architecture without a table means for files in this layout."""
    if architecture is None or find_architecture(architecture) is not None:
        return []
    other = "Hugging Face's" if layout == "GGUF" else "GGUF"
    return [
        f"the architecture {architecture} has no table between the layouts: runs in which all files are in "
        f"{layout} layout work, with files in {other} layout it can't be mixed"
    ]


def _adapter(path: Path, header: GgufHeader) -> Inspection:
    findings = list(adapter_findings(header))
    pairs, _, _ = sort_halves(header)
    refused = {finding.tensor for finding in findings if isinstance(finding, InputError)}
    sound = {name: pair for name, pair in pairs.items() if refused.isdisjoint((name, *(half.name for half in pair)))}
    shapes = [error for name, pair in sound.items() for error in _check_dimensions(header, name, pair)]
    refused = {error.tensor for error in shapes}
    scaled = _alpha(header)
    architecture = _architecture(header)
    return Inspection(
        path=path,
        kind="adapter",
        format="gguf",
        architecture=architecture,
        files=((path, header.file_size),),
        fingerprint=fingerprint_gguf(header),
        metadata=gguf_values(header),
        tensors=tuple(_info(tensor) for tensor in header.tensors.values()),
        modules=tuple(_module(name, pair, scaled) for name, pair in sound.items() if pair[0].name not in refused),
        warnings=sentences([*findings, *shapes], path),
        notes=tuple(_adapter_notes(architecture, sound)),
        container=Container.of(header),
    )


def _check_dimensions(header: GgufHeader, name: str, pair: Pair) -> list[UnsupportedError]:
    """That there is one stack at most, as in the formats' own shapes."""
    outer, experts, *_ = four(pair[0].shape)
    if outer != 1 or (experts != 1 and name.endswith(EMBEDDING)):
        found = f"has the shape {list(pair[0].shape)}, expected (r, in) or (experts, r, in)"
        return [UnsupportedError(found, file=header.path, tensor=pair[0].name)]
    return []


def _alpha(header: GgufHeader) -> float | None:
    """adapter.lora.alpha; 0 where pairs are applied unscaled, None where it can't be used."""
    kind = header.kind_of("adapter.lora.alpha")
    if kind not in (None, Kind.FLOAT32):
        return None
    alpha = float(header.value("adapter.lora.alpha") or 0.0)
    return alpha if math.isfinite(alpha) else None


def _module(name: str, pair: Pair, alpha: float | None) -> Module:
    a, b = (four(tensor.shape) for tensor in pair)
    rank, embedding = b[-1], name.endswith(EMBEDDING)
    return Module(
        name=name.removesuffix(".weight"),
        key=name,
        rank=rank,
        scaling=None if alpha is None else alpha / rank if alpha else 1.0,
        shape=(a[-2], b[-2]) if embedding else (b[-2], a[-1]),
        embedding=embedding,
        experts=a[1] if len(pair[0].shape) > 2 else None,
    )


def _adapter_notes(architecture: str | None, pairs: Mapping[str, Pair]) -> list[str]:
    ends = [name for name in (EMBEDDING, _HEAD) if name in pairs]
    return [*([tied_note(ends)] if ends else []), *table_notes(architecture, "GGUF")]

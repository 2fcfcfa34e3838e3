"""Everything that speaks against a file, not the first defect alone; and how it is told in few sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from converters.adapters.gguf_check import Finding
from converters.errors import InputError
from converters.tensors import TensorInfo

_NAMED = 3
"""How many of the tensors that share a defect are named."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types whose stored values are weights as they are, in both layouts' spelling."""


def sentences(findings: Iterable[Finding], path: Path) -> tuple[str, ...]:
    """Findings as text, one sentence for all tensors that share a defect.

    Args:
        path: what is inspected; other files are named.
    """
    tensors: dict[tuple[str | None, str], list[str]] = {}
    for finding in findings:
        where, message = (finding.file, finding.message) if isinstance(finding, InputError) else (None, finding)
        found = tensors.setdefault((where, message), [])
        if isinstance(finding, InputError) and finding.tensor is not None:
            found.append(finding.tensor)
    return tuple(
        ": ".join(part for part in (_place(where, path), listed(names), message) if part)
        for (where, message), names in tensors.items()
    )


def _place(file: str | None, path: Path) -> str:
    return "" if file is None or Path(file) == path else Path(file).name


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def unreadable(tensors: Iterable[TensorInfo], why: Mapping[str, str], otherwise: str) -> list[str]:
    """A sentence for every type whose values can't be read as weights.

    Args:
        why: what to say, by type.
        otherwise: what to say of types that `why` lacks.
    """
    found: dict[str, list[str]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor.name)
    return [f"{listed(names)}: stored as {dtype}; {why.get(dtype, otherwise)}" for dtype, names in found.items()]


def tied_note(names: Sequence[str]) -> str:
    """What to know about an adapter with pairs for embeddings or head."""
    return (
        f"adapts {listed(names)}: on a model that uses its embedding as output head too (tied) llama.cpp can't run it; "
        f"merge it there"
    )


TIED = (
    "uses its embedding as output head too (tied): llama.cpp can't run adapters with a pair for either; merge such an "
    "adapter"
)

"""The result of looking at a file: plain records, and the JSON that they become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from converters.gguf_metadata import GgufHeader
from converters.tensors import TensorInfo


@dataclass(frozen=True)
class Module:
    """One adapted weight, as the adapter's own file tells it.

    Attributes:
        name: in the adapter's layout, without `.weight`: `blk.0.attn_q`, `model.layers.0.self_attn.q_proj`.
        key: what its file calls it.
        rank: r, from the tensors.
        scaling: the true factor of B @ A; None where the configuration doesn't say.
        shape: (out, in) of the weight, (vocabulary, width) of an embedding.
        embedding: whether the weight is an embedding table.
        experts: how many matrices a stack has; None for an ordinary weight.
    """

    name: str
    key: str
    rank: int
    scaling: float | None
    shape: tuple[int, int]
    embedding: bool = False
    experts: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class Container:
    """How a GGUF file is built."""

    version: int
    byte_order: str
    alignment: int

    @classmethod
    def of(cls, header: GgufHeader) -> Container:
        return cls(header.version, header.byte_order, header.alignment)


@dataclass(frozen=True)
class Inspection:
    """What a path holds.

    Attributes:
        path: what the user named.
        format: gguf, safetensors, peft or mlx; pickle, which is not read.
        architecture: GGUF's name or the class that config.json names; None where nothing says.
        files: that hold tensors, with their sizes in bytes.
        fingerprint: see `converters.fingerprint`.
        metadata: values as `converters.inspection.values` shortens them.
        tensors: in file order.
        modules: an adapter's sound pairs.
        warnings: what llama.cpp or our own commands would refuse, ignore, lose or die of; a sentence each.
        notes: what else one may want to know before using it.
        container: of the first GGUF file; None for other formats.
    """

    path: Path
    kind: Literal["model", "adapter"]
    format: str
    architecture: str | None
    files: tuple[tuple[Path, int], ...]
    fingerprint: str
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    modules: tuple[Module, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    container: Container | None = None

    @property
    def nbytes(self) -> int:
        """The size of all its tensor files."""
        return sum(size for _, size in self.files)

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def types(self) -> Mapping[str, int]:
        """How many tensors are stored in each type, most frequent first."""
        return dict(Counter(tensor.dtype for tensor in self.tensors).most_common())

    def to_json(self) -> dict[str, Any]:
        """What the command line contract asks of `inspect`, but for the command's own name and version."""
        named = {"role": self.kind, "path": str(self.path), "format": self.format, "bytes": self.nbytes}
        result: dict[str, Any] = {
            "inputs": [{**named, "fingerprint": self.fingerprint}],
            "kind": self.kind,
            "format": self.format,
            "architecture": self.architecture,
            "files": [{"path": str(path), "bytes": size} for path, size in self.files],
            "container": None if self.container is None else dict(vars(self.container)),
            "metadata": dict(self.metadata),
            "tensors": [_tensor_json(tensor) for tensor in self.tensors],
            "totals": {
                "parameters": self.parameters,
                "tensors": len(self.tensors),
                "tensor_bytes": sum(tensor.nbytes for tensor in self.tensors),
                "types": dict(self.types),
            },
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }
        if self.kind == "adapter":
            result["modules"] = [module.to_json() for module in self.modules]
        return result


def _tensor_json(tensor: TensorInfo) -> dict[str, Any]:
    return {"name": tensor.name, "type": tensor.dtype, "shape": list(tensor.shape), "bytes": tensor.nbytes}

"""What a conversion of a model did, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safelora_gguf._version import __version__
from safelora_gguf.report import InputReport, OutputReport, output_entry


@dataclass(frozen=True)
class ConvertedTensor:
    """One tensor.

    Attributes:
        name: GGUF's.
        shape: outermost dimension first.
        type: what it is stored in; None where only the quantizer will know.
        source_type: what it was stored in; None for one that follows from the configuration.
        stored_error: ||stored - value|| / ||value||; None where nothing was written, or the quantizer rounded.
    """

    name: str
    shape: tuple[int, ...]
    type: str | None
    source_type: str | None
    stored_error: float | None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class ConvertModelReport:
    """The result of `convert model`.

    Attributes:
        outtype: what was asked for.
        files: what was written, several where the model was split; None after a dry run.
        notes: whatever a careful reader should know, one sentence each; losses first.
        losses: what of the source is not in the output.
        planned_output: where the output would go or went, and its size in bytes.
    """

    outtype: str
    tensors: tuple[ConvertedTensor, ...]
    inputs: tuple[InputReport, ...]
    files: tuple[OutputReport, ...] | None
    notes: tuple[str, ...]
    losses: tuple[str, ...]
    planned_output: tuple[str, int]

    @property
    def output(self) -> OutputReport | None:
        """The file, or the first shard with the bytes of all."""
        if self.files is None:
            return None
        first = self.files[0]
        shards = self.files if len(self.files) > 1 else ()
        return OutputReport(first.path, sum(file.bytes for file in self.files), first.sha256, shards)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that the command line contract describes."""
        result: dict[str, Any] = {
            "command": "convert model",
            "version": __version__,
            "inputs": [item.to_json() for item in self.inputs],
            "outtype": self.outtype,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "losses": list(self.losses),
            "notes": list(self.notes),
        }
        return result | output_entry(self.output, self.planned_output)

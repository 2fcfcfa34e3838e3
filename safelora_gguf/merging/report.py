"""What a merge did, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safelora_gguf._version import __version__
from safelora_gguf.report import InputReport, OutputReport, output_entry


@dataclass(frozen=True)
class MergedTensor:
    """One changed tensor of the output.

    Attributes:
        name: in the output.
        adapters: which of the run's change it, counted from 0 in the order in which they were named.
        delta_norm: ||W' - W||_F / ||W||_F before rounding; None before anything was computed, and where W is 0.
        stored_error: what rounding to the type cost, relative to W'; None where the quantizer doesn't tell.
        type: that it is stored in; None where the quantizer decides and wasn't asked yet.
    """

    name: str
    shape: tuple[int, ...]
    adapters: tuple[int, ...]
    delta_norm: float | None
    stored_error: float | None
    type: str | None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape), "adapters": list(self.adapters)}


@dataclass(frozen=True)
class MergeReport:
    """The result of `merge`.

    Attributes:
        scales: of the adapters, in the order of their inputs.
        outtype: that was asked for; "keep" where each tensor keeps its type.
        tensors: those that changed, in the output's order.
        output: None after a dry run.
        shards: all files of tensors, where there are several.
        notes: whatever a careful reader should know, one sentence each; losses first.
        losses: what of an adapter or of the model is not in the output.
        planned_output: where the output would go or went, and its size in bytes.
        next_steps: commands, one line each.
    """

    scales: tuple[float, ...]
    outtype: str
    tensors: tuple[MergedTensor, ...]
    inputs: tuple[InputReport, ...]
    output: OutputReport | None
    shards: tuple[str, ...]
    notes: tuple[str, ...]
    losses: tuple[str, ...]
    planned_output: tuple[str, int]
    next_steps: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON object that the command line contract describes."""
        result: dict[str, Any] = {
            "command": "merge",
            "version": __version__,
            "inputs": self._inputs(),
            "outtype": self.outtype,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "notes": list(self.notes),
            "losses": list(self.losses),
        }
        if len(self.shards) > 1:
            result["shards"] = list(self.shards)
        return result | output_entry(self.output, self.planned_output)

    def _inputs(self) -> list[dict[str, Any]]:
        """The adapters with their scales."""
        scales = iter(self.scales)
        return [
            {**entry.to_json(), "scale": next(scales)} if entry.role == "adapter" else entry.to_json()
            for entry in self.inputs
        ]

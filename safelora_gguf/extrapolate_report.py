"""What an extrapolation found and did, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from safelora_gguf._version import __version__
from safelora_gguf.report import InputReport, OutputReport, label_of, output_entry


@dataclass(frozen=True)
class TensorReport:
    """One matrix.

    Attributes:
        name: the tensor, by GGUF's name where the architecture is known.
        shape: (out, in), or (vocabulary, width).
        singular_values: of V's directions that were used, falling; none for rank 0.
        residual: max_i ||V^T u_i - s_i w_i|| / s_1 as computed; None where nothing was decomposed.
        iterations: products with V V^T; 0 for a direct decomposition.
        r_align: ||U_k U_k^T V||_F / ||V||_F.
        alignment_norm: ||V||_F.
        snr: signal to noise of V; None where both references are exact.
        noise_edge: singular values up to this may be rounding noise; None likewise.
        stored_error: relative rounding error of what was written; None when nothing was.
        expert: which matrix of the stack `name`; None for an ordinary weight.
    """

    name: str
    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    residual: float | None
    iterations: int | None
    r_align: float | None
    alignment_norm: float | None
    snr: float | None
    noise_edge: float | None
    stored_error: float | None
    expert: int | None

    @property
    def label(self) -> str:
        """The name, and which of a stack's experts it is."""
        return label_of(self.name, self.expert)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape), "singular_values": list(self.singular_values)}


@dataclass(frozen=True)
class ExtrapolateReport:
    """The result of `extrapolate`.

    Attributes:
        form: what was written.
        rank: k; 0 for all of V.
        tolerance: that every residual keeps to.
        output: None after a dry run.
        notes: whatever a careful reader should know, one sentence each; losses first.
        losses: what is not, or not exactly, in the output, or is not applied by llama.cpp.
        planned_output: where the output would go or went, and its size in bytes.
        next_steps: commands, one line each.
    """

    form: Literal["adapter", "model"]
    rank: int
    coef: float
    tolerance: float
    outtype: str
    tensors: tuple[TensorReport, ...]
    inputs: tuple[InputReport, ...]
    output: OutputReport | None
    notes: tuple[str, ...]
    losses: tuple[str, ...]
    planned_output: tuple[str, int]
    next_steps: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON object that the command line contract describes."""
        result: dict[str, Any] = {
            "command": "extrapolate",
            "version": __version__,
            "inputs": [item.to_json() for item in self.inputs],
            "as": self.form,
            "rank": self.rank,
            "coef": self.coef,
            "tolerance": self.tolerance,
            "outtype": self.outtype,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "notes": list(self.notes),
            "losses": list(self.losses),
        }
        return result | output_entry(self.output, self.planned_output)

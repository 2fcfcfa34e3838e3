"""What transformers computes if weights and activations are rounded as ggml's CPU code rounds them.

A matrix of F16, BF16 or Q8_0 is multiplied with activations rounded to the same type, all sums in float32. With that
imitated, what remains between the two is what a converter did.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from conformance import peft_side
from torch.overrides import TorchFunctionMode

Q8_0 = gguf.GGMLQuantizationType.Q8_0
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16}
ROUTERS = ("mlp.gate.weight", "shared_expert_gate.weight")
"""Matrices that are F32 in any file."""


def rounded(values: torch.Tensor, outtype: str) -> torch.Tensor:
    """float32 values as the type has them; rows that are no whole blocks of Q8_0 are F16."""
    if outtype == "F32":
        return values
    if outtype in FLOATS or values.shape[-1] % 32:
        return values.to(FLOATS.get(outtype, torch.float16)).float()
    rows = np.ascontiguousarray(values.detach().numpy().reshape(-1, values.shape[-1]))
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(rows, Q8_0), Q8_0)).reshape(values.shape)


class RoundedInputs(TorchFunctionMode):
    """Rounds what every matrix is multiplied with, but for those of `exempt`, by id."""

    def __init__(self, outtype: str, exempt: Collection[int]) -> None:
        super().__init__()
        self.outtype, self.exempt = outtype, exempt

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and id(args[1]) not in self.exempt:
            args = (rounded(args[0], self.outtype), *args[1:])
        return func(*args, **(kwargs or {}))


def logits_as_ggml(checkpoint: Path, outtype: str, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Logits (tokens, vocabulary) of sequences one after another, by a model whose matrices have this type."""
    model = peft_side.with_ggml_gelu(peft_side.load_model(checkpoint))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # a product for each expert, which can be told from others
    routers = {id(parameter) for name, parameter in model.named_parameters() if name.endswith(ROUTERS)}
    with torch.inference_mode():
        for parameter in model.parameters():
            if parameter.ndim > 1 and id(parameter) not in routers:
                parameter.copy_(rounded(parameter, outtype))
        with RoundedInputs(outtype, routers):
            found = [model(input_ids=torch.tensor([tokens])).logits[0] for tokens in sequences]
    return torch.cat(found).float().numpy()

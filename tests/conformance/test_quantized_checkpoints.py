"""Checkpoints whose weights are quantized. Oracles: the sections that transformers' own classes write into config.json,
and mlx_lm's by hand; the tensors that each method's loader looks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import Sizes, config, save_model, weights

from converters.errors import FileMissingError, UnsupportedError
from safelora_gguf.model_conversion import convert_model

pytestmark = pytest.mark.conformance

SIZES = Sizes()
WEIGHT = "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


def section(name: str, **options: Any) -> dict[str, Any]:
    made = getattr(transformers, name)(**options).to_dict()
    found: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return found


def packed(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    """The matrix taken out, and what stands in its place."""

    def change(tensors: Tensors) -> Tensors:
        others = {name: tensor for name, tensor in tensors.items() if name != f"{WEIGHT}.weight"}
        return {**others, **{f"{WEIGHT}.{name.replace('__', '.', 1)}": tensor.clone() for name, tensor in more.items()}}

    return change


BYTES, INTS, HALVES = torch.zeros(64, 1, dtype=torch.uint8), torch.zeros(8, 64).int(), torch.ones(64, 1).half()
GPTQ = packed(qweight=INTS, qzeros=INTS, scales=HALVES, g_idx=torch.zeros(64).int())
CASES: Mapping[str, tuple[dict[str, Any], Callable[[Tensors], Tensors], str]] = {
    "bitsandbytes, 4 bits": (
        {"quantization_config": section("BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_quant_type="nf4")},
        packed(weight=BYTES, weight__absmax=torch.ones(4)),
        r"bitsandbytes \(nf4\)",
    ),
    "bitsandbytes, 8 bits": (
        {"quantization_config": section("BitsAndBytesConfig", load_in_8bit=True)},
        packed(weight=torch.zeros(64, 64).char(), SCB=torch.ones(64)),
        r"bitsandbytes \(8 bits\)",
    ),
    "GPTQ": ({"quantization_config": section("GPTQConfig", bits=4)}, GPTQ, r"GPTQ \(4 bits\)"),
    "GPTQ, unsaid": ({}, GPTQ, "GPTQ or AWQ"),
    "AWQ": (
        {"quantization_config": section("AwqConfig", bits=4)},
        packed(qweight=INTS, qzeros=INTS, scales=HALVES),
        r"AWQ \(4 bits\)",
    ),
    "FP8": (
        {"quantization_config": section("FineGrainedFP8Config")},
        packed(weight=torch.zeros(64, 64).to(torch.float8_e4m3fn), weight_scale_inv=torch.ones(1, 1)),
        "FP8",
    ),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        packed(weight_packed=INTS, weight_scale=HALVES),
        r"compressed-tensors \(pack-quantized\)",
    ),
    "MLX": (
        {"quantization": {"group_size": 64, "bits": 4}},
        packed(weight=torch.zeros(64, 8, dtype=torch.uint32), scales=HALVES, biases=HALVES),
        r"MLX \(4 bits\)",
    ),
    "floats of which config.json says otherwise": (
        {"quantization_config": section("BitsAndBytesConfig", load_in_4bit=True)},
        lambda tensors: tensors,
        "plain floats.*take quantization_config out",
    ),
    "a method that nobody knows": (
        {"quantization_config": {"quant_method": "x" * 900}},
        packed(weight=torch.zeros(64, 64).char()),
        f"by {'x' * 40};",
    ),
}
"""config.json's section, what the tensors become, and what the refusal says."""


@pytest.mark.parametrize("case", CASES)
def test_they_are_refused_by_name(case: str, tmp_path: Path) -> None:
    settings, change, words = CASES[case]
    model = save_model(tmp_path / "m", change(weights(SIZES, 1)), {**config(SIZES), **settings})
    with pytest.raises(UnsupportedError, match=words) as caught:
        convert_model(model, tmp_path / "a.gguf")
    assert caught.value.exit_status == 3
    assert list(tmp_path.iterdir()) == [model]


def test_a_section_that_says_nothing(tmp_path: Path) -> None:
    """The tensors are read then; what is missing is the tokenizer."""
    settings = {**config(SIZES), "quantization_config": None}
    with pytest.raises(FileMissingError, match="tokenizer"):
        convert_model(save_model(tmp_path / "m", weights(SIZES, 1), settings), tmp_path / "a.gguf")

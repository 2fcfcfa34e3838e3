"""Checkpoints whose weights are quantized, by what config.json and the tensors say.

What stands in them are packed integers and scales, each method with layouts of its own, so none is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import UnsupportedError
from converters.tensors import TensorInfo

_SECTIONS = ("quantization_config", "compression_config", "quantization")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_NAMES = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "mxfp4": "MXFP4",
}
# Endings of what such files hold beside, or in the place of, a matrix; for files whose config.json says nothing.
_TRACES = {
    ".qweight": "GPTQ or AWQ",
    ".weight.quant_state.bitsandbytes__nf4": "bitsandbytes (nf4)",
    ".weight.quant_state.bitsandbytes__fp4": "bitsandbytes (fp4)",
    ".SCB": "bitsandbytes (8 bits)",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".biases": "MLX",
}
_HOW = {
    "bitsandbytes": "with transformers' model.dequantize() and save_pretrained",
    "MLX": "with mlx_lm.convert --dequantize",
    "FP8": "with transformers' FineGrainedFP8Config(dequantize=True) and save_pretrained",
}
_SHOWN = 40


def refuse_quantized(config: Mapping[str, Any], file: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Whether a checkpoint is one of floats, before anything is made of its tensors.

    Args:
        config: what config.json holds.
        file: config.json, for messages.
        infos: of all tensors.

    Raises:
        UnsupportedError: it is quantized, or config.json says so of floats.
    """
    text = config.get("text_config")
    config = {**text, **config} if isinstance(text, dict) else config
    section = next((key for key in _SECTIONS if config.get(key)), None)
    traces = [(what, name) for ending, what in _TRACES.items() for name in infos if name.endswith(ending)]
    if section is None and not traces:
        return
    what = traces[0][0] if section is None else _method(section, config[section])
    packed = [name for name, info in infos.items() if len(info.shape) > 1 and info.dtype not in _FLOATS]
    if section is not None and not traces and not packed:
        raise UnsupportedError(
            f"says that the weights are quantized by {what} ({section}), and they are plain floats: transformers would "
            f"quantize them on loading. If they are meant as they are, take {section} out of it",
            file=file,
        )
    how = next((f" {told}" for kind, told in _HOW.items() if what.startswith(kind)), "")
    raise UnsupportedError(
        f"is quantized by {what}; take the original model of floats, or dequantize this one first{how}",
        file=file.parent,
        tensor=traces[0][1] if traces else packed[0] if packed else None,
    )


def _method(section: str, settings: Any) -> str:
    """What did it, and how."""
    if not isinstance(settings, dict):
        return "an unknown method"
    found = settings.get("quant_method")
    if not isinstance(found, str):
        found = "MLX" if section == "quantization" or {"group_size", "bits"} <= settings.keys() else "an unknown method"
    name = _NAMES.get(found.lower(), found[:_SHOWN])
    details = _details(settings)
    return f"{name} ({details})" if details else name


def _details(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_4bit") is True or settings.get("_load_in_4bit") is True:
        kind = settings.get("bnb_4bit_quant_type")
        return kind[:_SHOWN] if isinstance(kind, str) else "4 bits"
    if settings.get("load_in_8bit") is True or settings.get("_load_in_8bit") is True:
        return "8 bits"
    bits = settings.get("bits")
    if type(bits) is int and 0 < bits < 100:
        return f"{bits} bits"
    form = settings.get("format")
    return form[:_SHOWN] if isinstance(form, str) else ""

"""Sliding windows that llama.cpp leaves out. Oracle: transformers' logits against llama.cpp's, before a text is longer
than the window and after."""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import peft_side
from conformance.checkpoints import VARIANTS, make_checkpoint

from safelora_gguf.model_conversion import convert_model

pytestmark = pytest.mark.conformance

HERE = Path(__file__).parent
WINDOW = 8
TOKENS = [3, 17, 92, 5, 41, 42, 120, 66, 8, 101, 7, 55, 19, 88, 23, 77]
USED = {"sliding_window": WINDOW, "use_sliding_window": True}
BOUND = 1e-3  # F32 on both sides

LEFT_OUT: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "mistral": ("mistral", {"sliding_window": WINDOW}, "2 of 2"),
    "mixtral": ("mixtral", {"sliding_window": WINDOW}, "2 of 2"),
    "phi3": ("phi", {"sliding_window": WINDOW}, "2 of 2"),
    "qwen2": ("qwen2", {**USED, "max_window_layers": 1}, "1 of 2"),
    "qwen2 by types": ("qwen2", {**USED, "layer_types": ["sliding_attention", "full_attention"]}, "1 of 2"),
    "qwen3": ("qwen3", {**USED, "max_window_layers": 0}, "2 of 2"),
    "qwen2moe": ("qwen2moe", USED, "1 of 2"),
    "qwen3moe": ("qwen3moe", USED, "2 of 2"),
    "smollm3": ("smollm3", USED, "1 of 4"),
}
"""The variant, its settings, and in how many layers the window is."""

KEPT: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {"sliding_window": WINDOW}),
    "gemma3": ("gemma3", {"sliding_window": WINDOW}),
    "olmo3": ("olmo3", {"sliding_window": WINDOW}),
    "qwen2, switched off": ("qwen2", {**USED, "use_sliding_window": False, "max_window_layers": 0}),
    "qwen3moe, switched off": ("qwen3moe", {**USED, "use_sliding_window": False}),
    "mistral, none": ("mistral", {"sliding_window": None}),
    "mistral, as wide as the context": ("mistral", {"sliding_window": 128}),
    "smollm3, never sliding": ("smollm3", {**USED, "layer_types": ["full_attention"] * 4}),
}


def distances(variant: str, settings: Mapping[str, Any], directory: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """By token the largest distance between llama.cpp's logits and transformers', and what we said to be left out."""
    kind = VARIANTS[variant]
    kind = replace(kind, stored="F32", settings={**kind.settings, **settings})
    model = make_checkpoint(kind, directory / "Tiny-model")
    report = convert_model(model, directory / "m.gguf", outtype="F32")
    with torch.inference_mode():
        loaded = peft_side.with_ggml_gelu(peft_side.load_model(model))
        truth = loaded(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    command = [
        sys.executable,
        str(HERE / "llama_models_child.py"),
        ",".join(map(str, TOKENS)),
        str(directory / "m.gguf"),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-2000:]
    found = np.load(io.BytesIO(done.stdout))["arr_0"]
    return np.abs(found - truth).max(axis=1), report.losses


@pytest.fixture(autouse=True)
def llama() -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")


@pytest.mark.llama
@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_is_told(case: str, tmp_path: Path) -> None:
    variant, settings, layers = LEFT_OUT[case]
    found, losses = distances(variant, settings, tmp_path)
    (loss,) = losses
    assert layers in loss
    match = re.search(r"from token (\d+)", loss)
    assert match is not None
    first = int(match[1]) - 1
    assert found[:first].max() < BOUND < 50 * BOUND < found[first:].min()


@pytest.mark.llama
@pytest.mark.parametrize("case", KEPT)
def test_what_is_kept_is_no_loss(case: str, tmp_path: Path) -> None:
    found, losses = distances(*KEPT[case], tmp_path)
    assert losses == ()
    assert found.max() < BOUND

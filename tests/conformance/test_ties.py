"""Checkpoints whose embedding is the output matrix, too, or isn't, whatever config.json says. Oracle: transformers' own
output matrix, and its logits against llama.cpp's."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import peft_side
from conformance.checkpoints import VARIANTS, WEIGHTS, make_checkpoint
from safetensors.torch import load_file, save_file

from converters.errors import InputError
from safelora_gguf.model_conversion import convert_model

pytestmark = [pytest.mark.conformance, pytest.mark.llama]

HERE = Path(__file__).parent
TOKENS = [3, 17, 92, 5, 41, 42, 120, 66]
HEAD = "lm_head.weight"
WITHOUT_HEADS = {"gemma", "gemma2"}
"""llama.cpp's architectures that compute with the embedding alone."""


def made(variant: str, ties: bool | None, head: str, directory: Path) -> Path:
    """A checkpoint with its output matrix missing, the embedding, or another one."""
    kind = VARIANTS[variant]
    kind = replace(kind, stored="F32", tensors=None, settings={**kind.settings, "tie_word_embeddings": ties is True})
    model = make_checkpoint(kind, directory / "Tiny-model")
    tensors = load_file(model / WEIGHTS)
    embedding = tensors["model.embed_tokens.weight"]
    tensors.pop(HEAD, None)
    tensors |= {"missing": {}, "same": {HEAD: embedding.clone()}, "other": {HEAD: embedding.flip(0).clone()}}[head]
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    config = {**json.loads((model / "config.json").read_text()), "tie_word_embeddings": ties}
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return model


def logits(model: Path) -> np.ndarray:
    command = [sys.executable, str(HERE / "llama_models_child.py"), ",".join(map(str, TOKENS)), str(model)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-2000:]
    found: np.ndarray = np.load(io.BytesIO(done.stdout))["arr_0"]
    return found


@pytest.mark.parametrize("head", ["missing", "same", "other"])
@pytest.mark.parametrize("ties", [True, False, None])
@pytest.mark.parametrize("variant", ["llama-spm", "qwen2", "gemma", "gemma2", "gemma3", "smollm3", "phi-partial"])
def test_the_output_matrix_is_transformers(variant: str, ties: bool | None, head: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    model = made(variant, ties, head, tmp_path)
    with torch.inference_mode():
        loaded = peft_side.with_ggml_gelu(peft_side.load_model(model))
        truth = loaded(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    output, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    tied = torch.equal(output, embedding)
    random = not tied and head == "missing"
    if random or (variant in WITHOUT_HEADS and not tied):
        with pytest.raises(InputError, match=r"lm_head|output matrix") as caught:
            convert_model(model, tmp_path / "a.gguf", outtype="F32")
        assert ("incomplete" in caught.value.message) == random
        return
    convert_model(model, tmp_path / "a.gguf", outtype="F32")
    assert np.abs(logits(tmp_path / "a.gguf") - truth).max() < 1e-3

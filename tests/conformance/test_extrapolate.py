"""`extrapolate` against LoX's formula and against what runs the results.

Oracles: W_lox = W_aligned + coef * U_k S_k W_k^T written out with numpy's dense SVD in float64; transformers and PEFT,
which load the results and merge them; llama.cpp's logits, adapter form against model form and both against
transformers' for the formula's weights.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conformance import peft_side, reference
from conformance.families import HERE, Family, Logits, Upstream, convert_upstream_each
from conformance.mixture_side import adapted_weights, in_gguf, worst
from conformance.specs import MIXTURES, SPECS, THOROUGH

from converters.errors import UnsupportedError
from safelora_gguf import ExtrapolateReport, extrapolate_models

pytestmark = pytest.mark.conformance

COEF = 1.25
RANK = 6
LOGITS_BOUND = 2e-3  # the product promises 0.02; see test_logits for what F32 arithmetic leaves
FALCON_BOUND = 5e-3  # see test_logits
PROMISED = 0.02
RUN = ("llama", "qwen3", "gemma2", "phi3", "falcon", "mixtral", "gpt-oss", "deepseek2")
SCALED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import llama_child
scale, apply = float(sys.argv.pop(1)), llama_child.lib.llama_set_adapters_lora
def scaled(context, pointers, count, scales):
    scales[0] = scale
    return apply(context, pointers, count, scales)
llama_child.lib.llama_set_adapters_lora = scaled
llama_child.main(*sys.argv[1:])
"""


def lox(before: np.ndarray, after: np.ndarray, rank: int, coef: float = COEF) -> np.ndarray:
    """The paper's update of a matrix, or of every matrix in a stack; rank 0 is all of V."""
    v = after.astype(np.float64) - before.astype(np.float64)
    if rank:
        u, s, w = np.linalg.svd(v, full_matrices=False)
        v = (u[..., :rank] * s[..., None, :rank]) @ w[..., :rank, :]
    return coef * v


def run(base: Path, aligned: Path, out: Path, **options: Any) -> ExtrapolateReport:
    return extrapolate_models(base, aligned, out, **{"rank": RANK, "coef": COEF, "device": "cpu", **options})


def stored_weights(directory: Path) -> Mapping[str, np.ndarray]:
    """Every tensor of a checkpoint in float64 under its own name."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= {name: reference.float64(tensor) for name, tensor in load_file(file).items()}
    return found


def deltas(path: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to each weight or stack in float64, by GGUF name; token_embd's A is stored transposed."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    data = {tensor.name: tensor.data.astype(np.float64) for tensor in reader.tensors}
    found = {}
    for name in (name.removesuffix(".lora_a") for name in data if name.endswith(".lora_a")):
        a, b = data[f"{name}.lora_a"], data[f"{name}.lora_b"]
        scale = alpha / b.shape[-1]
        found[name] = scale * (a @ b.T if name == "token_embd.weight" else b @ a)
    return found


def parameters(model: Any) -> Mapping[str, np.ndarray]:
    return {name: reference.float64(parameter.detach()) for name, parameter in model.named_parameters()}


def distance(left: np.ndarray, right: np.ndarray) -> float:
    assert left.shape == right.shape
    return float(np.abs(left - right).max())


def is_bias(name: str) -> bool:
    """Two dimensions in a stack of experts, and still nothing that is multiplied."""
    return name.endswith("bias")


def formula_of(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    return {name: value + lox(before[name], value, rank) if value.ndim in (2, 3) and not is_bias(name) else value
            for name, value in after.items()}  # fmt: skip


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("architecture", [*RUN, "granitemoe-shared"])
def test_a_checkpoint(architecture: str, rank: int, family_of: Callable[[str], Family], tmp_path: Path) -> None:
    """All tensors of the files, and transformers computes with them as with the formula's."""
    family = family_of(architecture)
    run(family.base, family.aligned, tmp_path / "lox", rank=rank, form="model")
    wanted = formula_of(stored_weights(family.base), stored_weights(family.aligned), rank)
    found = stored_weights(tmp_path / "lox")
    assert worst(found, wanted) < 1e-6
    model = peft_side.load_model(family.aligned)
    alone = peft_side.logits_of(model)
    assert distance(peft_side.logits_of(peft_side.load_model(tmp_path / "lox")), alone) > 0.5


def merged(aligned: Path, adapter: Path) -> Any:
    """PEFT's own merge."""
    return peft_side.load_adapted(aligned, adapter).merge_and_unload()


def tied(architecture: str) -> bool:
    return bool(SPECS[architecture].options().get("tie_word_embeddings"))


def is_end(name: str) -> bool:
    return "embed" in name or "wte" in name or "lm_head" in name


DENSE = (*THOROUGH, "gemma2", "phi3", "falcon", "mistral3", "gemma3-vision", "command-r")


@pytest.mark.parametrize("architecture", DENSE)
def test_a_peft_directory(architecture: str, family_of: Callable[[str], Family], tmp_path: Path) -> None:
    """PEFT loads it and merges it to W_lox; of tied embeddings there is no pair."""
    family = family_of(architecture)
    report = run(family.base, family.aligned, tmp_path / "peft")
    before, after = (parameters(peft_side.load_model(path)) for path in (family.base, family.aligned))
    found = parameters(merged(family.aligned, tmp_path / "peft"))
    for name, weight in after.items():
        expected = weight
        if (
            weight.ndim == 2
            and "vision" not in name
            and "multi_modal" not in name
            and not (tied(architecture) and is_end(name))
        ):
            expected = weight + lox(before[name], weight, RANK)
        assert reference.relative_error(found[name], expected) < 1e-6, name
    assert any("tied" in note for note in report.notes) == tied(architecture)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_mixtures_adapters(architecture: str, family_of: Callable[[str], Family], tmp_path: Path) -> None:
    """Every matrix of every stack in both formats, and what llama.cpp leaves out is told."""
    family = family_of(architecture)
    report = run(family.base, family.aligned, tmp_path / "lox.gguf")
    found = deltas(tmp_path / "lox.gguf")
    layers = {name: delta for name, delta in found.items() if name.startswith("blk.")}
    before, after = (adapted_weights(architecture, path, layers) for path in (family.base, family.aligned))
    wanted = {name: lox(before[name], after[name], RANK) for name in layers}
    assert worst(layers, wanted) < 1e-5
    assert {"token_embd.weight", "output.weight"} == found.keys() - layers.keys()
    if architecture.startswith("deepseek"):
        assert any("does not apply" in loss and "attn_kv_a_mqa" in loss for loss in report.losses)
        assert any("attn_k_b" in loss and "left out" in loss for loss in report.losses)
    else:
        assert report.losses == ()
    run(family.base, family.aligned, tmp_path / "peft")
    theirs: dict[str, np.ndarray] = {}
    for name, layer in peft_side.lora_layers(peft_side.load_adapted(family.aligned, tmp_path / "peft").double()):
        if name.startswith("model.layers."):
            theirs |= in_gguf(architecture, name, reference.float64(layer.get_delta_weight("default").detach()))
    assert worst(theirs, wanted) < 1e-5


@pytest.fixture(scope="module")
def running(llama_cpp_sources: Path, family_of: Callable[[str], Family]) -> Mapping[str, Upstream]:
    """The aligned models by upstream, in F32."""
    return convert_upstream_each([family_of(architecture) for architecture in RUN], llama_cpp_sources, ())


@pytest.mark.llama
@pytest.mark.parametrize("architecture", RUN)
def test_both_forms_in_llama_cpp(
    architecture: str,
    running: Mapping[str, Upstream],
    family_of: Callable[[str], Family],
    llama_logits: Logits,
    tmp_path: Path,
) -> None:
    """The adapter on the aligned model, the GGUF model made from it, and transformers with the formula's weights."""
    family, aligned = family_of(architecture), running[architecture].model
    run(family.base, aligned, tmp_path / "lox.gguf")
    run(family.base, aligned, tmp_path / "model.gguf", form="model")
    model = llama_logits(tmp_path / "model.gguf", None)
    bound = FALCON_BOUND if architecture == "falcon" else LOGITS_BOUND
    if not tied(architecture) and not architecture.startswith("deepseek"):
        assert distance(llama_logits(aligned, tmp_path / "lox.gguf"), model) < bound < PROMISED
    if architecture in MIXTURES or architecture == "falcon":
        return  # whose parts have a spectrum each here, and not in the checkpoint
    run(family.base, family.aligned, tmp_path / "checkpoint", form="model")
    truth = peft_side.load_model(tmp_path / "checkpoint")
    assert distance(model, peft_side.logits_of(peft_side.with_ggml_gelu(truth))) < bound
    assert distance(model, llama_logits(aligned, None)) > 0.5, "it hardly moves the logits"


@pytest.mark.llama
def test_half_the_scale_is_half_the_coefficient(
    running: Mapping[str, Upstream], family_of: Callable[[str], Family], llama_logits: Logits, tmp_path: Path
) -> None:
    family, aligned = family_of("llama"), running["llama"].model
    run(family.base, family.aligned, tmp_path / "lox.gguf")
    run(family.base, aligned, tmp_path / "half.gguf", form="model", coef=COEF / 2)
    tokens = ",".join(map(str, peft_side.TOKENS))
    command = [sys.executable, "-c", SCALED, str(HERE), "0.5", str(aligned), str(tmp_path / "lox.gguf"), tokens]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert distance(np.load(io.BytesIO(done.stdout)), llama_logits(tmp_path / "half.gguf", None)) < LOGITS_BOUND
    assert distance(np.load(io.BytesIO(done.stdout)), llama_logits(aligned, tmp_path / "lox.gguf")) > 0.5


MIXED = [*((architecture, 0) for architecture in RUN if architecture != "deepseek2"),
         *((architecture, RANK) for architecture in ("llama", "gemma2", "phi3", "falcon", "mixtral"))]  # fmt: skip


@pytest.mark.parametrize(("architecture", "rank"), MIXED)
def test_a_checkpoint_beside_a_gguf(
    architecture: str,
    rank: int,
    running: Mapping[str, Upstream],
    family_of: Callable[[str], Family],
    tmp_path: Path,
) -> None:
    """What is added in GGUF's layout stands in the checkpoint's: the same as if both models were checkpoints. The two
    have changed places here, since upstream converted the aligned one."""
    family = family_of(architecture)
    run(running[architecture].model, family.base, tmp_path / "lox", form="model", rank=rank)
    before, after = stored_weights(family.aligned), stored_weights(family.base)
    assert worst(stored_weights(tmp_path / "lox"), formula_of(before, after, rank)) < 1e-5


def test_what_has_no_way_back_is_refused(
    running: Mapping[str, Upstream], family_of: Callable[[str], Family], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="in one format") as told:
        run(running["deepseek2"].model, family_of("deepseek2").base, tmp_path / "lox", form="model")
    assert told.value.tensor is not None and "kv_b_proj" in told.value.tensor
    assert not (tmp_path / "lox").exists()

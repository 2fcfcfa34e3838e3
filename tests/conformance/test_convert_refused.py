"""Checkpoints that no GGUF file is made of. Oracles: transformers, whose model of the same config.json has other
parameters than the file; upstream's convert_hf_to_gguf.py, which makes no language model of some."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from conformance.checkpoint_changes import Tensors
from conformance.checkpoints import VARIANTS, WEIGHTS, make_checkpoint
from conformance.upstream_model import upstream_converter
from safetensors.torch import load_file, save_file

from converters.errors import InputError, UnsupportedError
from safelora_gguf.model_conversion import convert_model

pytestmark = pytest.mark.conformance


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda variant: make_checkpoint(VARIANTS[variant], root / variant))


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def replaced(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: change(tensor) if part in name else tensor for name, tensor in tensors.items()}


def copied(part: str, to: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        found = {name: tensor for name, tensor in tensors.items() if part in name}
        return {**tensors, **{name.replace(part, to): tensor.clone() for name, tensor in found.items()}}

    return change


UP = "layers.1.mlp.up_proj"
REFUSED: Mapping[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "no keys": ("llama3-rope", without("layers.1.self_attn.k_proj"), "k_proj"),
    "no final norm": ("llama3-rope", without("model.norm"), "norm"),
    "no embedding": ("llama3-rope", without("embed_tokens"), "embed_tokens"),
    "no head": ("qwen2-yarn", without("lm_head"), "lm_head"),
    "no biases": ("qwen2-yarn", without(".bias"), "bias"),
    "no biases of queries": ("llama-biases", without("q_proj.bias"), r"q_proj\.bias"),
    "no biases of mlp": ("llama-biases", without("up_proj.bias"), r"up_proj\.bias"),
    "shorter head": ("qwen2-yarn", replaced("lm_head", lambda rows: rows[:300].clone()), "lm_head"),
    "no norm of queries": ("gemma3", without("q_norm"), "q_norm"),
    "no router": ("qwen2moe", without("layers.1.mlp.gate."), "mlp.gate"),
    "one expert less": ("qwen2moe", without("layers.1.mlp.experts.2.down_proj"), "expert"),
    "one expert less everywhere": ("qwen2moe", without("experts.3."), "3 of 4 experts"),
    "a tensor of nobody's": ("llama3-rope", copied(UP, "layers.1.mlp.new"), r"mlp\.new"),
    "a layer too many": ("llama3-rope", copied("layers.1.", "layers.2."), "layer 2"),
    "a layer too few": ("llama3-rope", without("layers.1."), "layers.1"),
    "shorter embedding": ("llama3-rope", replaced("embed_tokens", lambda rows: rows[:200].clone()), "200"),
    "narrower matrix": ("llama3-rope", replaced(UP, lambda matrix: matrix[:, :48].clone()), "up_proj"),
    "turned matrix": ("llama3-rope", replaced(UP, lambda matrix: matrix.T.contiguous()), "up_proj"),
}
"""What is changed about a checkpoint's tensors, and what the refusal has to name."""


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_is_not_what_its_config_says(
    case: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Oracle: transformers, whose model of this config.json has other parameters than the file."""
    variant, change, words = REFUSED[case]
    broken = Path(shutil.copytree(checkpoint_of(variant), tmp_path / "broken"))
    save_file(change(load_file(broken / WEIGHTS)), broken / WEIGHTS, {"format": "pt"})
    assert complaints(broken, VARIANTS[variant].spec.model)
    with pytest.raises(InputError, match=words) as raised:
        convert_model(broken, tmp_path / "ours.gguf", outtype="F16")
    assert raised.value.exit_status == 3
    assert list(tmp_path.iterdir()) == [broken]


OTHER_CONFIG: Mapping[str, tuple[str, Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "more tokens": ("llama3-rope", lambda same: same, {"vocab_size": 400}, "400 x 64"),
    "fewer tokens": ("llama3-rope", lambda same: same, {"vocab_size": 300}, "300 x 64"),
    "no head, and nothing of ties": ("llama-linear", without("lm_head"), {"tie_word_embeddings": None}, "lm_head"),
    "biases of attention": ("llama-linear", lambda same: same, {"attention_bias": True}, r"_proj\.bias"),
    "biases of the feed-forward network": ("granite", lambda same: same, {"mlp_bias": True}, r"_proj\.bias"),
}


@pytest.mark.parametrize("case", OTHER_CONFIG)
def test_a_config_that_is_not_what_its_checkpoint_says(
    case: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Oracle: transformers, as above; a setting of None is taken out."""
    variant, change, settings, words = OTHER_CONFIG[case]
    broken = Path(shutil.copytree(checkpoint_of(variant), tmp_path / "broken"))
    save_file(change(load_file(broken / WEIGHTS)), broken / WEIGHTS, {"format": "pt"})
    config = {**json.loads((broken / "config.json").read_text()), **settings}
    (broken / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    assert complaints(broken, VARIANTS[variant].spec.model)
    with pytest.raises(InputError, match=words) as raised:
        convert_model(broken, tmp_path / "ours.gguf", outtype="F16")
    assert raised.value.exit_status == 3
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize("variant", ["llama3-rope", "gemma"])
def test_ties_that_config_leaves_out(variant: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """A checkpoint without a head is whole where transformers' class ties by itself, and broken otherwise."""
    silent = Path(shutil.copytree(checkpoint_of(variant), tmp_path / "silent"))
    config = json.loads((silent / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (silent / "config.json").write_text(json.dumps(config))
    if complaints(silent, VARIANTS[variant].spec.model):
        with pytest.raises(InputError, match="tie_word_embeddings to true"):
            convert_model(silent, tmp_path / "ours.gguf")
    else:
        convert_model(silent, tmp_path / "ours.gguf")


def test_an_embedding_model_is_refused(
    checkpoint_of: Callable[[str], Path], llama_cpp_sources: Path, tmp_path: Path
) -> None:
    """As sentence-transformers saves it. Oracle: upstream, which writes keys that no language model has."""
    model = Path(shutil.copytree(checkpoint_of("qwen3"), tmp_path / "embedding"))
    kinds = ("models.Transformer", ""), ("models.Pooling", "1_Pooling")
    modules = [{"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.{kind}"}
               for number, (kind, path) in enumerate(kinds)]  # fmt: skip
    (model / "modules.json").write_text(json.dumps(modules, indent=2))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    with upstream_converter(llama_cpp_sources, tmp_path / "upstream.log") as convert:
        convert(model, "f32", "qwen2", tmp_path / "theirs.gguf")
    assert any("pooling" in key for key in gguf.GGUFReader(tmp_path / "theirs.gguf").fields)
    with pytest.raises(UnsupportedError, match=r"embedding model.*convert_hf_to_gguf") as raised:
        convert_model(model, tmp_path / "ours.gguf")
    assert raised.value.file == str(model / "modules.json")
    (model / "modules.json").write_text(json.dumps(modules[:1]))
    convert_model(model, tmp_path / "ours.gguf")


@pytest.mark.parametrize("sign", ["directory", "name", "card"])
def test_a_reranker_is_refused(sign: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """By what upstream's Qwen3Model goes by: it takes two rows of the output matrix, and nothing else of it."""
    place = tmp_path / ("Qwen3-Reranker-0.6B" if sign == "directory" else "model")
    model = Path(shutil.copytree(checkpoint_of("qwen3"), place))
    if sign == "name":
        config = {**json.loads((model / "config.json").read_text()), "_name_or_path": "Qwen/Qwen3-Reranker-4B"}
        (model / "config.json").write_text(json.dumps(config))
    if sign == "card":
        (model / "README.md").write_text("---\nlicense: mit\n---\n# Qwen3-Reranker-0.6B\n")
    with pytest.raises(UnsupportedError, match="reranker"):
        convert_model(model, tmp_path / "ours.gguf")


@pytest.mark.llama
@pytest.mark.parametrize("variant", ["qwen3", "olmo2", "granite"])
def test_biases_that_llama_cpp_does_not_load(
    variant: str, checkpoint_of: Callable[[str], Path], llama_cpp_sources: Path, tmp_path: Path
) -> None:
    """Of all attention modules, as transformers allows. Oracle: llama.cpp, given upstream's conversion."""
    llama_cpp = pytest.importorskip("llama_cpp")
    made = VARIANTS[variant]
    model = make_checkpoint(replace(made, settings={**made.settings, "attention_bias": True}), tmp_path / "model")
    with upstream_converter(llama_cpp_sources, tmp_path / "upstream.log") as convert:
        convert(model, "f32", made.pre or "", tmp_path / "theirs.gguf")
    try:
        llama_cpp.Llama(str(tmp_path / "theirs.gguf"), verbose=False)
    except ValueError:
        with pytest.raises(UnsupportedError, match=r"o_proj\.bias.*no place"):
            convert_model(model, tmp_path / "ours.gguf")
    else:
        convert_model(model, tmp_path / "ours.gguf")
        assert variant == "granite"


def complaints(checkpoint: Path, model_class: str) -> list[str]:
    """What transformers says of the tensors that a file lacks, or has beyond the model's, or in another shape."""
    kind = getattr(transformers, model_class)
    _, told = kind.from_pretrained(checkpoint, output_loading_info=True, ignore_mismatched_sizes=True)
    return [str(key) for keys in told.values() for key in keys]

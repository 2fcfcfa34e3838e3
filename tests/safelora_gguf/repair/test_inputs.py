"""What a repair reads and what it leaves alone. Oracles: transformers' and PEFT's own modules, gguf-py's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import peft_side
from conformance.families import Family, make_family
from gguf_models import write_gguf_adapter, write_gguf_model, write_trio
from models import Sizes, adapter_config, config, pairs, save_adapter, save_model, weights
from repair_inputs import gguf_of
from safetensors.torch import load_file, save_file

from converters.adapters.gguf_output import GgufOutput
from converters.adapters.peft_output import PeftOutput
from converters.errors import Error, FormatError, MismatchError, UnsupportedError, UsageError
from safelora_gguf.repair.inputs import open_repair_inputs

SIZES = Sizes()


@pytest.fixture(scope="session")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    return cache(lambda architecture: make_family(architecture, tmp_path_factory.mktemp(architecture)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf_model(tmp_path / "model.gguf", weights(SIZES, 1), config(SIZES))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", pairs(SIZES.modules(), 2), adapter_config())


@pytest.mark.conformance
@pytest.mark.parametrize("architecture", ["llama", "phi3", "falcon", "qwen3moe", "deepseek2"])
def test_every_adapted_input_has_the_width_that_transformers_gives_it(
    architecture: str, family_of: Callable[[str], Family], tmp_path: Path
) -> None:
    """PEFT's A has a column for every input; a mixture's gate and up are two weights here, an expert's is no weight."""
    family = family_of(architecture)
    inputs = open_repair_inputs(gguf_of(family.aligned, tmp_path / "model.gguf"), family.adapters["plain"])
    layers = dict(peft_side.lora_layers(peft_side.load_adapted(family.aligned, family.adapters["plain"])))
    widths = sorted(
        width
        for name, layer in layers.items()
        for width in [layer.lora_A["default"].in_features] * (2 if name.endswith("experts.gate_up_proj") else 1)
    )
    assert sorted(inputs.widths[weight] for weight in inputs.weights) == widths
    assert inputs.modules == tuple(inputs.adapter.pairs) and not inputs.left_alone
    assert [item.role for item in inputs.reports] == ["model", "adapter"]
    assert {inputs.weight_of(module) for module in inputs.modules} == set(inputs.weights)


def test_the_formats_of_one_adapter_have_the_same_weights(model: Path, adapter: Path, tmp_path: Path) -> None:
    as_gguf = write_gguf_adapter(tmp_path / "a.gguf", load_file(adapter / "adapter_model.safetensors"), config(SIZES))
    mlx = _as_mlx(tmp_path / "mlx", load_file(adapter / "adapter_model.safetensors"))
    found = [open_repair_inputs(model, one) for one in (adapter, as_gguf, mlx)]
    assert found[0].weights == found[1].weights == found[2].weights
    assert len(found[0].weights) == len(SIZES.modules())
    for module in found[0].modules:
        first, *others = (inputs.adapter.load(module) for inputs in found)
        assert all(torch.equal(half, mine) for other in others for half, mine in zip(other, first, strict=True))


def _as_mlx(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """mlx-lm's names and order: lora_a (in, r), lora_b (r, out)."""
    directory.mkdir()
    settings = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0}}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    own = {}
    for key, tensor in tensors.items():
        module, half = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        own[f"{module}.lora_{half.lower()}"] = tensor.T.contiguous()
    save_file(own, directory / "adapters.safetensors")
    return directory


def test_where_the_output_goes(model: Path, adapter: Path, tmp_path: Path) -> None:
    """As `project` decides it: a .gguf, a PEFT directory, a GGUF named by convention in a directory."""
    inputs = open_repair_inputs(model, adapter)
    common: dict[str, Any] = {"outtype": "f16", "force": False}
    assert isinstance(inputs.plan(tmp_path / "o.gguf", to=None, **common), GgufOutput)
    assert isinstance(inputs.plan(tmp_path / "o", to=None, **common), PeftOutput)
    inside = inputs.plan(tmp_path / "o", to="gguf", **common)
    assert inside.target.parent == tmp_path / "o" and "Repaired" in inside.target.name
    with pytest.raises(Error, match="model"):
        inputs.plan(model, outtype="f16", to=None, force=True)


def test_an_embedding_is_left_alone(tmp_path: Path, model: Path) -> None:
    table = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(4, SIZES.vocab),
             "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(SIZES.hidden, 4)}  # fmt: skip
    modules = {name: shape for name, shape in SIZES.modules().items() if name.endswith("q_proj")}
    mixed = save_adapter(tmp_path / "mixed", {**pairs(modules, 2), **table}, adapter_config())
    inputs = open_repair_inputs(model, mixed)
    assert list(inputs.left_alone) == ["token_embd"] and "token_embd" not in inputs.modules
    assert inputs.weights == ("blk.0.attn_q.weight", "blk.1.attn_q.weight")
    alone = save_adapter(tmp_path / "alone", table, adapter_config())
    with pytest.raises(UnsupportedError, match=r"nothing that can be repaired: an embedding's input is a token"):
        open_repair_inputs(model, alone)


def test_what_llama_cpp_never_applies_is_left_alone(tmp_path: Path) -> None:
    """DeepSeek's attention; see `gguf_ignored`."""
    shapes = {"blk.0.attn_q_a.weight": (24, 64), "blk.0.attn_output.weight": (64, 64)}
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(*shape, generator=generator).numpy() for name, shape in shapes.items()}
    halves = {name: (drawn[name][:4], drawn[name][:, :4]) for name in shapes}
    _, model, adapter = write_trio(tmp_path, "deepseek2", {name: (w, w) for name, w in drawn.items()}, halves)
    inputs = open_repair_inputs(model, adapter)
    assert inputs.weights == ("blk.0.attn_output.weight",)
    assert inputs.left_alone == {"blk.0.attn_q_a": "llama.cpp never applies a pair to this weight"}


def test_an_architecture_without_a_table_needs_a_gguf_adapter(tmp_path: Path, adapter: Path) -> None:
    w = torch.randn(64, 64).numpy()
    _, model, own = write_trio(tmp_path, "unheard-of", {"blk.0.attn_q.weight": (w, w)},
                               {"blk.0.attn_q.weight": (w[:4], w[:, :4])})  # fmt: skip
    assert open_repair_inputs(model, own).weights == ("blk.0.attn_q.weight",)
    with pytest.raises(UnsupportedError, match="unheard-of"):
        open_repair_inputs(model, adapter)


def test_a_checkpoint_is_no_model_to_run(tmp_path: Path, adapter: Path) -> None:
    checkpoint = save_model(tmp_path / "model", weights(SIZES, 1), config(SIZES))
    with pytest.raises(FormatError, match="convert model"):
        open_repair_inputs(checkpoint, adapter)


def test_an_adapter_of_another_model(tmp_path: Path, adapter: Path) -> None:
    for other in (Sizes(hidden=32), Sizes(layers=1)):
        model = write_gguf_model(tmp_path / f"{other.hidden}{other.layers}.gguf", weights(other, 1), config(other))
        with pytest.raises(MismatchError, match="another model"):
            open_repair_inputs(model, adapter)
    qwen = config(SIZES, "Qwen2ForCausalLM")
    as_gguf = write_gguf_adapter(tmp_path / "q.gguf", pairs(SIZES.modules(), 2), qwen)
    with pytest.raises(MismatchError, match="architecture qwen2"):
        open_repair_inputs(write_gguf_model(tmp_path / "l.gguf", weights(SIZES, 1), config(SIZES)), as_gguf)


def test_dora_says_what_to_do_first(tmp_path: Path, model: Path) -> None:
    tensors = pairs(SIZES.modules(), 2)
    tensors |= {f"base_model.model.{name}.lora_magnitude_vector.weight": torch.ones(shape[0])
                for name, shape in SIZES.modules().items()}  # fmt: skip
    dora = save_adapter(tmp_path / "dora", tensors, adapter_config(use_dora=True))
    with pytest.raises(UnsupportedError, match="convert adapter"):
        open_repair_inputs(model, dora)


def test_a_rank_is_for_dora(model: Path, adapter: Path) -> None:
    with pytest.raises(UsageError, match="DoRA"):
        open_repair_inputs(model, adapter, dora_rank=4)

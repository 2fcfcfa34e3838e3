"""Oracle: mlx-lm's formulas in float64, from the stored tensors; and mlx-lm itself, where it is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Sizes
from safetensors.torch import save_file

from converters.adapters.lora import LoraAdapter
from converters.adapters.mlx import MlxAdapter, is_mlx, open_mlx
from converters.errors import FileMissingError, FormatError, InputError, UnsupportedError

Q0 = "model.layers.0.self_attn.q_proj"
TABLE = "model.embed_tokens"
MODULES = Sizes(layers=11).modules()
SETTINGS = {
    "fine_tune_type": "lora",
    "lora_parameters": {"dropout": 0.0, "rank": 4, "scale": 20.0},
    "model": "mlx-community/tiny-4bit",
    "num_layers": 16,
}


def halves(modules: Mapping[str, tuple[int, int]], ranks: Mapping[str, int] | None = None) -> dict[str, torch.Tensor]:
    """lora_a (in, r) and lora_b (r, out) of linear weights (out, in), as mlx-lm stores them."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for module, (out, into) in modules.items():
        rank = (ranks or {}).get(module, 4)
        tensors[f"{module}.lora_a"] = torch.randn(into, rank, generator=generator)
        tensors[f"{module}.lora_b"] = torch.randn(rank, out, generator=generator)
    return tensors


def save(root: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None = None) -> Path:
    directory = root / "adapter"
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(SETTINGS if settings is None else settings))
    save_file(dict(tensors), directory / "adapters.safetensors", {"format": "mlx"})
    return directory


def with_parameters(**parameters: Any) -> dict[str, Any]:
    return {**SETTINGS, "lora_parameters": parameters}


def delta(adapter: LoraAdapter, module: str) -> torch.Tensor:
    """What a reader of pairs makes of one, in float64."""
    a, b = adapter.load(module)
    product = adapter.pairs[module].scaling * b.double() @ a.double()
    return product.T if adapter.pairs[module].embedding else product


def test_the_delta_of_a_linear_weight(tmp_path: Path) -> None:
    tensors = halves(MODULES)
    adapter = open_mlx(save(tmp_path, tensors))
    assert set(adapter.pairs) == set(MODULES)
    for module, shape in MODULES.items():
        expected = 20.0 * (tensors[f"{module}.lora_a"].double() @ tensors[f"{module}.lora_b"].double()).T
        assert torch.allclose(delta(adapter, module), expected, rtol=1e-12, atol=1e-12), module
        assert adapter.pairs[module].shape == shape == tuple(expected.shape)
        assert not adapter.pairs[module].embedding


@pytest.mark.parametrize("name", [TABLE, "transformer.wte", "transformer.word_embeddings"])
def test_the_delta_of_an_embedding_table(name: str, tmp_path: Path) -> None:
    lora_a, lora_b = torch.randn(128, 4), torch.randn(4, 64)
    adapter = open_mlx(save(tmp_path, {f"{name}.lora_a": lora_a, f"{name}.lora_b": lora_b}))
    pair = adapter.pairs[name]
    assert pair.embedding
    assert pair.shape == (128, 64)
    assert [tuple(half.shape) for half in adapter.load(name)] == [(4, 128), (64, 4)]
    assert torch.allclose(delta(adapter, name), 20.0 * lora_a.double() @ lora_b.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_halves_come_in_their_stored_type_and_order(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in halves(MODULES).items()}
    a, b = open_mlx(save(tmp_path, tensors)).load(Q0)
    assert a.dtype == b.dtype == dtype
    assert torch.equal(a, tensors[f"{Q0}.lora_a"].T)
    assert torch.equal(b, tensors[f"{Q0}.lora_b"].T)
    assert a.is_contiguous()
    assert b.is_contiguous()


def test_what_the_configuration_says(tmp_path: Path) -> None:
    adapter: LoraAdapter = open_mlx(save(tmp_path, halves(MODULES)))
    assert (adapter.format, adapter.layout) == ("mlx", "hugging_face")
    assert adapter.base_model_name == "mlx-community/tiny-4bit"
    assert adapter.lora_alpha / adapter.pairs[Q0].rank == 20.0
    assert adapter.pairs[Q0].tensors == (f"{Q0}.lora_a", f"{Q0}.lora_b")
    assert adapter.nbytes == (tmp_path / "adapter" / "adapters.safetensors").stat().st_size
    assert (adapter.peft_config, dict(adapter.frozen_tables), adapter.invocation_tokens) == (None, {}, ())
    assert dict(adapter.magnitudes) == {}


def test_modules_come_in_natural_order_and_without_wrapping(tmp_path: Path) -> None:
    tensors = {f"language_model.{name}": tensor for name, tensor in halves(MODULES).items()}
    adapter = open_mlx(save(tmp_path, tensors))
    assert set(adapter.pairs) == set(MODULES)
    layers = [int(name.split(".")[2]) for name in adapter.pairs]
    assert layers == sorted(layers)
    assert adapter.pairs[Q0].key == f"language_model.{Q0}"
    assert torch.equal(adapter.load(Q0)[0], tensors[f"language_model.{Q0}.lora_a"].T)


# What each version of mlx-lm wrote, and how it computed self.scale in tuner/lora.py.
@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"lora_layers": 16, "lora_parameters": {"rank": 4, "alpha": 16, "scale": 10.0}}, 10.0 * 16 / 4),  # <= 0.13
        ({"lora_layers": 16, "use_dora": False, "lora_parameters": {"rank": 4, "alpha": 16, "scale": 10.0}}, 10.0),
        ({"num_layers": 16, "fine_tune_type": "lora", "lora_parameters": {"alpha": 16, "scale": 10.0}}, 10.0),
        ({"num_layers": 16, "lora_parameters": {"rank": 4, "scale": 2}}, 2.0),
        ({"num_layers": 16, "lora_parameters": {"rank": 4}}, 20.0),
    ],
)
def test_the_scaling_of_every_version(settings: dict[str, Any], scaling: float, tmp_path: Path) -> None:
    adapter = open_mlx(save(tmp_path, halves(MODULES), settings))
    assert {pair.scaling for pair in adapter.pairs.values()} == {scaling}


def test_ranks_may_differ_where_the_configuration_names_none(tmp_path: Path) -> None:
    adapter = open_mlx(save(tmp_path, halves(MODULES, {Q0: 7}), with_parameters(scale=3.0)))
    assert (adapter.pairs[Q0].rank, adapter.pairs[Q0].scaling) == (7, 3.0)
    assert adapter.lora_alpha == 21.0


GATE = "model.layers.0.mlp.switch_mlp.gate_proj"
EXPERTS = 11


def stacks(experts: int = EXPERTS, *, old: bool = False) -> dict[str, torch.Tensor]:
    """lora_a and lora_b of a LoRASwitchLinear of experts (96, 64); up to mlx-lm 0.19 lora_a had two dimensions."""
    generator = torch.Generator().manual_seed(6)
    lora_a = torch.randn(experts, 4, 64, generator=generator)
    lora_b = torch.randn(experts, 96, 4, generator=generator)
    return {f"{GATE}.lora_a": lora_a.reshape(-1, 64) if old else lora_a, f"{GATE}.lora_b": lora_b}


@pytest.mark.parametrize("old", [False, True])
def test_the_delta_of_every_expert(old: bool, tmp_path: Path) -> None:
    tensors = stacks(old=old)
    adapter = open_mlx(save(tmp_path, tensors))
    lora_a, lora_b = tensors[f"{GATE}.lora_a"].double(), tensors[f"{GATE}.lora_b"].double()
    expected = (20.0 * lora_b) @ lora_a.reshape(EXPERTS, -1, 64)  # LoRASwitchLinear.fuse
    assert list(adapter.pairs) == [f"{GATE}[{expert}]" for expert in range(EXPERTS)]
    for expert, (module, pair) in enumerate(adapter.pairs.items()):
        assert (pair.expert, pair.weight, pair.key, pair.shape, pair.rank) == (expert, GATE, GATE, (96, 64), 4)
        assert pair.tensors == (f"{GATE}.lora_a", f"{GATE}.lora_b") and not pair.embedding
        assert torch.allclose(delta(adapter, module), expected[expert], rtol=1e-12, atol=1e-12), module


def test_only_one_experts_part_is_read(tmp_path: Path) -> None:
    adapter = open_mlx(save(tmp_path, stacks()))
    assert [half.untyped_storage().nbytes() for half in adapter.load(f"{GATE}[7]")] == [4 * 64 * 4, 96 * 4 * 4]


def test_experts_beside_ordinary_pairs(tmp_path: Path) -> None:
    wrapped = {f"language_model.{name}": tensor for name, tensor in stacks(2).items()}
    adapter = open_mlx(save(tmp_path, {**halves(MODULES), **wrapped}))
    assert set(adapter.pairs) == {*MODULES, f"{GATE}[0]", f"{GATE}[1]"}
    assert adapter.pairs[f"{GATE}[1]"].key == f"language_model.{GATE}"
    assert torch.equal(adapter.load(f"{GATE}[1]")[0], stacks(2)[f"{GATE}.lora_a"][1])


def test_more_experts_than_any_model_has(tmp_path: Path) -> None:
    tensors = {}
    for layer in range(25):  # 25 * 4096 > 100,000
        tensors[f"model.layers.{layer}.up.lora_a"] = torch.zeros(4096, 4, 1)
        tensors[f"model.layers.{layer}.up.lora_b"] = torch.zeros(4096, 1, 4)
    with pytest.raises(FormatError, match="more than 100000 pairs"):
        open_mlx(save(tmp_path, tensors))


DORA = {**SETTINGS, "fine_tune_type": "dora"}


def dora(modules: Mapping[str, tuple[int, int]], rows: int = 128) -> dict[str, torch.Tensor]:
    """Pairs and magnitudes of linear weights and of an embedding table (rows, 64), as DoRALinear and DoRAEmbedding
    have them: `mx.linalg.norm(weight, axis=1)` to begin with, one number for each row of either."""
    table = {f"{TABLE}.lora_a": torch.randn(rows, 4), f"{TABLE}.lora_b": torch.randn(4, 64)}
    lengths = {f"{module}.m": torch.rand(shape[0]) for module, shape in {**modules, TABLE: (rows, 64)}.items()}
    return {**halves(modules), **table, **lengths}


# `use_dora` is what mlx-lm 0.14 to 0.18 wrote.
@pytest.mark.parametrize("settings", [DORA, {"lora_layers": 16, "use_dora": True, "lora_parameters": {"scale": 20.0}}])
def test_dora_is_opened_where_it_is_asked_for(settings: dict[str, Any], tmp_path: Path) -> None:
    tensors = dora(MODULES)
    path = save(tmp_path, tensors, settings)
    adapter = open_mlx(path, dora=True)
    assert set(adapter.pairs) == set(adapter.magnitudes) == {*MODULES, TABLE}
    assert torch.equal(adapter.load_magnitude(Q0), tensors[f"{Q0}.m"])
    assert torch.equal(adapter.load_magnitude(TABLE), tensors[f"{TABLE}.m"].reshape(1, 128))
    with pytest.raises(UnsupportedError, match="DoRA"):
        open_mlx(path)


def test_fine_tune_type_alone_decides_where_it_stands(tmp_path: Path) -> None:
    """As load_adapters reads it since mlx-lm 0.19."""
    adapter = open_mlx(save(tmp_path, halves(MODULES), {**SETTINGS, "use_dora": True}))
    assert dict(adapter.magnitudes) == {}


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({f"{Q0}.m": None}, f"{Q0}.lora_a"),
        ({f"{Q0}.m": torch.ones(63)}, f"{Q0}.m"),
        ({f"{Q0}.m": torch.ones(64, 1)}, f"{Q0}.m"),
        ({f"{TABLE}.m": torch.ones(64)}, f"{TABLE}.m"),
        ({f"{Q0}.m": torch.ones(64, dtype=torch.int32)}, f"{Q0}.m"),
        ({"model.layers.99.mlp.up_proj.m": torch.ones(96)}, "model.layers.99.mlp.up_proj.m"),
        (stacks(2), f"{GATE}.lora_a"),  # linear_to_lora_layers refuses DoRA on a SwitchLinear
        ({**stacks(2), f"{GATE}.m": torch.ones(96)}, f"{GATE}.lora_a"),
    ],
)
def test_magnitudes_that_do_not_fit(change: dict[str, torch.Tensor | None], tensor: str, tmp_path: Path) -> None:
    tensors = {name: value for name, value in {**dora(MODULES), **change}.items() if value is not None}
    path = save(tmp_path, tensors, DORA)
    with pytest.raises((FormatError, UnsupportedError)) as caught:
        open_mlx(path, dora=True)
    assert (caught.value.file, caught.value.tensor) == (str(path / "adapters.safetensors"), tensor)


PAIR = {f"{Q0}.lora_a": (64, 4), f"{Q0}.lora_b": (4, 64)}
K0 = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("shapes", "error", "tensor"),
    [
        ({}, FormatError, None),
        ({f"{Q0}.m": (64,)}, UnsupportedError, f"{Q0}.m"),
        ({"model.norm.weight": (64,)}, UnsupportedError, "model.norm.weight"),
        ({f"{K0}.weight": (32, 64)}, UnsupportedError, f"{K0}.weight"),
        ({f"{Q0}.lora_a_scales": (64, 1)}, UnsupportedError, f"{Q0}.lora_a_scales"),
        ({f"{K0}.lora_a": (64, 4)}, FormatError, f"{K0}.lora_a"),
        ({f"{K0}.lora_b": (4, 32)}, FormatError, f"{K0}.lora_b"),
        ({f"{K0}.lora_a": (64, 4), f"{K0}.lora_b": (5, 32)}, FormatError, f"{K0}.lora_b"),
        ({f"{K0}.lora_a": (64, 5), f"{K0}.lora_b": (5, 32)}, FormatError, f"{K0}.lora_a"),
        ({f"{K0}.lora_a": (64,), f"{K0}.lora_b": (4, 32)}, FormatError, f"{K0}.lora_a"),
        ({f"{K0}.lora_a": (64, 4), f"{K0}.lora_b": (4, 0)}, FormatError, f"{K0}.lora_b"),
        ({f"{K0}.lora_a": (2, 4, 64), f"{K0}.lora_b": (4, 32)}, FormatError, f"{K0}.lora_a"),
        ({f"{K0}.lora_a": (2, 4, 64), f"{K0}.lora_b": (3, 32, 4)}, FormatError, f"{K0}.lora_a"),
        ({f"{K0}.lora_a": (2, 64, 4), f"{K0}.lora_b": (2, 32, 4)}, FormatError, f"{K0}.lora_a"),
        ({f"{K0}.lora_a": (9, 64), f"{K0}.lora_b": (2, 32, 4)}, FormatError, f"{K0}.lora_a"),
        ({f"{K0}.lora_a": (64,), f"{K0}.lora_b": (2, 32, 4)}, FormatError, f"{K0}.lora_a"),
        ({f"{K0}.lora_a": (2, 5, 64), f"{K0}.lora_b": (2, 32, 5)}, FormatError, f"{K0}.lora_a"),
        ({f"{K0}.lora_a": (4097, 4, 1), f"{K0}.lora_b": (4097, 1, 4)}, FormatError, f"{K0}.lora_b"),
        ({f"language_model.{Q0}.{half}": PAIR[f"{Q0}.{half}"] for half in ("lora_a", "lora_b")}, FormatError, None),
    ],
)
def test_more_or_less_than_pairs_is_refused(
    shapes: dict[str, tuple[int, ...]], error: type[InputError], tensor: str | None, tmp_path: Path
) -> None:
    whole = {**PAIR, **shapes} if shapes else {}
    path = save(tmp_path, {name: torch.zeros(shape) for name, shape in whole.items()})
    with pytest.raises(error) as caught:
        open_mlx(path)
    assert caught.value.file == str(path / "adapters.safetensors")
    assert tensor in (None, caught.value.tensor)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({**SETTINGS, "fine_tune_type": "dora"}, UnsupportedError, "nearest pairs"),
        ({**SETTINGS, "fine_tune_type": "full"}, UnsupportedError, "whole trained tensors"),
        ({**SETTINGS, "fine_tune_type": ["lora"]}, UnsupportedError, "fine_tune_type is"),
        ({"lora_layers": 16, "use_dora": True, "lora_parameters": {"scale": 1.0}}, UnsupportedError, "DoRA"),
        ({}, FormatError, "no lora_parameters"),
        ({**SETTINGS, "lora_parameters": [4, 20.0]}, FormatError, "no lora_parameters"),
        ({**SETTINGS, "peft_type": "LORA"}, FormatError, "PEFT's configuration"),
        (with_parameters(rank=4, scale=float("nan")), FormatError, "scale is nan"),
        (with_parameters(rank=4, scale=float("inf")), FormatError, "scale is inf"),
        (with_parameters(rank=4, scale="20"), FormatError, "scale is '20'"),
        (with_parameters(rank=4, scale=None), FormatError, "scale is None"),
        (with_parameters(rank=4, scale=True), FormatError, "scale is True"),
        (with_parameters(rank=0, scale=1.0), FormatError, "rank is 0"),
        (with_parameters(rank=4.0, scale=1.0), FormatError, "rank is 4.0"),
        (with_parameters(rank=8, scale=1.0), FormatError, "says 8"),
        (with_parameters(rank=4, alpha=16), FormatError, "alpha and no scale"),
        ({"lora_layers": 1, "lora_parameters": {"alpha": 16, "scale": 1.0}}, FormatError, "alpha and no rank"),
    ],
)
def test_configurations_that_are_refused(
    settings: dict[str, Any], error: type[InputError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        open_mlx(save(tmp_path, halves(MODULES), settings))


def test_parts_that_are_missing(tmp_path: Path) -> None:
    path = save(tmp_path, halves(MODULES))
    (path / "adapters.safetensors").rename(path / "0000100_adapters.safetensors")
    assert not is_mlx(path)
    with pytest.raises(FileMissingError):
        open_mlx(path)
    (path / "adapter_config.json").unlink()
    with pytest.raises(FileMissingError, match="configuration"):
        open_mlx(path)
    with pytest.raises(FileMissingError):
        open_mlx(tmp_path / "nowhere")


def test_a_directory_is_told_by_its_weights(tmp_path: Path) -> None:
    path = save(tmp_path, halves(MODULES))
    (path / "0000100_adapters.safetensors").write_bytes(b"a checkpoint that nobody reads")
    assert is_mlx(path)
    assert not is_mlx(tmp_path)
    assert not is_mlx(path / "adapters.safetensors")
    assert set(open_mlx(path).pairs) == set(MODULES)


def test_the_fingerprint_sees_the_configuration_and_the_tensors(tmp_path: Path) -> None:
    tensors = halves(MODULES)
    first = open_mlx(save(tmp_path / "a", tensors)).fingerprint()
    assert first == open_mlx(save(tmp_path / "b", tensors)).fingerprint()
    assert first != open_mlx(save(tmp_path / "c", tensors, with_parameters(rank=4, scale=19.0))).fingerprint()
    tensors[f"{Q0}.lora_b"][0, 0] += 1
    assert first != open_mlx(save(tmp_path / "d", tensors)).fingerprint()


def test_mlx_writes_null_for_metadata(tmp_path: Path) -> None:
    """The head of a file by mlx 0.32's save_safetensors, which mlx_lm.lora calls without metadata."""
    path = save(tmp_path, halves(MODULES))
    header = b'{"__metadata__":null,"head.lora_a":{"data_offsets":[32,64],"dtype":"F32","shape":[2,4]},'
    header += b'"head.lora_b":{"data_offsets":[0,32],"dtype":"F32","shape":[4,2]}}'
    data = torch.arange(16.0).numpy().tobytes()
    (path / "adapters.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    a, b = open_mlx(path).load("head")
    assert torch.equal(b, torch.arange(8.0).reshape(4, 2).T)
    assert torch.equal(a, torch.arange(8.0, 16.0).reshape(2, 4).T)


@pytest.mark.conformance
def test_as_mlx_lm_fuses(tmp_path: Path) -> None:
    """mlx-lm makes the layers, saves them and fuses them into weights of zero, so that the delta is what remains."""
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    layers = save_by_mlx_lm(tmp_path / "adapter", {"rank": 3, "scale": 7.5, "dropout": 0.0})
    adapter: MlxAdapter = open_mlx(tmp_path / "adapter")
    assert set(adapter.pairs) == set(layers)
    assert [name for name, pair in adapter.pairs.items() if pair.embedding] == [TABLE]
    for module, layer in layers.items():
        base = layer.embedding if module == TABLE else layer.linear
        base.weight = mx.zeros(base.weight.shape)
        expected = torch.tensor(layer.fuse().weight.tolist(), dtype=torch.float64)
        error = (delta(adapter, module) - expected).norm() / expected.norm()
        assert error < 1e-6, module  # mlx computes in float32


@pytest.mark.conformance
def test_as_mlx_lm_fuses_experts(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.tuner.lora import LoRASwitchLinear

    layer = LoRASwitchLinear.from_base(SwitchLinear(64, 96, 5), r=4, scale=20.0)
    layer.linear.weight = mx.zeros(layer.linear.weight.shape)
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    directory = save(tmp_path, {})
    tensors = {f"{GATE}.lora_a": layer.lora_a, f"{GATE}.lora_b": layer.lora_b}
    mx.save_safetensors(str(directory / "adapters.safetensors"), tensors)
    adapter = open_mlx(directory)
    expected = torch.tensor(layer.fuse().weight.tolist(), dtype=torch.float64)
    found = torch.stack([delta(adapter, f"{GATE}[{expert}]") for expert in range(5)])
    assert (found - expected).norm() / expected.norm() < 1e-6


def save_by_mlx_lm(directory: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """A small adapted llama's LoRA layers by name, after saving them as mlx_lm.lora does."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 11, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    model = llama.Model(llama.ModelArgs(model_type="llama", **sizes, **more))
    model.freeze()
    keys = ["self_attn.k_proj", "mlp.down_proj", "model.embed_tokens", "lm_head"]
    linear_to_lora_layers(model, 2, {**parameters, "keys": keys})
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_b")}
    for seed, layer in enumerate(layers.values()):
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(seed))
    directory.mkdir()
    mx.save_safetensors(str(directory / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "tiny"}
    save_config(settings, directory / "adapter_config.json")
    return layers

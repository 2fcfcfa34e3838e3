"""What merging does to every tensor, in whatever layouts model and adapters are.

Oracles: PEFT's and mlx-lm's formulas in float64 (scaling * B @ A, its transpose for a table, m / ||.|| for DoRA);
llama.cpp's order of rows and the gguf package's names for GGUF files; the model's own bytes where nothing is to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import models
import numpy as np
import pytest
import torch
from gguf_models import adapter_writer, finish, put, write_gguf_adapter, write_gguf_model
from merging_cases import (
    HEAD,
    PREFIX,
    SETTINGS,
    SIZES,
    assert_is,
    checkpoint,
    delta,
    dora_adapter,
    in_llama_cpp,
    merged,
    noise,
    plan,
    with_pairs,
    with_whole,
)

from converters.changed_model import ChangedModel
from converters.errors import Error, FormatError, MismatchError, UnsupportedError, UsageError
from converters.opening import open_adapter, open_model
from safelora_gguf.merging.edits import plan_merge


@pytest.mark.parametrize("into", ["safetensors", "gguf"])
@pytest.mark.parametrize("kind", ["peft", "gguf"])
def test_every_pair_of_formats(into: str, kind: str, tmp_path: Path) -> None:
    model, before = checkpoint(tmp_path / "model")
    pairs = models.pairs({**SIZES.modules(), HEAD: (SIZES.vocab, SIZES.hidden)}, 3)
    adapter = models.save_adapter(tmp_path / "adapter", pairs, models.adapter_config())
    if kind == "gguf":
        adapter = write_gguf_adapter(tmp_path / "adapter.gguf", pairs, SETTINGS)
    wanted = with_pairs(before, pairs)
    if into == "gguf":
        model = write_gguf_model(tmp_path / "model.gguf", before, SETTINGS)
        wanted = in_llama_cpp(wanted)
    assert_is(merged(model, (adapter, 1.0)), wanted)


def test_deltas_of_several_adapters_add_up(tmp_path: Path) -> None:
    model, before = checkpoint(tmp_path / "model")
    some = dict(list(SIZES.modules().items())[3:9])
    first, second = models.pairs(SIZES.modules(), 3), models.pairs(some, 4, r=2)
    one = models.save_adapter(tmp_path / "one", first, models.adapter_config())
    two = models.save_adapter(tmp_path / "two", second, models.adapter_config(r=2, alpha=3))
    gguf_two = write_gguf_adapter(tmp_path / "two.gguf", second, SETTINGS, alpha=3.0)
    wanted = with_pairs(with_pairs(before, first, 0.25), second, -1.5, 3 / 2)
    assert_is(merged(model, (one, 0.25), (two, -1.5)), wanted)
    assert_is(merged(model, (one, 0.25), (gguf_two, -1.5)), wanted)
    found = plan(model, (one, 0.25), (two, -1.5))
    assert set(found.adapters.values()) == {(0,), (0, 1)}


def test_a_scale_of_zero_is_nothing(tmp_path: Path) -> None:
    model, _ = checkpoint(tmp_path / "model")
    adapter = models.save_adapter(tmp_path / "adapter", models.pairs(SIZES.modules(), 3), models.adapter_config())
    found = plan(model, (adapter, 0.0))
    assert not found.edits.changes
    assert found.notes == (f"{adapter}: its scale is 0, and nothing of it is merged",)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e9])
def test_scales_that_are_none(scale: float, tmp_path: Path) -> None:
    model, _ = checkpoint(tmp_path / "model")
    adapter = models.save_adapter(tmp_path / "adapter", models.pairs(SIZES.modules(), 3), models.adapter_config())
    with pytest.raises(UsageError, match="scale"):
        plan(model, (adapter, scale))


@pytest.mark.parametrize("into", ["safetensors", "gguf"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_dora_with_a_scale(scale: float, into: str, tmp_path: Path) -> None:
    """All of its delta, lengths included: W + scale * (m / ||W + sBA|| (W + sBA) - W)."""
    model, before = checkpoint(tmp_path / "model")
    pairs = models.pairs(SIZES.modules(), 3)
    lengths = {module: 1 + noise(shape[0]) for module, shape in SIZES.modules().items()}
    adapter = dora_adapter(tmp_path / "adapter", pairs, lengths)
    wanted = {name: tensor.double() for name, tensor in before.items()}
    for module, m in lengths.items():
        weight = wanted[f"{module}.weight"]
        directed = weight + delta(pairs, module)
        whole = (m.double() / directed.norm(dim=1))[:, None] * directed
        wanted[f"{module}.weight"] = weight + scale * (whole - weight)
    if into == "gguf":
        model, wanted = write_gguf_model(tmp_path / "model.gguf", before, SETTINGS), in_llama_cpp(wanted)
    assert_is(merged(model, (adapter, scale)), wanted)


def test_rows_come_in_any_order_and_again(tmp_path: Path) -> None:
    """Whoever writes asks once and in order; a step that follows may not."""
    model, _ = checkpoint(tmp_path / "model")
    pairs = models.pairs(SIZES.modules(), 3)
    lengths = {module: 1 + noise(shape[0]) for module, shape in SIZES.modules().items()}
    adapter = dora_adapter(tmp_path / "adapter", pairs, lengths)
    rows = plan(model, (adapter, 1.0)).rows["model.layers.0.mlp.up_proj.weight"]
    whole = rows(0, SIZES.ffn)
    torch.testing.assert_close(torch.cat([rows(start, start + 8) for start in range(0, SIZES.ffn, 8)]), whole)
    torch.testing.assert_close(rows(40, 50), whole[40:50])
    torch.testing.assert_close(rows(3, 4), whole[3:4])


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_whole_tensor_with_a_scale(scale: float, tmp_path: Path) -> None:
    model, before = checkpoint(tmp_path / "model")
    new = noise(SIZES.hidden)
    adapter = with_whole(tmp_path / "adapter", {"model.norm.weight": new}, modules_to_save=["norm"])
    found = merged(model, (adapter, scale))["model.norm.weight"]
    old = before["model.norm.weight"].double()
    torch.testing.assert_close(found, old + scale * (new.double() - old), rtol=1e-6, atol=1e-7)


def test_two_adapters_that_hold_the_same_tensor(tmp_path: Path) -> None:
    model, _ = checkpoint(tmp_path / "model")
    first, second = noise(SIZES.hidden), noise(SIZES.hidden, seed=8)
    one, same, other = (
        with_whole(tmp_path / name, {"model.norm.weight": values}, modules_to_save=["norm"], lora_alpha=alpha)
        for name, values, alpha in (("one", first, 8), ("same", first, 16), ("other", second, 8))
    )
    with pytest.raises(MismatchError, match=r"both hold whole values of model\.norm\.weight"):
        plan(model, (one, 1.0), (other, 1.0))
    with pytest.raises(MismatchError, match="both hold"):
        plan(model, (one, 1.0), (same, 0.5))
    found = merged(model, (one, 1.0), (same, 1.0))
    torch.testing.assert_close(found["model.norm.weight"], first.double(), rtol=1e-6, atol=1e-7)
    (note,) = plan(model, (one, 1.0), (same, 1.0)).notes
    assert "hold the same values of model.norm.weight: they count once" in note


def test_an_adapter_that_is_named_twice_counts_twice(tmp_path: Path) -> None:
    """W + sum of scale * (W' - W), of whole values as of pairs."""
    model, before = checkpoint(tmp_path / "model")
    new = noise(SIZES.hidden)
    adapter = with_whole(tmp_path / "adapter", {"model.norm.weight": new}, modules_to_save=["norm"])
    found, once = (merged(model, *(((adapter, 1.0), (adapter, 0.5))[:count])) for count in (2, 1))
    for name, old in before.items():
        wanted = old.double() + 1.5 * (once[name] - old.double())
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6, msg=name)
    assert not plan(model, (adapter, 1.0), (adapter, 0.5)).notes


def test_refused_adapters(tmp_path: Path) -> None:
    model, _ = checkpoint(tmp_path / "model")
    pairs = models.pairs(SIZES.modules(), 3)
    invoked = models.save_adapter(tmp_path / "a", pairs, models.adapter_config(alora_invocation_tokens=[1, 2]))
    other = models.save_adapter(tmp_path / "b", models.pairs(models.Sizes(ffn=128).modules(), 3),
                                models.adapter_config())  # fmt: skip
    deep = models.save_adapter(tmp_path / "c", models.pairs(models.Sizes(layers=5).modules(), 3),
                               models.adapter_config())  # fmt: skip
    first, values = next(iter(pairs.items()))
    broken = models.save_adapter(tmp_path / "d", {**pairs, first: values * torch.nan}, models.adapter_config())
    foreign = write_gguf_adapter(tmp_path / "e.gguf", pairs, models.config(SIZES, "Qwen2ForCausalLM"))
    cases: Sequence[tuple[Path, type[Error], str]] = (
        (invoked, UnsupportedError, "is an aLoRA"),
        (other, MismatchError, "for another model"),
        (deep, MismatchError, "have no weight"),
        (foreign, MismatchError, "architecture qwen2"),
    )
    for adapter, kind, told in cases:
        with pytest.raises(kind, match=told):
            plan(model, (adapter, 1.0))
    with pytest.raises(FormatError, match="NaN or Inf"):
        merged(model, (broken, 1.0))


def test_an_unknown_architecture_needs_no_table(tmp_path: Path) -> None:
    """GGUF into GGUF, by names alone."""
    weight, a, b = noise(32, 16), noise(4, 16, seed=8), noise(32, 4, seed=9)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "plamo")
    put(writer, "blk.0.attn_q.weight", weight.numpy())
    put(writer, "blk.0.attn_norm.weight", np.ones(16, np.float32))
    finish(writer)
    writer = adapter_writer(tmp_path / "adapter.gguf", "plamo")
    put(writer, "blk.0.attn_q.weight.lora_a", a.numpy())
    put(writer, "blk.0.attn_q.weight.lora_b", b.numpy())
    finish(writer)
    found = merged(tmp_path / "model.gguf", (tmp_path / "adapter.gguf", 1.0))
    wanted = weight.double() + 8 / 4 * b.double() @ a.double()
    torch.testing.assert_close(found["blk.0.attn_q.weight"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_with_queries_keys_and_values_in_one(dora: bool, tmp_path: Path) -> None:
    """As llama.cpp's converter stacks them with --fuse-qkv: torch.cat([q, k, v])."""
    before = models.weights(SIZES, 1)
    modules = {name: shape for name, shape in SIZES.modules().items() if "layers.0.self_attn" in name}
    pairs = models.pairs(modules, 3)
    adapter = models.save_adapter(tmp_path / "adapter", pairs, models.adapter_config())
    wanted = with_pairs(before, pairs)
    if dora:
        lengths = {module: 1 + noise(shape[0]) for module, shape in modules.items()}
        adapter = dora_adapter(tmp_path / "dora", pairs, lengths)
        for module, m in lengths.items():
            directed = wanted[f"{module}.weight"]
            wanted[f"{module}.weight"] = (m.double() / directed.norm(dim=1))[:, None] * directed
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_head_count(SIZES.heads)
    writer.add_head_count_kv(SIZES.kv_heads)
    parts, fused = in_llama_cpp({name: tensor.double() for name, tensor in before.items()}), "blk.0.attn_qkv.weight"
    put(writer, fused, torch.cat([parts[f"blk.0.attn_{kind}.weight"] for kind in "qkv"]).numpy())
    put(writer, "blk.0.attn_output.weight", parts["blk.0.attn_output.weight"].numpy())
    finish(writer)
    after = in_llama_cpp(wanted)
    found = merged(tmp_path / "model.gguf", (adapter, 1.0))
    whole = torch.cat([after[f"blk.0.attn_{kind}.weight"] for kind in "qkv"])
    torch.testing.assert_close(found[fused], whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["blk.0.attn_output.weight"], after["blk.0.attn_output.weight"], rtol=1e-5,
                               atol=1e-6)  # fmt: skip


def test_a_model_with_gate_and_up_of_its_experts_in_one(tmp_path: Path) -> None:
    """As llama.cpp's converter stacks them with --fuse-gate-up-exps: torch.cat([gate, up], dim=1)."""
    experts, inner, width, rank = 3, 8, 16, 2
    weight = noise(experts, 2 * inner, width)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    put(writer, "blk.0.ffn_gate_up_exps.weight", weight.numpy())
    finish(writer)
    writer, deltas = adapter_writer(tmp_path / "adapter.gguf", "qwen3moe"), []
    for seed, kind in enumerate(("gate", "up")):
        a, b = noise(experts, rank, width, seed=seed), noise(experts, inner, rank, seed=seed + 5)
        put(writer, f"blk.0.ffn_{kind}_exps.weight.lora_a", a.numpy())
        put(writer, f"blk.0.ffn_{kind}_exps.weight.lora_b", b.numpy())
        deltas.append(8 / rank * b.double() @ a.double())
    finish(writer)
    found = merged(tmp_path / "model.gguf", (tmp_path / "adapter.gguf", 1.0))["blk.0.ffn_gate_up_exps.weight"]
    torch.testing.assert_close(found, weight.double() + torch.cat(deltas, dim=1), rtol=1e-5, atol=1e-6)


def biased(path: Path, module: str) -> Path:
    pairs = models.pairs({module: SIZES.modules()[module]}, 3)
    bias = {f"{PREFIX}{module}.lora_B.bias": noise(SIZES.modules()[module][0])}
    return models.save_adapter(path, {**pairs, **bias}, models.adapter_config(lora_bias=True))


def test_biases_that_the_model_has_not(tmp_path: Path) -> None:
    """They get a tensor, and config.json the key without which transformers ignores it; where no key is, a refusal."""
    tensors, module = models.weights(SIZES, 1), "model.layers.0.mlp.up_proj"
    adapter = biased(tmp_path / "adapter", module)
    llama = models.save_model(tmp_path / "llama", tensors, SETTINGS)
    found = plan(llama, (adapter, 1.0))
    assert found.edits.config == {"mlp_bias": True}
    change = found.edits.changes[f"{module}.bias"]
    assert (change.shape, change.after) == ((SIZES.ffn,), f"{module}.weight")
    mistral = models.save_model(tmp_path / "mistral", tensors, models.config(SIZES, "MistralForCausalLM"))
    with pytest.raises(UnsupportedError, match=f"MistralForCausalLM has no place for new biases: {module}"):
        plan(mistral, (adapter, 1.0))
    qwen = write_gguf_model(tmp_path / "qwen.gguf", tensors, models.config(SIZES, "Qwen2ForCausalLM"))
    with pytest.raises(UnsupportedError, match=r"qwen2 has no place for new biases: blk\.0\.ffn_up\.bias"):
        plan(qwen, (adapter, 1.0))
    queries = biased(tmp_path / "queries", "model.layers.0.self_attn.q_proj")
    assert "blk.0.attn_q.bias" in plan(qwen, (queries, 1.0)).edits.changes


def test_a_step_after_another_needs_no_file_between(tmp_path: Path) -> None:
    """The second is merged into what the first has made, all in one."""
    model, before = checkpoint(tmp_path / "model")
    first, second = models.pairs(SIZES.modules(), 3), models.pairs(SIZES.modules(), 4)
    one = models.save_adapter(tmp_path / "one", first, models.adapter_config())
    lengths = {module: 1 + noise(shape[0]) for module, shape in SIZES.modules().items()}
    two = dora_adapter(tmp_path / "two", second, lengths)
    made = ChangedModel(open_model(model), plan(model, (one, 1.0)).edits)
    found = ChangedModel(made, plan_merge(made, [(open_adapter(two, dora=True), 1.0)], torch.device("cpu")).edits)
    wanted = with_pairs(before, first)
    for module, m in lengths.items():
        directed = wanted[f"{module}.weight"] + delta(second, module)
        wanted[f"{module}.weight"] = (m.double() / directed.norm(dim=1))[:, None] * directed
    assert_is({name: found.load(name).double() for name in found.infos}, wanted)

"""Mixtures of experts. Oracles: upstream's converters, bit by bit; PEFT's deltas and logits; llama.cpp's logits.

Upstream takes adapters that have every expert as a module, of transformers 4 that is. For today's, which have one
parameter for all (`target_parameters`), and for adapters with some of the experts, the oracle is PEFT's own delta,
brought into llama.cpp's order by `mixture_side.in_gguf`, which upstream's models hold against the truth.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import peft_side
from conformance.families import Family, Logits, Upstream, convert_upstream_each
from conformance.gguf_side import deltas, facts, tensors
from conformance.mixture_side import (
    SOME,
    adapted_weights,
    matrices,
    module_deltas,
    peft_deltas,
    projected_deltas,
    rank_of,
    save_by_module,
    save_mlx,
    some_experts,
    worst,
)
from conformance.specs import MIXTURES
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from converters.bridge import Bridge
from converters.converted_model import ConvertedModel
from converters.layouts import table_of
from converters.opening import open_model
from safelora_gguf import Selection, convert_adapter, project_adapter

pytestmark = pytest.mark.conformance

FROM_MODULES = ("by_module", "f32"), ("by_module", "f16")
BY_EXPERT = ("mixtral", "qwen2moe", "qwen3moe", "deepseek2", "deepseek3")  # on disk, and in transformers 4
EXACT = 1e-6
LOGITS_BOUND = 1e-3  # see test_logits
KINDS = [(architecture, kind) for architecture in MIXTURES for kind in peft_side.kinds_of(architecture)]
RUNNING = [(architecture, kind) for architecture, kind in KINDS if architecture != "deepseek2-lite"]


@pytest.fixture(scope="module")
def mixture_of(family_of: Callable[[str], Family]) -> Callable[[str], Family]:
    """Families with the adapters by module beside PEFT's."""
    made: dict[str, Family] = {}

    def make(architecture: str) -> Family:
        if architecture not in made:
            family = family_of(architecture)
            extra = {"by_module": save_by_module(family, family.root / "by_module")}
            if architecture in BY_EXPERT:
                extra["some"] = save_by_module(family, family.root / "some", some_experts, rank_of, **SOME)
            made[architecture] = replace(family, adapters={**family.adapters, **extra})
        return made[architecture]

    return make


@pytest.fixture(params=list(MIXTURES))
def mixture(request: pytest.FixtureRequest, mixture_of: Callable[[str], Family]) -> Family:
    return mixture_of(request.param)


@pytest.fixture(scope="module")
def upstreams(llama_cpp_sources: Path, mixture_of: Callable[[str], Family]) -> Mapping[str, Upstream]:
    families = [mixture_of(architecture) for architecture in MIXTURES]
    return convert_upstream_each(families, llama_cpp_sources, (*FROM_MODULES, ("plain", "f32"), ("some", "f32")))


def convert(family: Family, adapter: Path, out: Path, outtype: str = "f32") -> Path:
    convert_adapter(adapter, out, base=family.aligned, outtype=outtype)
    return out


def converted(family: Family, kind: str) -> Path:
    """One of the family's adapters in GGUF, made once."""
    target = family.root / f"converted-{kind}.gguf"
    return target if target.exists() else convert(family, family.adapters[kind], target)


def test_where_parameters_go(mixture: Family, upstreams: Mapping[str, Upstream]) -> None:
    """`in_gguf`, on which what follows is built, against upstream's model."""
    theirs = {tensor.name: tensor.data for tensor in GGUFReader(upstreams[mixture.architecture].model).tensors}
    names = [name for name in theirs if name.endswith(".weight") and name.startswith("blk.")
             and theirs[name].ndim > 1 and "attn_k_b" not in name and "attn_v_b" not in name]  # fmt: skip
    ours = adapted_weights(mixture.architecture, mixture.aligned, names)
    assert [name for name in names if not np.array_equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("fused", [False, True])
def test_models(fused: bool, mixture: Family, upstreams: Mapping[str, Upstream], tmp_path: Path) -> None:
    """The table's names and values for a whole checkpoint are upstream's, in both forms that transformers 5 writes."""
    upstream = upstreams[mixture.architecture]
    assert "aligned" not in upstream.failures
    directory = mixture.aligned
    if fused:
        directory = tmp_path / "fused"
        peft_side.load_model(mixture.aligned).save_pretrained(directory, save_original_format=False)
    checkpoint = open_model(directory)
    ours = ConvertedModel(checkpoint, Bridge.of(table_of(checkpoint, ""), checkpoint))
    theirs = {tensor.name: tensor.data for tensor in GGUFReader(upstream.model).tensors}
    assert {name: info.shape for name, info in ours.infos.items()} == {name: theirs[name].shape for name in theirs}
    assert [name for name in theirs if not np.array_equal(ours.load(name).numpy(), theirs[name])] == []


@pytest.mark.parametrize("outtype", ["f32", "f16"])
def test_adapters_by_module(outtype: str, mixture: Family, upstreams: Mapping[str, Upstream], tmp_path: Path) -> None:
    """All experts, routers, shared experts and attention."""
    upstream = upstreams[mixture.architecture]
    assert f"upstream-by_module-{outtype}" not in upstream.failures
    ours = convert(mixture, mixture.adapters["by_module"], tmp_path / "ours.gguf", outtype)
    theirs = upstream.adapters["by_module", outtype]
    assert tensors(ours) == tensors(theirs)
    assert facts(ours) == facts(theirs)


def test_upstream_fails_on_parameters(mixture: Family, upstreams: Mapping[str, Upstream]) -> None:
    """The reason why these have another oracle below; should upstream learn it, they join the adapters by module."""
    assert "upstream-plain-f32" in upstreams[mixture.architecture].failures


@pytest.mark.parametrize(("architecture", "kind"), KINDS)
def test_deltas(architecture: str, kind: str, mixture_of: Callable[[str], Family]) -> None:
    """What llama.cpp adds to every expert's matrices is PEFT's delta."""
    mixture = mixture_of(architecture)
    assert worst(deltas(converted(mixture, kind)), peft_deltas(mixture, mixture.adapters[kind])) < EXACT


def test_one_parameter_of_two(mixture_of: Callable[[str], Family], tmp_path: Path) -> None:
    """Without the other one PEFT nests nothing, and the one has the name that the second of both would have."""
    mixture = mixture_of("qwen3moe")
    for parameter, names in (("down_proj", {"ffn_down_exps"}), ("gate_up_proj", {"ffn_gate_exps", "ffn_up_exps"})):
        options = {"target_modules": [], "target_parameters": [f"experts.{parameter}"]}
        adapter = peft_side.save_adapter(mixture.aligned, tmp_path / parameter, options)
        ours = deltas(convert(mixture, adapter, tmp_path / f"{parameter}.gguf"))
        assert {name.split(".")[2] for name in ours} == names
        assert worst(ours, peft_deltas(mixture, adapter)) < EXACT
        back = convert(mixture, tmp_path / f"{parameter}.gguf", tmp_path / f"{parameter}-again")
        assert worst(peft_deltas(mixture, back), ours) < EXACT


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3moe"])
def test_peft_reads_adapters_by_module_alike(
    architecture: str, mixture_of: Callable[[str], Family], tmp_path: Path
) -> None:
    """PEFT's own way from transformers 4 to 5, which ends in `target_parameters`."""
    mixture = mixture_of(architecture)
    adapter = save_by_module(mixture, tmp_path / "experts", lambda module: ".experts." in module)
    assert worst(deltas(convert(mixture, adapter, tmp_path / "ours.gguf")), peft_deltas(mixture, adapter)) < EXACT


@pytest.mark.parametrize("architecture", BY_EXPERT)
def test_some_experts(
    architecture: str, mixture_of: Callable[[str], Family], upstreams: Mapping[str, Upstream]
) -> None:
    """Two of four experts with ranks of their own, without up's: upstream ends, ours has zeros for the others."""
    mixture = mixture_of(architecture)
    assert "Unprocessed experts" in upstreams[architecture].failures["upstream-some-f32"]
    found, expected = deltas(converted(mixture, "some")), module_deltas(mixture, mixture.adapters["some"])
    assert {name.split(".")[2] for name in found} == {"ffn_gate_exps", "ffn_down_exps"}
    assert all(stack[1].any() and stack[3].any() and not stack[[0, 2]].any() for stack in expected.values())
    assert worst(found, expected) < EXACT


@pytest.mark.parametrize(
    ("architecture", "written"),
    # Where a parameter has as many rows as columns, only the version tells: 0.17 wrote none.
    [("qwen3moe", ("0.21.2", 2 * 40)), ("deepseek2-lite", ("0.18.1", 64)), ("deepseek2-lite", (None, 64))],
)
def test_older_versions_of_peft_took_outputs_for_inputs(
    architecture: str,
    written: tuple[str | None, int],
    mixture_of: Callable[[str], Family],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Before PEFT asked a model for `is_transposed` it took every stack to be (experts, in, out): then A, for what
    comes in, has a column for each output."""
    mixture, load_model = mixture_of(architecture), peft_side.load_model

    def load(path: Path) -> Any:
        model = load_model(path)
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.is_transposed = True
        return model

    monkeypatch.setattr(peft_side, "load_model", load)
    options = peft_side.kinds_of(architecture)["rank_pattern" if architecture == "qwen3moe" else "plain"]
    adapter = peft_side.save_adapter(mixture.aligned, tmp_path / "old", options)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_version": written[0]}))
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"
    assert load_file(adapter / "adapter_model.safetensors")[key].shape[1] == written[1]
    assert worst(deltas(convert(mixture, adapter, tmp_path / "ours.gguf")), peft_deltas(mixture, adapter)) < EXACT


@pytest.mark.llama
@pytest.mark.parametrize(("architecture", "kind"), RUNNING)
def test_logits(
    architecture: str,
    kind: str,
    mixture_of: Callable[[str], Family],
    upstreams: Mapping[str, Upstream],
    llama_logits: Logits,
) -> None:
    """llama.cpp with our adapter against PEFT's forward pass, measured under 4e-5. The experts chosen are the same, or
    logits would jump."""
    mixture, model = mixture_of(architecture), upstreams[architecture].model
    alone = peft_side.logits_of(peft_side.load_model(mixture.aligned))
    assert np.abs(llama_logits(model, None) - alone).max() < LOGITS_BOUND
    truth = peft_side.logits_of(peft_side.load_adapted(mixture.aligned, mixture.adapters[kind]))
    assert np.abs(truth - alone).max() > 1, "the adapter hardly moves the logits, so nothing would be proved"
    ours = converted(mixture, kind)
    assert np.abs(llama_logits(model, ours) - truth).max() < LOGITS_BOUND


LATENT = {
    "q_a_proj": "attn_q_a",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
}


@pytest.mark.llama
@pytest.mark.parametrize("module", LATENT)
def test_what_llama_cpp_leaves_out_is_reported(
    module: str,
    mixture_of: Callable[[str], Family],
    upstreams: Mapping[str, Upstream],
    llama_logits: Logits,
    tmp_path: Path,
) -> None:
    """DeepSeek's attention: where llama.cpp's logits stay as they are, the report says so, and only there."""
    mixture, model = mixture_of("deepseek2"), upstreams["deepseek2"].model
    adapter = save_by_module(mixture, tmp_path / "one", lambda name: name.endswith(f".{module}"))
    report = convert_adapter(adapter, tmp_path / "ours.gguf", base=mixture.aligned)
    moved = np.abs(llama_logits(model, tmp_path / "ours.gguf") - llama_logits(model, None)).max()
    assert any(f"does not apply the pairs on {LATENT[module]} " in loss for loss in report.losses) == (moved == 0)
    assert moved == 0 or moved > 0.1


def test_latent_keys_and_values_are_left_out_and_reported(mixture_of: Callable[[str], Family], tmp_path: Path) -> None:
    """kv_b_proj's pairs, which upstream ends at and llama.cpp has no use for."""
    mixture = mixture_of("deepseek3")
    adapter = tmp_path / "with"
    shutil.copytree(mixture.adapters["by_module"], adapter)
    pairs = load_file(adapter / "adapter_model.safetensors")
    for half, shape in (("A", (4, 16)), ("B", (4 * (24 + 16), 4))):
        pairs[f"base_model.model.model.layers.1.self_attn.kv_b_proj.lora_{half}.weight"] = torch.ones(shape)
    save_file(pairs, adapter / "adapter_model.safetensors")
    report = convert_adapter(adapter, tmp_path / "ours.gguf", base=mixture.aligned)
    assert any("model.layers.1.self_attn.kv_b_proj" in loss and "merge" in loss for loss in report.losses)
    assert tensors(tmp_path / "ours.gguf") == tensors(converted(mixture, "by_module"))


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("mixtral", "plain"),
        ("qwen2moe", "plain"),
        ("granitemoe-shared", "plain"),
        ("gpt-oss", "plain"),
        ("deepseek3", "plain"),
        ("mixtral", "by_module"),
        ("qwen3moe", "by_module"),
        ("qwen3moe", "gguf"),
    ],
)
def test_projection(
    architecture: str,
    kind: str,
    mixture_of: Callable[[str], Family],
    upstreams: Mapping[str, Upstream],
    tmp_path: Path,
) -> None:
    """Into GGUF, with two checkpoints and with one and upstream's GGUF, and into a PEFT directory that PEFT loads."""
    mixture = mixture_of(architecture)
    adapter = converted(mixture, "plain") if kind == "gguf" else mixture.adapters[kind]
    truth = module_deltas(mixture, adapter) if kind == "by_module" else peft_deltas(mixture, mixture.adapters["plain"])
    threshold, expected = projected_deltas(mixture, truth)
    for place, aligned in (("ours.gguf", mixture.aligned), ("mixed.gguf", upstreams[architecture].model),
                           ("peft", mixture.aligned)):  # fmt: skip
        out, selection = tmp_path / place, Selection("threshold", threshold)
        report = project_adapter(mixture.base, aligned, adapter, out, selection=selection, device="cpu")
        assert (report.projected, report.total) == (matrices(truth) // 2, matrices(truth))
        assert worst(peft_deltas(mixture, out) if place == "peft" else deltas(out), expected) < 1e-5


def test_projection_of_gguf_alone(
    mixture_of: Callable[[str], Family], upstreams: Mapping[str, Upstream], llama_cpp_sources: Path, tmp_path: Path
) -> None:
    """No table has a part in it: stacks are taken apart by their shapes."""
    mixture = mixture_of("mixtral")
    before = replace(mixture, root=tmp_path, aligned=mixture.base, adapters={})
    base = convert_upstream_each([before], llama_cpp_sources)["mixtral"].model
    threshold, expected = projected_deltas(mixture, peft_deltas(mixture, mixture.adapters["plain"]))
    out, selection = tmp_path / "out.gguf", Selection("threshold", threshold)
    aligned, adapter = upstreams["mixtral"].model, converted(mixture, "plain")
    project_adapter(base, aligned, adapter, out, selection=selection, device="cpu")
    assert worst(deltas(out), expected) < 1e-5


@pytest.mark.parametrize("kind", ["plain", "by_module"])
def test_back_to_peft(kind: str, mixture: Family, upstreams: Mapping[str, Upstream], tmp_path: Path) -> None:
    """A GGUF adapter becomes a PEFT directory that PEFT loads: ours of one parameter for gate and up, upstream's of
    two modules."""
    source = upstreams[mixture.architecture].adapters["by_module", "f32"]
    if kind == "plain":
        source = converted(mixture, kind)
    out = convert(mixture, source, tmp_path / "peft")
    expected = deltas(source)
    assert worst(peft_deltas(mixture, out), expected) < EXACT
    assert worst(deltas(convert(mixture, out, tmp_path / "again.gguf")), expected) < EXACT


def test_some_experts_to_peft(mixture_of: Callable[[str], Family], tmp_path: Path) -> None:
    """PEFT's parameters are for all experts: the others' pairs are zeros."""
    mixture = mixture_of("qwen3moe")
    source = converted(mixture, "some")
    expected = deltas(source)
    for name in list(expected):
        if "ffn_gate" in name:  # one parameter with up's rows
            expected[name.replace("gate", "up")] = np.zeros_like(expected[name])
    assert worst(peft_deltas(mixture, convert(mixture, source, tmp_path / "peft")), expected) < EXACT


def test_mlx(mixture: Family, tmp_path: Path) -> None:
    """mlx-lm's formula; into GGUF, and into a PEFT directory."""
    expected = save_mlx(mixture, tmp_path / "mlx")
    source = convert(mixture, tmp_path / "mlx", tmp_path / "ours.gguf")
    assert worst(deltas(source), expected) < EXACT
    assert worst(peft_deltas(mixture, convert(mixture, source, tmp_path / "peft")), expected) < EXACT

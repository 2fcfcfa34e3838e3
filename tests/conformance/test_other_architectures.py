"""Every other class in the tables, on small models by transformers. Oracles: upstream's converters, bit by bit; PEFT.

Where upstream has no answer (it writes the base model in the place of a Mistral 3 adapter) the oracle is PEFT's own
delta with its rows in llama.cpp's order, written as a list of places.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from conformance import peft_side, reference
from conformance.families import NOTHING, Family, Upstream
from conformance.gguf_side import deltas, facts, rotary_rows, tensors, ungrouped_rows
from conformance.specs import COMMON, MORE, SPECS
from gguf import MODEL_ARCH_NAMES, GGUFReader, TensorNameMap, get_tensor_name_map
from safetensors.torch import load_file

from converters.architectures import KNOWN, HeadCounts, architecture_of
from converters.names import canonical
from safelora_gguf import Selection, project_adapter

pytestmark = pytest.mark.conformance

MISTRAL3 = ("mistral3", "ministral3")
PERMUTED = ("granite", "smollm3", *MISTRAL3)
CONVERTED = [architecture for architecture in MORE if architecture not in MISTRAL3]


@cache
def name_map(architecture: str) -> TensorNameMap:
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(kind, COMMON["num_hidden_layers"])


def config_of(family: Family) -> Mapping[str, Any]:
    config: Mapping[str, Any] = json.loads((family.aligned / "config.json").read_text())
    return config


def test_every_class_in_the_tables_is_tested() -> None:
    """But for older names of the same modules, which transformers doesn't make, and Mistral, which is Llama."""
    untested = {"MistralForCausalLM", "RWForCausalLM", "StableLMEpochForCausalLM"}
    classes = {name for architecture in KNOWN for name in architecture.classes}
    assert classes - untested == {spec.model for spec in SPECS.values()}


def test_models(other: Family, upstream_of_others: Mapping[str, Upstream]) -> None:
    """The table's names and values for a whole checkpoint are upstream's: no more, no fewer, and to the bit."""
    upstream = upstream_of_others[other.architecture]
    assert upstream.failures == {}
    config = config_of(other)
    table, heads = architecture_of(config["architectures"][0], ""), HeadCounts.from_config(config)
    ours = {}
    for name, tensor in load_file(other.aligned / "model.safetensors").items():
        module, _, ending = canonical(name).rpartition(".")
        places = table.to_gguf(module)
        ours |= {f"{place.name}.{ending}": place.rule.weight(tensor, heads).numpy() for place in places}
        assert places or "vision" in name or "multi_modal" in name, f"{name} has no place"
    theirs = {tensor.name: tensor.data for tensor in GGUFReader(upstream.model).tensors}
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("architecture", CONVERTED)
def test_adapters(
    architecture: str, family_of: Callable[[str], Family], upstream_of_others: Mapping[str, Upstream]
) -> None:
    upstream = upstream_of_others[architecture]
    assert upstream.failures == {}
    ours, theirs = family_of(architecture).convert("plain"), upstream.adapters["plain", "f32"]
    assert tensors(ours) == tensors(theirs)
    assert facts(ours) == facts(theirs)


@pytest.mark.parametrize("architecture", MISTRAL3)
def test_upstream_writes_the_model_for_a_mistral3_adapter(
    architecture: str, upstream_of_others: Mapping[str, Upstream]
) -> None:
    """The reason why these have another oracle below; should upstream learn it, they join CONVERTED."""
    fields = GGUFReader(upstream_of_others[architecture].adapters["plain", "f32"]).fields
    assert fields["general.type"].contents() == "model"


def rows(architecture: str, module: str, count: int) -> list[int]:
    """llama.cpp's order of a module's rows."""
    heads, key_value = COMMON["num_attention_heads"], COMMON["num_key_value_heads"]
    kind = module.rpartition(".")[2]
    if architecture in PERMUTED and kind in ("q_proj", "k_proj"):
        return rotary_rows(count, heads if kind == "q_proj" else key_value)
    if kind == "query_key_value":
        return ungrouped_rows(count, heads, 1 if architecture == "falcon-7b" else key_value)
    return list(range(count))


def test_deltas(other: Family) -> None:
    """What llama.cpp adds to each weight is PEFT's delta, under the gguf package's name."""
    ours = deltas(other.convert("plain"))
    model_class = config_of(other)["architectures"][0]
    table = architecture_of(model_class, "")
    names = name_map(table.name)
    layers = dict(peft_side.lora_layers(peft_side.load_adapted(other.aligned, other.adapters["plain"])))
    assert len(ours) == len(layers) == 2 * len(SPECS[other.architecture].targets)
    for module, layer in layers.items():
        truth = reference.float64(layer.get_delta_weight("default").detach())
        name = names.get_name(f"{canonical(module)}.weight", (".weight",))
        assert table.name_in(model_class, canonical(module)) == module
        assert reference.relative_error(ours[name], truth[rows(other.architecture, module, len(truth))]) < 1e-6, module


# One of each kind of row order and name: plain, fused, partly fused, permuted, regrouped.
@pytest.mark.parametrize("architecture", ["gemma3", "gemma3-vision", "mistral3", "phi3", "glm4", "granite", "falcon"])
def test_back_to_peft(architecture: str, family_of: Callable[[str], Family], tmp_path: Path) -> None:
    """A GGUF adapter becomes a PEFT directory that PEFT merges as it does the one that the adapter was made of."""
    family = family_of(architecture)
    out = tmp_path / "peft"
    project_adapter(family.base, family.aligned, family.convert("plain"), out, selection=NOTHING, device="cpu")
    merged = [
        peft.PeftModel.from_pretrained(peft_side.load_model(family.aligned).double(), adapter)
        .merge_and_unload()
        .state_dict()
        for adapter in (out, family.adapters["plain"])
    ]
    assert merged[0].keys() == merged[1].keys()
    for name in merged[0]:
        assert reference.relative_error(merged[0][name].numpy(), reference.float64(merged[1][name])) < 1e-6, name


@pytest.mark.parametrize("architecture", ["gemma3-vision", "phi3", "falcon"])
def test_mixed_references(
    architecture: str,
    family_of: Callable[[str], Family],
    upstream_of_others: Mapping[str, Upstream],
    tmp_path: Path,
) -> None:
    """A checkpoint as base and upstream's GGUF as aligned model: the projection is that from two checkpoints."""
    family = family_of(architecture)
    found = []
    for name, aligned in (("ours", family.aligned), ("theirs", upstream_of_others[architecture].model)):
        out = tmp_path / f"{name}.gguf"
        selection = Selection("number", 4)
        report = project_adapter(family.base, aligned, family.adapters["plain"], out, selection=selection, device="cpu")
        found.append({module.name: module.cosine for module in report.modules if module.projected})
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    ours, theirs = deltas(tmp_path / "ours.gguf"), deltas(tmp_path / "theirs.gguf")
    assert ours.keys() == theirs.keys()
    assert max(reference.relative_error(theirs[name], ours[name]) for name in ours) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": False, "multi_query": True},
        {"new_decoder_architecture": False, "multi_query": False},
    ],
)
def test_falcons_heads(options: Mapping[str, Any]) -> None:
    """Oracle: the attention layer that transformers builds from the same configuration."""
    import transformers

    config = transformers.FalconConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, **options)
    layer = transformers.models.falcon.modeling_falcon.FalconAttention(config, layer_idx=0)
    saved = json.loads(config.to_json_string())
    assert HeadCounts.from_config(saved) == HeadCounts(layer.num_heads, layer.num_kv_heads)


def test_heads_left_to_the_default() -> None:
    """Oracle: transformers' own default for a text_config that leaves its heads out, as Gemma 3 4B's does."""
    import transformers

    text = {"model_type": "gemma3_text", "hidden_size": 2560}
    full = transformers.Gemma3Config(text_config=text).text_config
    expected = HeadCounts(full.num_attention_heads, full.num_key_value_heads)
    assert HeadCounts.from_config({"model_type": "gemma3", "text_config": text}) == expected

"""Repaired adapters as files.

Oracle: PEFT's own delta of the directory that comes out. Where every input of a width is sent through one matrix M,
A' = A M, the delta of each adapted weight becomes delta M, whatever it is called and however it is split in GGUF.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conformance import peft_side
from conformance.families import Family, make_family
from repair_inputs import gguf_of
from safetensors.torch import load_file

from converters.errors import FormatError, UnsupportedError
from safelora_gguf.repair.inputs import RepairInputs, open_repair_inputs
from safelora_gguf.repair.writing import (
    NewA,
    RepairFacts,
    original_pairs,
    repaired_pairs,
    write_repaired,
)

FACTS = RepairFacts(2.0, 0.1, 2048, 9, 0.8, {"refusal_rate": 0.98, "over_refusal_rate": 0.0, "task_rate": None}, True)
KINDS = [("llama", "all_at_once"), ("qwen2", "plain"), ("phi3", "plain"), ("falcon", "plain"), ("qwen3moe", "plain"),
         ("mixtral", "rank_pattern"), ("gpt-oss", "plain"), ("granitemoe-shared", "plain")]  # fmt: skip


@pytest.fixture(scope="session")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    return cache(lambda architecture: make_family(architecture, tmp_path_factory.mktemp(architecture)))


@pytest.fixture(scope="session")
def inputs_of(
    family_of: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], RepairInputs]:
    place = tmp_path_factory.mktemp("models")
    model = cache(lambda architecture: gguf_of(family_of(architecture).aligned, place / f"{architecture}.gguf"))

    def opened(architecture: str, kind: str) -> RepairInputs:
        return open_repair_inputs(model(architecture), family_of(architecture).adapters[kind])

    return opened


@cache
def through(width: int) -> torch.Tensor:
    """What every input of this width is sent through."""
    generator = torch.Generator().manual_seed(width)
    return torch.eye(width) + 0.5 * torch.randn(width, width, generator=generator) / width**0.5


def sent_through(inputs: RepairInputs) -> NewA:
    def new_a(module: str) -> torch.Tensor:
        a = inputs.adapter.load(module)[0].float()
        return a @ through(a.shape[1])

    return new_a


def peft_deltas(family: Family, adapter: Path) -> Mapping[str, np.ndarray]:
    """By module: (..., out, in) as PEFT has it."""
    found = {}
    for name, layer in peft_side.lora_layers(peft_side.load_adapted(family.aligned, adapter).double()):
        found[name] = layer.get_delta_weight("default").detach().numpy()
    return found


@pytest.mark.conformance
@pytest.mark.parametrize(("architecture", "kind"), KINDS)
def test_a_peft_adapter_comes_back_as_its_own(
    architecture: str,
    kind: str,
    family_of: Callable[[str], Family],
    inputs_of: Callable[[str, str], RepairInputs],
    tmp_path: Path,
) -> None:
    family, inputs = family_of(architecture), inputs_of(architecture, kind)
    output = inputs.plan(tmp_path / "out", outtype="f32", to="peft", force=False)
    write_repaired(inputs, output, repaired_pairs(inputs, sent_through(inputs)), FACTS)
    before, after = (
        load_file(path / "adapter_model.safetensors") for path in (family.adapters[kind], tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.shape == after[key].shape
        if ".lora_B." in key:
            assert tensor.equal(after[key]), key
    assert (family.adapters[kind] / "adapter_config.json").read_bytes() == (
        tmp_path / "out" / "adapter_config.json"
    ).read_bytes()
    deltas = peft_deltas(family, tmp_path / "out")
    for name, delta in peft_deltas(family, family.adapters[kind]).items():
        rows_first = delta.swapaxes(-1, -2) if architecture == "gpt-oss" and ".experts." in name else delta
        found = deltas[name].swapaxes(-1, -2) if rows_first is not delta else deltas[name]
        expected = rows_first @ through(rows_first.shape[-1]).double().numpy()
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected), name


@pytest.mark.conformance
def test_a_gguf_adapter_of_a_mixture_becomes_one_of_peft(
    family_of: Callable[[str], Family], inputs_of: Callable[[str, str], RepairInputs], tmp_path: Path
) -> None:
    """Gate and up of every expert are one parameter there, of the same rank as long as they still have one A."""
    family, own = family_of("qwen3moe"), inputs_of("qwen3moe", "plain")
    whole = own.plan(tmp_path / "whole.gguf", outtype="f32", to=None, force=False)
    write_repaired(own, whole, original_pairs(own), dataclasses.replace(FACTS, mu=None))
    inputs = open_repair_inputs(own.model.path, tmp_path / "whole.gguf")
    output = inputs.plan(tmp_path / "out", outtype="f32", to="peft", force=False)
    write_repaired(inputs, output, repaired_pairs(inputs, sent_through(inputs)), FACTS)
    deltas = peft_deltas(family, tmp_path / "out")
    for name, delta in peft_deltas(family, family.adapters["plain"]).items():
        expected = delta @ through(delta.shape[-1]).double().numpy()
        assert np.linalg.norm(deltas[name] - expected) < 1e-5 * np.linalg.norm(expected), name
    sizes = [sum(t.numel() for t in load_file(place / "adapter_model.safetensors").values())
             for place in (family.adapters["plain"], tmp_path / "out")]  # fmt: skip
    assert sizes[0] == sizes[1]


def test_a_gguf_keeps_b_and_tells_how_it_was_made(
    inputs_of: Callable[[str, str], RepairInputs], tmp_path: Path
) -> None:
    """Read by gguf-py."""
    inputs = inputs_of("qwen2", "plain")
    files = tmp_path / "before.gguf", tmp_path / "after.gguf"
    before = inputs.plan(files[0], outtype="f32", to=None, force=False)
    write_repaired(inputs, before, original_pairs(inputs), dataclasses.replace(FACTS, mu=None))
    output = inputs.plan(files[1], outtype="f32", to=None, force=False)
    write_repaired(inputs, output, repaired_pairs(inputs, sent_through(inputs)), FACTS)
    readers = [gguf.GGUFReader(file) for file in files]
    tensors = [{tensor.name: tensor.data for tensor in reader.tensors} for reader in readers]
    assert tensors[0].keys() == tensors[1].keys()
    for name, data in tensors[0].items():
        assert np.array_equal(data, tensors[1][name]) == name.endswith(".lora_b"), name
    told = {key: value.contents() for key, value in readers[1].fields.items()}
    assert told["safelora.operator"] == "repair"
    assert (told["safelora.repair.mu"], told["safelora.repair.tokens"], told["safelora.repair.tail"]) == (2.0, 2048, 9)
    assert told["safelora.repair.eps"] == pytest.approx(0.1)
    assert told["safelora.measured.refusal_rate"] == pytest.approx(0.98)
    assert "safelora.measured.task_rate" not in told
    assert (told["safelora.verdict"], told["safelora.judged_by"]) == ("pass", "other prompts")
    assert told["general.description"].endswith("The adapter's own task was not measured.")
    assert told["safelora.model.fingerprint"] == inputs.reports[0].fingerprint
    assert tuple(told["safelora.repair.weights"]) == inputs.weights
    assert "mu 2" in told["general.description"] and "98.0% of harmful prompts refused" in told["general.description"]


def test_an_estimate_is_not_told_as_a_measurement(
    inputs_of: Callable[[str, str], RepairInputs], tmp_path: Path
) -> None:
    """Read by gguf-py."""
    inputs = inputs_of("qwen2", "plain")
    told = {}
    for name, judged_by in (("estimate", "cross-fitting"), ("flattering", "calibration prompts")):
        output = inputs.plan(tmp_path / f"{name}.gguf", outtype="f32", to=None, force=False)
        facts = dataclasses.replace(FACTS, judged_by=judged_by, rates={**FACTS.rates, "task_rate": 0.5})
        write_repaired(inputs, output, repaired_pairs(inputs, sent_through(inputs)), facts)
        told[name] = {key: value.contents() for key, value in gguf.GGUFReader(output.target).fields.items()}
        assert told[name]["safelora.judged_by"] == judged_by
        assert "own task" not in told[name]["general.description"]
    assert told["estimate"]["safelora.estimated.refusal_rate"] == pytest.approx(0.98)
    assert not any(key.startswith("safelora.measured.") for key in told["estimate"])
    assert "Estimated by cross-fitting" in told["estimate"]["general.description"]
    assert "Measured:" not in told["estimate"]["general.description"]
    assert "which flatters it: 98.0% of harmful" in told["flattering"]["general.description"]


def test_what_was_not_repaired_says_so(inputs_of: Callable[[str, str], RepairInputs], tmp_path: Path) -> None:
    inputs = inputs_of("qwen2", "plain")
    output = inputs.plan(tmp_path / "same.gguf", outtype="f32", to=None, force=False)
    write_repaired(inputs, output, original_pairs(inputs), dataclasses.replace(FACTS, mu=None, reached=False))
    fields = {key: value.contents() for key, value in gguf.GGUFReader(tmp_path / "same.gguf").fields.items()}
    assert "safelora.repair.mu" not in fields and fields["safelora.verdict"] == "fail"
    assert "changed nothing" in fields["general.description"]
    assert "misses the bounds" in fields["general.description"]


def test_parts_of_one_pair_with_different_a_are_no_peft_pair(
    inputs_of: Callable[[str, str], RepairInputs], tmp_path: Path
) -> None:
    inputs = inputs_of("qwen3moe", "plain")
    output = inputs.plan(tmp_path / "out", outtype="f32", to="peft", force=False)

    def uneven(module: str) -> torch.Tensor:
        a = inputs.adapter.load(module)[0].float()
        return 0.9 * a if "ffn_up_exps" in module else a

    with pytest.raises(UnsupportedError, match=r"repaired A differ; write a \.gguf"):
        write_repaired(inputs, output, repaired_pairs(inputs, uneven), FACTS)
    assert not (tmp_path / "out").exists()


def test_broken_values_are_refused(inputs_of: Callable[[str, str], RepairInputs]) -> None:
    inputs = inputs_of("qwen2", "plain")

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(inputs.adapter, name)

        def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = inputs.adapter.load(module)
            return a, b * float("nan")

    broken = dataclasses.replace(inputs, adapter=Broken())
    with pytest.raises(FormatError, match="NaN or Inf"):
        original_pairs(broken)(inputs.modules[0])

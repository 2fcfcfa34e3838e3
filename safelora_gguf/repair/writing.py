"""A repaired adapter on its way to a file: which A takes the old one's place, and what the file tells of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from converters.adapters.converted import ConvertedAdapter
from converters.adapters.output import AdapterOutput, Fact, LoadPair, Origin
from converters.adapters.peft_output import PeftOutput
from converters.adapters.storing import Rounding
from converters.errors import FormatError, UnsupportedError
from converters.identity import plain_name
from safelora_gguf._version import __version__
from safelora_gguf.repair.inputs import RepairInputs
from safelora_gguf.repair.repaired import JudgedBy

NewA = Callable[[str], torch.Tensor]
"""Gives the repaired A (r, in) of a module in float32 on the CPU, in GGUF's layout."""

_ONE_A = 1e-3
"""Relative difference up to which the repaired A of one PEFT module's parts are one: they are solved by themselves."""
_MEASURE = "Measure what it refuses before relying on it."


@dataclass(frozen=True)
class RepairFacts:
    """What a repaired file tells of how it was made.

    Attributes:
        mu: None where nothing was repaired, as the adapter refuses enough.
        eps: of the ridge, relative to the mean diagonal of the benign inputs' second moment.
        tokens: at most so many per set and input.
        tail: of a harmful prompt, so many tokens before the answer were read.
        task_share: what task prompts made of the benign inputs' second moment.
        rates: `refusal_rate`, `over_refusal_rate`, `task_rate` as they were measured or estimated; None is left out.
        reached: whether the bounds were; None where that wasn't measured.
        judged_by: what the rates tell.
        more: further metadata of the output.
    """

    mu: float | None
    eps: float
    tokens: int
    tail: int
    task_share: float
    rates: Mapping[str, float | None] = field(default_factory=dict)
    reached: bool | None = None
    judged_by: JudgedBy = "other prompts"
    more: Mapping[str, Fact] = field(default_factory=dict)


def original_pairs(inputs: RepairInputs) -> LoadPair:
    """A and B of a module in float32 as the adapter has them.

    What is returned raises:
        FormatError: values that are not finite.
    """

    def load(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = inputs.adapter.load(module)
        pair = inputs.adapter.pairs[module]
        for half, tensor in zip((a, b), pair.tensors, strict=True):
            if not half.isfinite().all():
                told = "holds NaN or Inf: the adapter is broken"
                raise FormatError(told, file=inputs.adapter.tensor_file, tensor=tensor)
        return a.float(), b.float()

    return load


def repaired_pairs(inputs: RepairInputs, new_a: NewA) -> LoadPair:
    """A' and B of a module: `new_a` is asked for `inputs.modules` alone, and B is the adapter's own."""
    original, repaired = original_pairs(inputs), frozenset(inputs.modules)

    def load(module: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = original(module)
        if module not in repaired:
            return a, b
        found = new_a(module)
        assert found.shape == a.shape, f"a repaired A of {tuple(found.shape)} for one of {tuple(a.shape)}"
        return found.float(), b

    return load


def write_repaired(
    inputs: RepairInputs, output: AdapterOutput, load: LoadPair, facts: RepairFacts
) -> Mapping[str, Rounding]:
    """Writes the adapter as it is to stay; how each pair was stored, by module.

    Args:
        load: of `repaired_pairs`, or of `original_pairs` where nothing is to be changed.

    Raises:
        OutputPathError, WriteError: see `converters.atomic`. UnsupportedError: values that don't fit the type, or
            parts of one PEFT module that were given different A.
    """
    if isinstance(output, PeftOutput) and facts.mu is not None:
        _check_shared(inputs, load)
    return output.write(load, _origin(inputs, facts))


def _check_shared(inputs: RepairInputs, load: LoadPair) -> None:
    """That pairs which are rows of one PEFT pair still have one A: they do where they read one input."""
    if not isinstance(inputs.adapter, ConvertedAdapter):
        return
    for own, places in inputs.adapter.origins().items():
        first, *others = (name for name, _ in places)
        a = load(first)[0] if others else None
        for name in others:
            assert a is not None, "there are others"
            if torch.linalg.vector_norm(load(name)[0] - a) > _ONE_A * torch.linalg.vector_norm(a):
                pair = inputs.adapter.source.pairs[own]
                told = f"is {first} and {name} in llama.cpp, whose repaired A differ; write a .gguf, which holds both"
                raise UnsupportedError(told, file=inputs.adapter.tensor_file, tensor=pair.tensors[0])


def _origin(inputs: RepairInputs, facts: RepairFacts) -> Origin:
    told = {**_own_facts(inputs, facts), **_measured_facts(facts), **_input_facts(inputs), **facts.more}
    if facts.mu is None:
        return Origin("", f"A LoRA adapter as it was; repair changed nothing. {_rates(facts)}", _TAGS, told)
    count = f"{len(inputs.modules)} of {len(inputs.adapter.pairs)} modules changed"
    description = (
        f"A LoRA adapter whose update was reduced on the inputs on which its model refuses, and kept on benign ones "
        f"(mu {facts.mu:g}): {count}. {_rates(facts)}"
    )
    return Origin("repaired", description, _TAGS, told)


_TAGS = ("lora", "safelora-gguf")
_HOW: Mapping[JudgedBy, str] = {
    "other prompts": "Measured",
    "cross-fitting": "Estimated by cross-fitting, from adapters repaired without the prompts they were asked",
    "calibration prompts": "Measured on the prompts that calibrated it, which flatters it",
}
_WORDS = {
    "refusal_rate": "of harmful prompts refused",
    "over_refusal_rate": "of harmless ones",
    "task_rate": "of the task done",
}


def _rates(facts: RepairFacts) -> str:
    """What was measured, and what a reader is to do about it."""
    told = [f"{facts.rates[key]:.1%} {what}" for key, what in _WORDS.items() if facts.rates.get(key) is not None]
    if not told:
        return _MEASURE
    missed = ", which misses the bounds that were set" if facts.reached is False else ""
    task = "" if facts.rates.get("task_rate") is not None else " The adapter's own task was not measured."
    how = "Measured" if facts.mu is None else _HOW[facts.judged_by]
    return f"{how}: {', '.join(told)}{missed}. Other prompts may be answered otherwise.{task}"


def _own_facts(inputs: RepairInputs, facts: RepairFacts) -> dict[str, Fact]:
    found: dict[str, Fact] = {"safelora.version": __version__, "safelora.operator": "repair"}
    if facts.mu is not None:
        found |= {
            "safelora.repair.mu": float(facts.mu),
            "safelora.repair.eps": float(facts.eps),
            "safelora.repair.tokens": facts.tokens,
            "safelora.repair.tail": facts.tail,
            "safelora.repair.task_share": float(facts.task_share),
            "safelora.repair.weights": inputs.weights,
        }
    return {**found, "safelora.modules.total": len(inputs.adapter.pairs)}


def _measured_facts(facts: RepairFacts) -> dict[str, Fact]:
    how = "estimated" if facts.judged_by == "cross-fitting" else "measured"
    found: dict[str, Fact] = {
        f"safelora.{how}.{key}": float(rate) for key in _WORDS if (rate := facts.rates.get(key)) is not None
    }
    if facts.reached is not None:
        found |= {"safelora.verdict": "pass" if facts.reached else "fail", "safelora.judged_by": facts.judged_by}
    return found


def _input_facts(inputs: RepairInputs) -> dict[str, Fact]:
    found: dict[str, Fact] = {}
    for item in inputs.reports:
        found[f"safelora.{item.role}.name"] = plain_name(Path(item.path))
        found[f"safelora.{item.role}.fingerprint"] = item.fingerprint
    return found

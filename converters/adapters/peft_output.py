"""Writing PEFT adapter directories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from converters.adapters.card import card_of
from converters.adapters.converted import ConvertedAdapter
from converters.adapters.lora import LoraAdapter
from converters.adapters.output import LoadPair, Origin, needed_heads
from converters.adapters.peft import CONFIG, PREFIX, WEIGHTS
from converters.adapters.peft_config_out import ConfigEntry, peft_config_for
from converters.adapters.peft_places import PeftPair, peft_pairs
from converters.adapters.storing import PairOut, Rounding, rounded_in_turn
from converters.architectures import find_architecture
from converters.atomic import atomic_directory, check_target
from converters.errors import UnsupportedError
from converters.ggml import QType, nbytes
from converters.identity import plain_name
from converters.model_card import ModelCard, fact_text
from converters.models import ModelDescription
from converters.safetensors_file import write_safetensors
from converters.tensors import TensorInfo

CARD = "README.md"


def write_peft_adapter(
    target: Path,
    pairs: Sequence[PairOut],
    *,
    config: bytes,
    qtype: QType,
    metadata: Mapping[str, str],
    card: str,
    force: bool = False,
) -> list[Rounding]:
    """Writes an adapter directory, whole or not at all: configuration, tensors and a card.

    Args:
        pairs: named as PEFT modules, without the prefix `base_model.model.`; those of one name are the experts of one
            parameter, in order and all of one shape.
        config: the bytes of adapter_config.json, whose scaling the pairs rely on.
        qtype: F32, F16 or BF16.
        metadata: free-form strings for the safetensors header.

    Returns:
        How each pair was rounded.

    Raises:
        OutputPathError, WriteError: see `converters.atomic`. UnsupportedError: see `round_pair`.
    """
    stacks: dict[str, list[PairOut]] = {}
    for pair in pairs:
        stacks.setdefault(pair.name, []).append(pair)
    infos, owners = [], {}
    for stack in stacks.values():
        for half, shape in (("A", _a_shape(stack)), ("B", _b_shape(stack))):
            key = _key(stack[0], half)
            infos.append(TensorInfo(key, shape, qtype.name, nbytes(shape, qtype)))
            owners[key] = stack
    report: dict[str, list[Rounding]] = {}
    waiting: dict[str, bytes] = {}
    in_turn = rounded_in_turn(stacks.values(), qtype)

    def give(key: str) -> list[bytes]:
        if key in waiting:
            return [waiting.pop(key)]
        stack = owners[key]
        rounded = next(in_turn)
        report[stack[0].name] = [pair.rounding for pair in rounded]
        waiting[_key(stack[0], "B")] = _interleaved([pair.b for pair in rounded], stack[0].b_shape[0], qtype)
        return [pair.a for pair in rounded]

    with atomic_directory(target, force=force) as directory:
        with (directory / WEIGHTS).open("wb") as file:
            write_safetensors(file, infos, give, {"format": "pt", **metadata})
        (directory / CONFIG).write_bytes(config)
        (directory / CARD).write_text(card, encoding="utf-8")
    return [report[pair.name].pop(0) for pair in pairs]


def _key(pair: PairOut, half: str) -> str:
    if pair.embedding:
        return f"{PREFIX}{pair.name}.lora_embedding_{half}"
    return f"{PREFIX}{pair.name}.lora_{half}.weight"


def _a_shape(stack: Sequence[PairOut]) -> tuple[int, int]:
    """Experts one below the other."""
    rank, columns = stack[0].a_shape
    return len(stack) * rank, columns


def _b_shape(stack: Sequence[PairOut]) -> tuple[int, int]:
    """(out, r * experts), the experts' columns in turns."""
    rows, rank = stack[0].b_shape
    return rows, rank * len(stack)


def _interleaved(matrices: Sequence[bytes], rows: int, qtype: QType) -> bytes:
    """The bytes of every B (out, r) as those of one (out, r, experts)."""
    if len(matrices) == 1:
        return matrices[0]
    size = nbytes((1,), qtype)
    parts = [np.frombuffer(matrix, np.dtype((np.void, size))).reshape(rows, -1) for matrix in matrices]
    return np.stack(parts, axis=-1).tobytes()


class PeftOutput:
    """A PEFT directory, with the adapter's own configuration where it has one."""

    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(self, out: Path, qtype: QType, adapter: LoraAdapter, model: ModelDescription, *, force: bool) -> None:
        check_target(out, force=force, directory=True)
        self.target, self.tensor_file = out, out / WEIGHTS
        self._qtype, self._adapter, self._force = qtype, adapter, force
        _refuse_split_ties(adapter, model)
        self._pairs = _completed(peft_pairs(adapter, model), model.experts)
        parts = [part.place for pair in self._pairs for part in pair.parts]
        self._heads = adapter.bridge.heads if isinstance(adapter, ConvertedAdapter) else needed_heads(model, parts)
        self._architecture = find_architecture(model.architecture)

    def name_of(self, module: str) -> str | None:
        if self._adapter.layout == "gguf":
            return f"{self._adapter.pairs[module].weight}.weight"
        found = self._architecture.to_gguf(module) if self._architecture else ()
        return f"{found[0].name}.weight" if len(found) == 1 else None

    def planned_bytes(self) -> int:
        elements = sum(pair.rank * sum(pair.shape) for pair in self._pairs)
        return elements * nbytes((1,), self._qtype)

    def write(self, load: LoadPair, origin: Origin) -> Mapping[str, Rounding]:
        adapter = self._adapter
        roundings = write_peft_adapter(
            self.target,
            [pair.out(load, adapter.tensor_file, self._heads) for pair in self._pairs],
            config=adapter.peft_config or self._config(),
            qtype=self._qtype,
            metadata={key: fact_text(value) for key, value in origin.facts.items()},
            card=_card(self.target, adapter, origin),
            force=self._force,
        )
        found = zip(self._pairs, roundings, strict=True)
        return {part.module: rounding for pair, rounding in found for part in pair.parts}

    def _config(self) -> bytes:
        entries = {
            pair.target: ConfigEntry(pair.target, pair.rank, pair.scaling, pair.parameter) for pair in self._pairs
        }
        return peft_config_for(
            list(entries.values()), self._adapter.base_model_name, invocation_tokens=self._adapter.invocation_tokens
        )


def _completed(pairs: Sequence[PeftPair], experts: int) -> list[PeftPair]:
    """The pairs with every expert of a stack in order: those without one get a sum of nothing, which is zero."""
    stacks: dict[str, list[PeftPair]] = {}
    for pair in pairs:
        stacks.setdefault(pair.name, []).append(pair)
    found: list[PeftPair] = []
    for stack in stacks.values():
        if stack[0].expert is None:
            found += stack
            continue
        known = {pair.expert: pair for pair in stack}
        count = max(experts, 1 + max(pair.expert or 0 for pair in stack))
        found += [known.get(number) or replace(stack[0], parts=(), expert=number) for number in range(count)]
    return found


def _refuse_split_ties(adapter: LoraAdapter, model: ModelDescription) -> None:
    """mlx-lm applies a pair on a tied embedding at the output as well, PEFT at the input alone."""
    tied = [pair for pair in adapter.pairs.values() if pair.embedding and model.tied_embeddings]
    if tied and adapter.format == "mlx":
        raise UnsupportedError(
            "adapts an embedding that its model uses for input and output, which PEFT would apply to the input alone; "
            "merge the adapter into its model (safelora-gguf merge)",
            file=adapter.path,
            tensor=tied[0].key,
        )


def _card(target: Path, adapter: LoraAdapter, origin: Origin) -> str:
    """A model card whose header hubs understand."""
    own = card_of(adapter)
    return ModelCard(
        title=plain_name(target),
        description=origin.description,
        license=own.license,
        license_name=own.license_name,
        license_link=own.license_link,
        base_models=[adapter.base_model_name] if adapter.base_model_name else own.base_models,
        tags=(*origin.tags, *own.tags),
        datasets=own.datasets,
        languages=own.languages,
        library="peft",
        facts=origin.facts,
        invocation=origin.invocation,
    ).to_markdown()

"""Writing PEFT adapter directories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from converters.adapters.card import card_of
from converters.adapters.gguf import GgufAdapter
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.output import Fact, LoadPair, Origin, Place, needed_heads, pair_out
from converters.adapters.peft import CONFIG, PREFIX, WEIGHTS
from converters.adapters.peft_config_out import ConfigEntry, peft_config_for
from converters.adapters.storing import PairOut, Rounding, round_pair
from converters.architectures import HeadCounts, architecture_of, find_architecture
from converters.atomic import atomic_directory, check_target
from converters.converted import ConvertedAdapter
from converters.errors import Error, UnsupportedError
from converters.ggml import QType, nbytes
from converters.identity import is_repository, plain_name
from converters.models import ModelDescription
from converters.names import canonical
from converters.safetensors_file import write_safetensors
from converters.tensors import TensorInfo

CARD = "README.md"

_REMEDY = "Writing a GGUF adapter (an --out that ends in .gguf) works for any architecture"


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
        pairs: named as PEFT modules, without the prefix `base_model.model.`.
        config: the bytes of adapter_config.json, whose scaling the pairs rely on.
        qtype: F32, F16 or BF16.
        metadata: free-form strings for the safetensors header.

    Returns:
        How each pair was rounded.

    Raises:
        OutputPathError, WriteError: see `converters.atomic`. UnsupportedError: see `round_pair`.
    """
    infos, owners = [], {}
    for pair in pairs:
        for half, shape in (("A", pair.a_shape), ("B", pair.b_shape)):
            key = _key(pair, half)
            infos.append(TensorInfo(key, shape, qtype.name, nbytes(shape, qtype)))
            owners[key] = pair
    report: dict[str, Rounding] = {}
    waiting: dict[str, bytes] = {}

    def give(key: str) -> list[bytes]:
        if key in waiting:
            return [waiting.pop(key)]
        pair = owners[key]
        rounded = round_pair(pair, qtype)
        report[pair.name] = rounded.rounding
        waiting[_key(pair, "B")] = rounded.b
        return [rounded.a]

    with atomic_directory(target, force=force) as directory:
        with (directory / WEIGHTS).open("wb") as file:
            write_safetensors(file, infos, give, {"format": "pt", **metadata})
        (directory / CONFIG).write_bytes(config)
        (directory / CARD).write_text(card, encoding="utf-8")
    return [report[pair.name] for pair in pairs]


def _key(pair: PairOut, half: str) -> str:
    if pair.embedding:
        return f"{PREFIX}{pair.name}.lora_embedding_{half}"
    return f"{PREFIX}{pair.name}.lora_{half}.weight"


class PeftOutput:
    """A PEFT directory, with the adapter's own configuration where it has one."""

    def __init__(self, out: Path, qtype: QType, adapter: LoraAdapter, model: ModelDescription, *, force: bool) -> None:
        check_target(out, force=force, directory=True)
        self.target, self.tensor_file = out, out / WEIGHTS
        self._qtype, self._adapter, self._force = qtype, adapter, force
        _refuse_split_ties(adapter, model)
        self._heads, self._places = _places(adapter, model)
        self._architecture = find_architecture(model.architecture)

    def name_of(self, module: str) -> str | None:
        if self._adapter.layout == "gguf":
            pair = self._adapter.pairs[module]
            return f"{pair.weight}.weight"
        found = self._architecture.to_gguf(module) if self._architecture else None
        return f"{found[0]}.weight" if found else None

    def planned_bytes(self) -> int:
        elements = sum(pair.rank * sum(pair.shape) for pair in self._adapter.pairs.values())
        return elements * nbytes((1,), self._qtype)

    def write(self, load: LoadPair, origin: Origin) -> Mapping[str, Rounding]:
        adapter = self._adapter
        pairs = [pair_out(pair, self._places[module], load, adapter, self._heads)
                 for module, pair in adapter.pairs.items()]  # fmt: skip
        roundings = write_peft_adapter(
            self.target,
            pairs,
            config=adapter.peft_config or self._config(),
            qtype=self._qtype,
            metadata={key: _as_text(value) for key, value in origin.facts.items()},
            card=_card(self.target, adapter, origin),
            force=self._force,
        )
        return dict(zip(adapter.pairs, roundings, strict=True))

    def _config(self) -> bytes:
        entries = [
            ConfigEntry(self._places[module].name, pair.rank, pair.scaling)
            for module, pair in self._adapter.pairs.items()
        ]
        return peft_config_for(
            entries, self._adapter.base_model_name, invocation_tokens=self._adapter.invocation_tokens
        )


def _places(adapter: LoraAdapter, model: ModelDescription) -> tuple[HeadCounts | None, dict[str, Place]]:
    """Every module's PEFT name and the way there, with the heads where rules need them.

    Raises:
        UnsupportedError: a GGUF adapter's architecture has no table, or no place for a module.
        FormatError: heads that can't be told.
    """
    if isinstance(adapter, ConvertedAdapter):
        there = {
            module: Place(_peft_name(adapter, pair, model), adapter.rule_of(module).inverse())
            for module, pair in adapter.pairs.items()
        }
        return adapter.bridge.heads, there
    if not isinstance(adapter, GgufAdapter):
        named = {module: Place(_peft_name(adapter, pair, model)) for module, pair in adapter.pairs.items()}
        return None, named
    try:
        architecture = architecture_of(adapter.architecture, _REMEDY)
    except Error as error:
        raise type(error)(error.message, file=adapter.path) from None
    places = {}
    for module, pair in adapter.pairs.items():
        found = architecture.to_hugging_face(module)
        if found is None:
            raise UnsupportedError(
                f"the table of {architecture.name} has no Hugging Face name for this weight; write a .gguf",
                file=adapter.path,
                tensor=pair.key,
            )
        places[module] = Place(_as_peft_names(model, found[0]), found[1])
    return needed_heads(model, places), places


def _peft_name(adapter: LoraAdapter, pair: LoraPair, model: ModelDescription) -> str:
    """An adapter's own name for the module where PEFT wrote it; else the one that PEFT finds in the model."""
    return _as_peft_names(model, canonical(pair.key)) if adapter.peft_config is None else pair.key


def _as_peft_names(model: ModelDescription, module: str) -> str:
    """The module's name inside the model's class, which may wrap its text half."""
    table = find_architecture(model.model_class or "")
    return table.name_in(model.model_class or "", module) if table else module


def _refuse_split_ties(adapter: LoraAdapter, model: ModelDescription) -> None:
    """mlx-lm applies a pair on a tied embedding at the output as well, PEFT at the input alone."""
    tied = [pair for pair in adapter.pairs.values() if pair.embedding and model.tied_embeddings]
    if tied and adapter.format == "mlx":
        raise UnsupportedError(
            "adapts an embedding that its model uses for input and output, which PEFT would apply to the input alone; "
            "merge it into its model with mlx_lm.fuse",
            file=adapter.path,
            tensor=tied[0].key,
        )


def _as_text(value: Fact) -> str:
    return str(value) if isinstance(value, str | int | float) else ",".join(value)


def _card(target: Path, adapter: LoraAdapter, origin: Origin) -> str:
    """A model card whose header hubs understand."""
    base = adapter.base_model_name
    own = card_of(adapter)
    header = ["---", "library_name: peft"]
    if own.license:
        header.append(f"license: {json.dumps(own.license)}")  # quoted: it is a stranger's string
    if base is not None and is_repository(base):
        header.append(f"base_model: {json.dumps(base)}")
    for key, values in (("tags", (*origin.tags, *own.tags)), ("datasets", own.datasets), ("language", own.languages)):
        if values:
            header += [f"{key}:", *(f"- {json.dumps(value)}" for value in dict.fromkeys(values))]
    rows = [f"- {key}: {_as_text(value)}" for key, value in origin.facts.items()]
    lines = [*header, "---", "", f"# {plain_name(target)}", "", origin.description, "", *rows]
    return "\n".join(lines) + "\n"

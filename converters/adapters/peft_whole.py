"""What a PEFT adapter was trained on beside its pairs, tensor by tensor: what merging needs, from its header alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from converters.adapters.lora import LoraPair
from converters.adapters.peft_config import PeftConfig
from converters.adapters.peft_losses import BesidePairs, Kind
from converters.adapters.peft_pairs import PREFIX, frozen_tables
from converters.adapters.whole import WholeTensor
from converters.errors import FormatError
from converters.names import canonical
from converters.safetensors_file import SafetensorsFile

_TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
_ADAPTER_NAME = re.compile(r".+\.lora_(?:embedding_)?A\.([^.]+?)(?:\.weight)?")
_TOKEN_TABLE = ".token_adapter.base_layer.weight"
_WRAPPED = ".base_layer"
_SAVED = ".modules_to_save."
_DIMENSIONS = {Kind.LORA_BIAS: 1, Kind.BIAS: 1, Kind.NORM: 1, Kind.TOKENS: 2, Kind.TABLE: 2}
_SHAPES = {1: "a vector", 2: "a matrix"}


@dataclass(frozen=True)
class _Adapter:
    """The file, what its configuration says, its pairs, and what its tensors may call it ("default")."""

    file: SafetensorsFile
    config: PeftConfig
    pairs: Mapping[str, LoraPair]
    names: Set[str]


def whole_tensors(
    file: SafetensorsFile, config: PeftConfig, beside: BesidePairs, pairs: Mapping[str, LoraPair]
) -> dict[str, WholeTensor]:
    """All of them by their names in the file, saved along tables first.

    Raises:
        FormatError: a shape that is not its kind's or its pair's, two tensors for one place, tokens that the
            configuration doesn't number.
        UnsupportedError: a tensor is stored as integers.
    """
    matches = (_ADAPTER_NAME.fullmatch(pair.tensors[0]) for pair in pairs.values())
    names = {"default"} | {match[1] for match in matches if match is not None and match[1] != "weight"}
    adapter = _Adapter(file, config, pairs, names)
    named = [(kind, key) for kind, keys in beside.names.items() for key in keys]
    found: dict[str, WholeTensor] = {}
    places: dict[tuple[str, str], str] = {}
    for tensor in (*_tables(file), *(_whole(adapter, kind, key) for kind, key in named)):
        if tensor is None:
            continue
        first = places.setdefault((tensor.target, tensor.kind), tensor.key)
        if first != tensor.key and _is_saved_twice(adapter, tensor.key, first):
            continue
        if first != tensor.key:
            told = f"is a second tensor for {tensor.target}, the first is {first}: which one was trained can't be told"
            raise FormatError(told, file=file.path, tensor=tensor.key)
        _check_pair(file, tensor, pairs)
        found[tensor.key] = tensor
    return found


def _is_saved_twice(adapter: _Adapter, key: str, other: str) -> bool:
    """PEFT saves a table of a resized vocabulary that was trained whole, and with bias="all" the biases of all modules
    trained so, under their wrapper's name, too."""
    import torch

    targets = {_target(name.removeprefix(PREFIX), adapter.names) for name in (key, other)}
    if len(targets) != 1 or (_SAVED in key) == (_SAVED in other):
        return False
    return torch.equal(adapter.file.load(key), adapter.file.load(other))


def _tables(file: SafetensorsFile) -> Iterator[WholeTensor]:
    """The tables under pairs, which PEFT loads over the model's."""
    for module, key in frozen_tables(file).items():
        yield WholeTensor(key, f"{module}.weight", _shape(file, key, 2), "replaces", frozen=True)


def _whole(adapter: _Adapter, kind: Kind, key: str) -> WholeTensor | None:
    """A tensor that belongs to no pair; None where it says nothing new of the model."""
    plain = key.removeprefix(PREFIX)
    if kind is Kind.UNTRAINED:
        return None if ".original_module." in plain else _untrained(adapter, key, plain)
    if kind is Kind.TOKENS:
        match = _TOKENS.fullmatch(plain)
        return _tokens(adapter, key, match[1]) if match else None
    shape = _shape(adapter.file, key, 1 if plain.endswith(".bias") else _DIMENSIONS.get(kind))
    if kind is Kind.LORA_BIAS:
        return _lora_bias(adapter, key, plain, shape)
    return WholeTensor(key, _target(plain, adapter.names), shape, "replaces")


def _untrained(adapter: _Adapter, key: str, plain: str) -> WholeTensor:
    """The table under trained tokens, or a bias beside a table under a pair."""
    table = plain.removesuffix(_TOKEN_TABLE)
    if table == plain:
        return WholeTensor(key, _target(plain, adapter.names), _shape(adapter.file, key, 1), "replaces", frozen=True)
    return WholeTensor(key, f"{canonical(table)}.weight", _shape(adapter.file, key, 2), "replaces", frozen=True)


def _lora_bias(adapter: _Adapter, key: str, plain: str, shape: tuple[int, ...]) -> WholeTensor:
    """y = W x + b + scaling * (B A x + bias): PEFT's lora/layer.py."""
    module = canonical(plain.rpartition(".lora_B")[0])
    pair = adapter.pairs.get(module)
    if pair is None or pair.embedding:
        told = "is a bias of lora_B, and there is no pair of a linear weight that it belongs to"
        raise FormatError(told, file=adapter.file.path, tensor=key)
    return WholeTensor(key, f"{module}.bias", shape, "adds", factor=pair.scaling)


def _tokens(adapter: _Adapter, key: str, module: str) -> WholeTensor:
    """The new rows of a table. The configuration numbers them, for one table or for all; a tied head has those of the
    embedding, and may have no numbers of its own."""
    file, numbered = adapter.file, adapter.config.trained_tokens
    own = {tokens for end, tokens in numbered.items() if module.endswith(end)} or set(numbered.values())
    if len(own) != 1:
        told = "has trained tokens, and trainable_token_indices in adapter_config.json doesn't say which they are"
        raise FormatError(told, file=file.path, tensor=key)
    (rows,) = own
    shape = _shape(file, key, 2)
    if len(rows) != shape[0]:
        told = f"has {shape[0]} rows, and adapter_config.json numbers {len(rows)} tokens: they do not belong together"
        raise FormatError(told, file=file.path, tensor=key)
    return WholeTensor(key, f"{canonical(module)}.weight", shape, "rows", rows=rows)


def _target(plain: str, names: Set[str]) -> str:
    """The tensor's name in the model. Older PEFT left its own level in it, and some trainers the adapter's name."""
    module, saved, rest = plain.partition(_SAVED)
    if saved:
        first, dot, further = rest.partition(".")
        plain = f"{module}.{further if dot and first in names else rest}"
    owner, _, ending = plain.rpartition(".")
    return canonical(f"{owner.removesuffix(_WRAPPED)}.{ending}")


def _shape(file: SafetensorsFile, key: str, dimensions: int | None) -> tuple[int, ...]:
    shape = file.infos[key].shape
    if not shape or 0 in shape or dimensions not in (None, len(shape)):
        expected = _SHAPES.get(dimensions or 0, "a tensor with values")
        raise FormatError(
            f"has the shape {list(shape)}, expected {expected}: saved by DeepSpeed ZeRO-3 or FSDP without gathering "
            f"its weights? Save it again from the training script",
            file=file.path,
            tensor=key,
        )
    file.check_type(key)
    return shape


def _check_pair(file: SafetensorsFile, tensor: WholeTensor, pairs: Mapping[str, LoraPair]) -> None:
    """That a tensor of a module with a pair has the pair's size."""
    module, _, ending = tensor.target.rpartition(".")
    pair = pairs.get(module)
    if pair is None or pair.expert is not None:
        return
    if tensor.kind == "rows":
        expected: tuple[int, ...] = (tensor.shape[0], pair.shape[1])
    else:
        expected = pair.shape[:1] if ending == "bias" else pair.shape
    if tensor.shape != expected:
        told = f"has the shape {list(tensor.shape)}, and its module's pair is for {list(expected)}: "
        raise FormatError(told + "they do not belong together", file=file.path, tensor=tensor.key)

"""Whether an adapter was trained on a model like this one, as far as the adapter's own configuration tells.

An adapter of a shallower model fits a deeper one, weight by weight: what shows the mistake is that PEFT would have
given pairs to the other layers, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from converters.adapters.converted import ConvertedAdapter
from converters.adapters.lora import LoraAdapter
from converters.adapters.mlx import MlxAdapter
from converters.architectures import find_architecture
from converters.errors import InputError, MismatchError
from converters.model_config import class_of
from converters.models import Model, ModelDescription
from converters.names import canonical
from converters.paths import read_json_object

_LAYER = re.compile(r"(.*?\.)(\d{1,6})(\..+)")
_CHOOSING = ("layers_to_transform", "layers_pattern", "exclude_modules", "layer_replication")
_IN_EVERY_LAYER = ("q_proj", "o_proj", "qkv_proj")  # of every family with a table
_TEXT = "model.layers."
_SAME = {"llama", "mistral3"}  # the second was the first before llama.cpp gave it a name of its own
_CONFIG = "config.json"

_Kind = tuple[str, str]
"""A module's name before and behind the number of its layer."""


def check_trained_on(adapter: LoraAdapter, model: ModelDescription) -> None:
    """That the adapter has pairs for all layers of the model that its configuration asks for, and that the model which
    it names, where that is at hand, is of the same kind.

    Raises:
        MismatchError: the adapter is for another model.
    """
    own = adapter.source if isinstance(adapter, ConvertedAdapter) else adapter
    if own.layout == "gguf":
        return
    _check_base(own, model)
    wanted, key = _wanted_layers(own)
    if wanted is None:
        return
    found = _layers(pair.weight for pair in own.pairs.values())
    there = _layers_of(model, found)
    depth = max((max(layers) + 1 for layers in there.values()), default=0)
    for kind, layers in there.items():
        missing = [layer for layer in sorted(layers - found[kind]) if wanted(kind, layer, depth)]
        if missing:
            name = f"{kind[0]}{missing[0]}{kind[1]}"
            raise MismatchError(
                f"has pairs for {len(found[kind])} of the {len(layers)} modules {kind[0]}*{kind[1]} of {model.path}; "
                f"the first without is {name}. The adapter is for another model; if it was trained on some of the "
                f"layers alone, say so in its adapter_config.json ({key})",
                file=own.path,
            )


def _wanted_layers(adapter: LoraAdapter) -> tuple[Callable[[_Kind, int, int], bool] | None, str]:
    """Whether a kind of module that has pairs has one in a layer (of so many); and the key that says otherwise."""
    if isinstance(adapter, MlxAdapter):
        last = adapter.config.layers
        if last is None:
            return None, ""
        return (lambda kind, layer, depth: last <= 0 or layer >= depth - last), "num_layers"
    config = _parsed(adapter.peft_config)
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(key) for key in _CHOOSING):
        return None, ""
    plain = {name for name in targets if isinstance(name, str) and "." not in name}
    return (lambda kind, layer, depth: kind[1].rpartition(".")[2] in plain), "layers_to_transform"


def _layers(modules: Iterator[str]) -> dict[_Kind, set[int]]:
    found: dict[_Kind, set[int]] = {}
    for module in modules:
        match = _LAYER.fullmatch(module)
        if match is not None:
            found.setdefault((match[1], match[3]), set()).add(int(match[2]))
    return found


def _layers_of(model: ModelDescription, kinds: Mapping[_Kind, set[int]]) -> Mapping[_Kind, set[int]]:
    """In which layers a model has modules of these kinds."""
    names = getattr(model, "infos", None)  # of a description without tensors there are none
    if names:
        return {kind: found for kind, found in _layers(_modules(model)).items() if kind in kinds}
    layers = model.sizes().layers
    if layers is None or find_architecture(model.architecture) is None:
        return {}
    uniform = [kind for kind in kinds if kind[0] == _TEXT and kind[1].rpartition(".")[2] in _IN_EVERY_LAYER]
    return {kind: kinds[kind] | set(range(min(layers, 1 + max(kinds[kind])), layers)) for kind in uniform
            if layers < 1 << 16}  # fmt: skip


def _modules(model: Any) -> Iterator[str]:
    """The modules that have weights, by Hugging Face's names."""
    opened: Model = model
    table = find_architecture(opened.architecture)
    for name in opened.infos:
        module = canonical(name).removesuffix(".weight")
        if opened.layout != "gguf":
            yield module
        elif table is not None and (found := table.to_hugging_face(module)) is not None:
            yield found.name


def _check_base(adapter: LoraAdapter, model: ModelDescription) -> None:
    """Raises MismatchError where the model that it names lies there and is of another class and kind."""
    named = adapter.base_model_name
    base = _config_in(named) if named and named.isprintable() else {}
    try:
        theirs = class_of(base, Path(_CONFIG))
    except InputError:
        return
    table = find_architecture(theirs)
    if model.layout == "gguf" and model.model_class is None:
        if table is None or {table.name, model.architecture} <= _SAME or table.name == model.architecture:
            return
    elif theirs == model.model_class or _kinds(base) & _kinds(_config_in(str(model.described_by.parent))):
        return
    raise MismatchError(
        f"was trained on {named}, a {theirs}, and {model.path} is a {model.model_class or model.architecture}: the "
        f"adapter is for another model",
        file=adapter.path,
    )


def _kinds(config: Mapping[str, Any]) -> set[str]:
    inner = config.get("text_config")
    tables = (config, inner) if isinstance(inner, dict) else (config,)
    return {str(table.get("model_type")).removesuffix("_text") for table in tables}


def _config_in(directory: str) -> Mapping[str, Any]:
    try:
        file = Path(directory) / _CONFIG
        return read_json_object(file, "the model's configuration") if file.is_file() else {}
    except (InputError, OSError, ValueError):
        return {}


def _parsed(config: bytes | None) -> Mapping[str, Any]:
    try:
        found = json.loads(config or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

"""What a GGUF model says of itself beside its hyperparameters: `general.*`, from a checkpoint's card, names and sizes.

The gguf package's own heuristics decide what a name means, so that files read as those of llama.cpp's converter do.
They are given cleaned and bounded text alone: cards are written by strangers. Paths of somebody's machine stay out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import yaml
from gguf import GGML_QUANT_VERSION, GGUFValueType, GGUFWriter
from gguf.metadata import Metadata
from gguf.utility import size_label

from converters.errors import InputError
from converters.front_matter import front_matter
from converters.gguf_file import Value, text, uint32
from converters.gguf_types import Kind
from converters.identity import plain_name
from converters.paths import read_json_object

_MAX_HEADER = 1 << 16  # bytes of YAML; parsing takes some ten microseconds for each
_MAX_ITEMS, _MAX_TEXT = 256, 2000
_TABLES = {"base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources"}
_LISTS = {"license", "tags", "pipeline_tag", "languages", "language"}
_NAME = re.compile(r"[\w][\w .-]{0,95}(/[\w.-]{1,96})?")
_SAMPLING: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "sampling_sequence": (str, ("sequence",)),
    "sampling_top_k": (int, ("top_k",)),
    "sampling_top_p": (float, ("top_p",)),
    "sampling_min_p": (float, ("min_p",)),
    "sampling_xtc_probability": (float, ("xtc_probability",)),
    "sampling_xtc_threshold": (float, ("xtc_threshold",)),
    "sampling_temp": (float, ("temperature",)),
    "sampling_penalty_last_n": (int, ("penalty_last_n",)),
    "sampling_penalty_repeat": (float, ("penalty_repeat", "repetition_penalty")),
    "sampling_mirostat": (int, ("mirostat",)),
    "sampling_mirostat_tau": (float, ("mirostat_tau",)),
    "sampling_mirostat_eta": (float, ("mirostat_eta",)),
}
_INT32, _FLOAT32 = 1 << 31, 3.4e38


def general_keys(
    directory: Path, config: Mapping[str, Any], architecture: str, shapes: Mapping[str, tuple[int, ...]], file_type: int
) -> list[tuple[str, Value]]:
    """The keys `general.*` of a model that is made from a checkpoint, as llama.cpp's converter writes them.

    Args:
        directory: of the checkpoint: its name, README.md and generation_config.json are looked at.
        config: config.json, of which the name counts.
        shapes: of all tensors by GGUF's names; they give the size label.
        file_type: llama.h's `llama_ftype`.
    """
    total, shared, expert, count = parameter_counts(shapes)
    metadata = _found(directory, config, total)
    if metadata.size_label is None and total:
        metadata.size_label = size_label(total, shared, expert, count)
    writer = GGUFWriter(None, architecture)
    writer.add_type("model")
    _set_sampling(metadata, directory)
    metadata.set_gguf_meta_model(writer)
    keys = [(key, _value(entry.type, entry.value)) for key, entry in writer.kv_data[0].items()]
    return [*keys, ("general.file_type", uint32(file_type)),
            ("general.quantization_version", uint32(GGML_QUANT_VERSION))]  # fmt: skip


def parameter_counts(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """All parameters; those outside of experts; those of one expert; and how many experts there are."""
    total = shared = expert = 0
    counts = []
    for name, shape in shapes.items():
        size, number = prod(shape), 0
        if "_exps." in name and len(shape) > 2:
            number = shape[-2 if ".bias" in name else -3]
        total += size
        if number:
            expert += size // number
            counts.append(number)
        else:
            shared += size
    return total, shared, expert, sum(counts) // len(counts) if counts else 0


def _found(directory: Path, config: Mapping[str, Any], total: int) -> Metadata:
    name, place = config.get("_name_or_path"), Path(plain_name(directory))
    named = {"_name_or_path": name} if isinstance(name, str) and _NAME.fullmatch(name) else {}
    try:
        found = Metadata.apply_metadata_heuristic(Metadata(), _card(directory / "README.md"), named, place, total)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # a card that it doesn't expect
        found = Metadata.apply_metadata_heuristic(Metadata(), {}, {}, place, total)
    if found.name is None:
        found.name = place.name
    return found


def _card(path: Path) -> dict[str, Any]:
    """The YAML at the beginning of a card, its texts cleaned; empty where there is none that can be read."""
    # As the package reads it: Norwegian is no False, and a tab is two spaces.
    told = (front_matter(path, _MAX_HEADER) + "\n").replace("- no\n", '- "no"\n').replace("\t", "  ")
    try:
        table = yaml.safe_load(told)
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    cleaned = {key: _cleaned(key, value) for key, value in table.items()} if isinstance(table, dict) else {}
    return {key: value for key, value in cleaned.items() if value is not None}


def _cleaned(key: Any, value: Any) -> Any:
    """A text; under keys that have several a list of texts, or of tables of them; None for what has no place."""
    if not isinstance(value, list):
        return _text(value)
    if key in _TABLES:
        return [item for item in map(_cleaned_table, value[:_MAX_ITEMS]) if item]
    return [item for item in map(_text, value[:_MAX_ITEMS]) if item] if key in _LISTS else None


def _cleaned_table(item: Any) -> str | dict[str, str] | None:
    if not isinstance(item, dict):
        return _text(item)
    texts = {str(key): _text(value) for key, value in item.items()}
    return {key: text for key, text in texts.items() if text}


def _text(value: Any) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return None
    return "".join(letter for letter in value[:_MAX_TEXT] if letter.isprintable() or letter in "\n\t") or None


def _set_sampling(metadata: Metadata, directory: Path) -> None:
    """What generation_config.json recommends, where the package knows of it."""
    path = directory / "generation_config.json"
    try:
        table = read_json_object(path, "generation_config.json") if path.is_file() else {}
    except InputError:  # nothing depends on it
        return
    for key, (kind, names) in _SAMPLING.items():
        value = next((table[name] for name in names if name in table), None)
        if hasattr(metadata, key) and (sound := _of_kind(value, kind)) is not None:
            setattr(metadata, key, sound)


def _of_kind(value: Any, kind: type) -> Any:
    if kind is str:
        return _text(value) if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _FLOAT32:
        return None
    if kind is int:
        return value if isinstance(value, int) and abs(value) < _INT32 else None
    return float(value)


def _value(kind: GGUFValueType, data: Any) -> Value:
    if kind == GGUFValueType.ARRAY:
        return Value(Kind.ARRAY, tuple(map(str, data)), Kind.STRING)
    return text(data) if kind == GGUFValueType.STRING else Value(Kind(kind), data)

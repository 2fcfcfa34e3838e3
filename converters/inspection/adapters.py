"""PEFT and MLX adapters: their pairs, and everything that keeps other commands from using them.

The readers of both formats stop at the first thing that they can't use. Where they do, they are asked again about
every setting and every pair alone, so that what is told here is what they refuse.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from converters.adapters.gguf_check import ACTIVATED
from converters.adapters.lora import LoraPair
from converters.adapters.mlx import MlxAdapter, MlxConfig, open_mlx, parse_mlx_config
from converters.adapters.peft import PREFIX, PeftAdapter, open_peft
from converters.adapters.peft_config import Meaning, PeftConfig, parse_peft_config
from converters.errors import InputError, UnsupportedError
from converters.fingerprint import fingerprint
from converters.inspection.checkpoint import not_weights, stored_metadata
from converters.inspection.findings import listed, sentences, tied_note
from converters.inspection.record import Inspection, Module
from converters.inspection.values import json_values
from converters.names import natural_order
from converters.paths import parse_json_object, read_bytes
from converters.safetensors_file import SafetensorsFile

CONFIG = "adapter_config.json"
PEFT_WEIGHTS, MLX_WEIGHTS, PICKLE = "adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin"

_HALF = re.compile(r"\.lora_(?:embedding_)?[ABab](?=\.|$)")
_A_HALF = re.compile(r".+\.lora_(?:embedding_)?A(?:\.[^.]+)?(?:\.weight)?")
_RANKS = {"r", "rank_pattern"}
_SCALINGS = {*_RANKS, "peft_type", "lora_alpha", "use_rslora", "alpha_pattern"}
_MOST_SETTINGS = 1000  # looked at one by one; PEFT writes some 40
_MOST_TENSORS = 1 << 17  # likewise; adapters of the largest mixtures of experts have fewer
_ENDS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class _Files:
    """An adapter directory; `weights` is None where they are a pickle, `raw` where there is no configuration."""

    directory: Path
    config_bytes: bytes
    raw: Mapping[str, Any] | None
    weights: SafetensorsFile | None


@dataclass(frozen=True)
class _Parts:
    """An adapter taken apart: what is sound, and what is not."""

    pairs: Mapping[str, LoraPair]
    findings: Sequence[InputError]


def inspect_peft(directory: Path) -> Inspection:
    """A PEFT adapter directory, its configuration missing or not.

    Raises:
        FileMissingError: no weights are there. FormatError: their header or the configuration can't be parsed.
    """
    files = _files(directory, PEFT_WEIGHTS)
    try:
        parts = _Parts(open_peft(directory).pairs, ())
    except InputError as error:
        parts = _with_first(_peft_parts(files), error)
    return _inspection("peft", files, parts, _peft_warnings(files), _peft_notes(files))


def inspect_mlx(directory: Path) -> Inspection:
    """An MLX adapter directory; see `inspect_peft`."""
    files = _files(directory, MLX_WEIGHTS)
    try:
        parts = _Parts(open_mlx(directory).pairs, ())
    except InputError as error:
        parts = _with_first(_mlx_parts(files), error)
    return _inspection("mlx", files, parts, [], [])


def _files(directory: Path, weights: str) -> _Files:
    config, raw, config_bytes = directory / CONFIG, None, b""
    if config.exists():
        config_bytes = read_bytes(config, "the adapter's configuration")
        raw = parse_json_object(config_bytes, "the adapter's configuration", config)
    pickled = not (directory / weights).exists() and (directory / PICKLE).exists()
    return _Files(directory, config_bytes, raw, None if pickled else SafetensorsFile(directory / weights))


def _with_first(parts: _Parts, error: InputError) -> _Parts:
    """The parts, with the refusal of the whole first unless one of the parts met it too."""
    if any((error.message, error.tensor) == (told.message, told.tensor) for told in parts.findings):
        return parts
    return _Parts(parts.pairs, (error, *parts.findings))


def _peft_parts(files: _Files) -> _Parts:
    path = files.directory / CONFIG
    settings = {} if files.raw is None else {"peft_type": None, **_first(files.raw)}
    refused = _refused(settings, lambda setting: parse_peft_config({"peft_type": "LORA", **setting}, path))
    findings = list(refused.values())
    if files.weights is None:  # which is what the whole is refused for, unless something else comes first
        return _Parts({}, [*findings, *([_pickle(files.directory)] if findings or not settings else [])])
    usable = {key: value for key, value in settings.items() if key not in refused}
    config = parse_peft_config({**usable, "peft_type": "LORA"}, path)
    try:
        meanings = config.meanings([_module_of(names) for names in _groups(files.weights).values()])
    except InputError as error:  # a pattern without end
        findings.append(error)
        meanings = {}
    if not settings or _RANKS & refused.keys():
        meanings = {}
    scaled = not _SCALINGS & refused.keys()
    return _singly(files.weights, _PeftReader(files.directory, config, meanings, scaled).read, findings)


def _pickle(directory: Path) -> UnsupportedError:
    told = "is a pickle, which can run code when opened: no command reads it"
    return UnsupportedError(told, file=directory / PICKLE)


@dataclass(frozen=True)
class _PeftReader:
    """Reads one pair at a time, by the sound part of a configuration.

    Attributes:
        meanings: by module; empty where ranks can't be told, and the tensors' own are taken.
        scaled: whether the scaling follows from the configuration.
    """

    directory: Path
    config: PeftConfig
    meanings: Mapping[str, Meaning]
    scaled: bool

    def read(self, part: SafetensorsFile) -> Mapping[str, LoraPair]:
        meaning = self.meanings.get(_module_of(list(part.infos)))
        rank = _stored_rank(part) if meaning is None else meaning.rank
        config = replace(self.config, r=rank, rank_pattern={}, alpha_pattern={})
        pairs = PeftAdapter(self.directory, b"", config, part).pairs
        scaling = meaning.scaling if self.scaled and meaning is not None else math.nan
        return {name: replace(pair, scaling=scaling) for name, pair in pairs.items()}


def _stored_rank(part: SafetensorsFile) -> int:
    shapes = [info.shape for name, info in part.infos.items() if _A_HALF.fullmatch(name)]
    return max(1, shapes[0][0]) if shapes and shapes[0] else 1


def _mlx_parts(files: _Files) -> _Parts:
    assert files.weights is not None, "MLX saves no pickles"
    path, settings = files.directory / CONFIG, _first(files.raw)
    parameters = settings.pop("lora_parameters", None)
    refused = _refused(settings, lambda setting: parse_mlx_config({"lora_parameters": {}, **setting}, path))
    inner = _refused(
        _first(parameters) if isinstance(parameters, dict) else {},
        lambda setting: parse_mlx_config({"lora_parameters": {"scale": 1.0, **setting}}, path),
    )
    config = MlxConfig(math.nan, None, None)
    if isinstance(parameters, dict) and not {"scale", "alpha", "rank"} & inner.keys():
        plain = {"fine_tune_type": "lora", "use_dora": False}  # in place of what is refused
        usable = {key: plain.get(key) if key in refused else value for key, value in settings.items()}
        usable.pop("peft_type", None)
        with contextlib.suppress(InputError):  # which the whole has met as well
            config = parse_mlx_config({**usable, "lora_parameters": parameters}, path)

    def read(part: SafetensorsFile) -> Mapping[str, LoraPair]:
        return MlxAdapter(files.directory, b"", config, part).pairs

    return _singly(files.weights, read, [*refused.values(), *inner.values()])


def _first(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that are looked at one by one."""
    return {} if settings is None else dict(islice(settings.items(), _MOST_SETTINGS))


def _refused(settings: Mapping[str, Any], parse: Callable[[dict[str, Any]], object]) -> dict[str, InputError]:
    """What is wrong with each setting by itself."""
    refused = {}
    for key, value in settings.items():
        try:
            parse({key: value})
        except InputError as error:
            refused[key] = error
    return refused


def _groups(weights: SafetensorsFile) -> dict[str, list[str]]:
    """Tensor names that may be a pair, by what they have in common."""
    groups: dict[str, list[str]] = {}
    for name in weights.infos:
        groups.setdefault(_HALF.sub(".lora_", name), []).append(name)
    return groups


def _module_of(names: Sequence[str]) -> str:
    """What PEFT calls the module that a pair belongs to, in its patterns."""
    plain = names[0].removeprefix(PREFIX)
    halves = list(_HALF.finditer(plain))
    return plain[: halves[-1].start()] if halves else plain


def _singly(
    weights: SafetensorsFile, read: Callable[[SafetensorsFile], Mapping[str, LoraPair]], findings: Sequence[InputError]
) -> _Parts:
    """Every pair read by itself."""
    pairs: dict[str, LoraPair] = {}
    found = list(findings)
    if len(weights.infos) > _MOST_TENSORS:
        told = f"has {len(weights.infos)} tensors; at most {_MOST_TENSORS} are looked at one by one"
        return _Parts({}, [*found, UnsupportedError(told, file=weights.path)])
    for names in _groups(weights).values():
        part = copy.copy(weights)
        part.header = replace(weights.header, infos={name: weights.infos[name] for name in names})
        try:
            pairs.update(read(part))
        except InputError as error:
            if error.tensor is not None:  # else it is no pair, and nothing that speaks against any
                found.append(error)
    return _Parts(pairs, found)


def _inspection(
    kind: Literal["peft", "mlx"], files: _Files, parts: _Parts, warnings: Sequence[str], notes: Sequence[str]
) -> Inspection:
    weights = [] if files.weights is None else [files.weights]
    tensors = tuple(info for file in weights for info in file.infos.values())
    paths = [file.path for file in weights] or [files.directory / PICKLE]
    modules = sorted(parts.pairs.values(), key=lambda pair: natural_order(pair.module))
    return Inspection(
        path=files.directory,
        kind="adapter",
        format=kind,
        architecture=None,
        files=tuple((path, path.stat().st_size) for path in paths),
        fingerprint=fingerprint(weights, extra=files.config_bytes),
        metadata=json_values({**(files.raw or {}), **stored_metadata(weights)}),
        tensors=tensors,
        modules=tuple(_module(pair) for pair in modules),
        warnings=(*sentences(parts.findings, files.directory), *warnings, *not_weights(tensors)),
        notes=(*notes, *_end_notes(modules)),
    )


def _module(pair: LoraPair) -> Module:
    scaling = None if math.isnan(pair.scaling) else pair.scaling
    return Module(pair.module, pair.key, pair.rank, scaling, pair.shape, pair.embedding)


def _end_notes(pairs: Sequence[LoraPair]) -> list[str]:
    ends = [pair.module for pair in pairs if pair.module.rpartition(".")[2] in _ENDS]
    return [tied_note(ends)] if ends else []


def _peft_warnings(files: _Files) -> list[str]:
    return [ACTIVATED] if files.raw is not None and files.raw.get("alora_invocation_tokens") else []


def _peft_notes(files: _Files) -> list[str]:
    notes = []
    meant = [key for key in ("use_rslora", "alpha_pattern") if files.raw is not None and files.raw.get(key)]
    if meant:
        notes.append(
            f"{' and '.join(meant)}: llama.cpp's convert_lora_to_gguf.py passes over it and writes another strength; "
            f"the scalings here, and in what project writes, are PEFT's"
        )
    saved = [name for name in (files.weights.infos if files.weights else ()) if name.endswith(".base_layer.weight")]
    if saved:
        notes.append(f"{listed(saved)}: the base model's own weights, saved along unchanged")
    return notes

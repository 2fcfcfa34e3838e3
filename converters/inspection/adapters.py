"""PEFT and MLX adapters: their pairs, what other commands leave out, and everything that keeps them from using it.

What is told is what the readers of both formats refuse, not the first of it alone: the settings are given to them one
by one; PEFT's reader goes on where it can't use a tensor, and MLX's, which stops there, is asked about every pair.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from converters.adapters.gguf_check import ACTIVATED
from converters.adapters.gguf_pairs import MAX_PAIRS
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.mlx import MlxConfig, open_mlx, parse_mlx_config
from converters.adapters.mlx_pairs import mlx_magnitudes, mlx_pairs
from converters.adapters.peft import PeftAdapter, refused_pickle
from converters.adapters.peft_config import Meaning, PeftConfig, parse_peft_config
from converters.errors import FormatError, InputError, UnsupportedError
from converters.fingerprint import fingerprint
from converters.inspection.checkpoint import not_weights, stored_metadata
from converters.inspection.findings import listed, sentences, tied_note
from converters.inspection.record import Inspection, Module
from converters.inspection.values import json_values
from converters.inspection.whole import whole_notes
from converters.names import natural_order
from converters.paths import parse_json_object, read_bytes
from converters.safetensors_file import SafetensorsFile

CONFIG = "adapter_config.json"
PEFT_WEIGHTS, MLX_WEIGHTS, PICKLE = "adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin"

_MLX_PART = re.compile(r"(.+)\.(lora_[ab]|m)")
_RANKS = {"r", "rank_pattern"}
_SCALINGS = {*_RANKS, "peft_type", "lora_alpha", "use_rslora", "alpha_pattern"}
_MOST_SETTINGS = 1000  # looked at one by one; PEFT writes some 40
_MOST_TENSORS = 20_000  # of MLX, likewise; it stacks its experts
_MOST_FINDINGS = 20_000  # in a PEFT adapter's tensors
_ENDS = ("embed_tokens", "lm_head")
_DORA = (
    "uses DoRA, whose update has no low rank: convert adapter and project write the nearest plain pairs, and need the "
    "weights of the model that it was trained on, in safetensors; merge applies it exactly; smoke and llama.cpp know "
    "nothing of it"
)


@dataclass(frozen=True)
class _Files:
    """An adapter directory; `weights` is None where they are a pickle, `raw` where there is no configuration."""

    directory: Path
    config_bytes: bytes
    raw: Mapping[str, Any] | None
    weights: SafetensorsFile | None


@dataclass(frozen=True)
class _Parts:
    """An adapter taken apart: what is sound, and what is not.

    Attributes:
        losses: what belongs to its update and to no pair; a sentence each.
        notes: what else its reader says of it.
        dora: whether it is DoRA, whose update is not that of its pairs.
    """

    pairs: Mapping[str, LoraPair]
    findings: Sequence[InputError]
    losses: Sequence[str] = ()
    notes: Sequence[str] = ()
    dora: bool = False

    @classmethod
    def of(cls, adapter: LoraAdapter, findings: Sequence[InputError] = ()) -> _Parts:
        return cls(adapter.pairs, findings, adapter.losses, adapter.notes, bool(adapter.magnitudes))


def inspect_peft(directory: Path) -> Inspection:
    """A PEFT adapter directory, its configuration missing or not.

    Raises:
        FileMissingError: no weights are there. FormatError: their header or the configuration can't be parsed.
    """
    files = _files(directory, PEFT_WEIGHTS)
    parts = _peft_parts(files)
    return _inspection("peft", files, parts, _peft_warnings(files), _peft_notes(files))


def inspect_mlx(directory: Path) -> Inspection:
    """An MLX adapter directory; see `inspect_peft`."""
    files = _files(directory, MLX_WEIGHTS)
    try:
        parts = _Parts.of(open_mlx(directory, dora=True))
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
    return replace(parts, findings=(error, *parts.findings))


def _peft_parts(files: _Files) -> _Parts:
    settings = {} if files.raw is None else {"peft_type": None, **_first(files.raw)}
    config, refused, findings = _peft_config(files, settings)
    if files.weights is None:  # which is what the whole is refused for, unless something else comes first
        return _Parts({}, [*findings, refused_pickle(files.directory)], dora=config.use_dora)

    def meanings(modules: Sequence[str]) -> Mapping[str, Meaning]:
        if not settings or _RANKS & refused:
            return {}
        try:
            found = config.meanings(modules)
        except InputError as error:  # a pattern without end
            tell(error)
            return {}
        unscaled = bool(_SCALINGS & refused)
        return {name: replace(each, scaling=math.nan) for name, each in found.items()} if unscaled else found

    def tell(error: InputError) -> None:
        if len(findings) == _MOST_FINDINGS:
            findings.append(FormatError(f"has more defects than the {_MOST_FINDINGS} that are told", file=error.file))
        elif len(findings) < _MOST_FINDINGS:
            findings.append(error.with_traceback(None))  # which would hold what the reader had in hand

    adapter = PeftAdapter(files.directory, files.config_bytes, config, files.weights, meanings=meanings, tell=tell)
    parts = _Parts.of(adapter, findings)
    used = () if findings or files.raw is None else whole_notes(adapter, tell)
    return replace(parts, dora=config.use_dora, notes=(*parts.notes, *used))


def _peft_config(files: _Files, settings: Mapping[str, Any]) -> tuple[PeftConfig, set[str], list[InputError]]:
    """The sound part of a configuration; the settings that are refused; and why, the whole's refusal first."""
    path = files.directory / CONFIG
    try:
        if files.raw is None:
            read_bytes(path, "the adapter's configuration")  # which says why it can't be
        return parse_peft_config(files.raw or {}, path, dora=True), set(), []
    except InputError as error:
        first = error
    refused = _refused(settings, lambda setting: parse_peft_config({"peft_type": "LORA", **setting}, path, dora=True))
    usable = {key: value for key, value in settings.items() if key not in refused}
    config = parse_peft_config({**usable, "peft_type": "LORA"}, path, dora=True)
    return config, set(refused), list(_with_first(_Parts({}, list(refused.values())), first).findings)


def _mlx_parts(files: _Files) -> _Parts:
    assert files.weights is not None, "MLX saves no pickles"
    path, settings = files.directory / CONFIG, _first(files.raw)
    parameters = settings.pop("lora_parameters", None)
    refused = _refused(settings, lambda setting: parse_mlx_config({"lora_parameters": {}, **setting}, path, dora=True))
    inner = _refused(
        _first(parameters) if isinstance(parameters, dict) else {},
        lambda setting: parse_mlx_config({"lora_parameters": {"scale": 1.0, **setting}}, path, dora=True),
    )
    dora = settings.get("fine_tune_type", "dora" if settings.get("use_dora") else "lora") == "dora"
    config = MlxConfig(math.nan, None, None, dora)
    if isinstance(parameters, dict) and not {"scale", "alpha", "rank"} & inner.keys():
        plain = {"fine_tune_type": "lora", "use_dora": False}  # in place of what is refused
        usable = {key: plain.get(key) if key in refused else value for key, value in settings.items()}
        usable.pop("peft_type", None)
        with contextlib.suppress(InputError):  # which the whole has met as well
            config = parse_mlx_config({**usable, "lora_parameters": parameters}, path, dora=True)

    return _singly(files.weights, config, [*refused.values(), *inner.values()])


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


def _singly(weights: SafetensorsFile, config: MlxConfig, findings: Sequence[InputError]) -> _Parts:
    """Every pair of an MLX adapter, with its magnitudes, or every stack read by itself."""
    pairs: dict[str, LoraPair] = {}
    found = list(findings)
    if len(weights.infos) > _MOST_TENSORS:
        told = f"has {len(weights.infos)} tensors; at most {_MOST_TENSORS} are looked at one by one"
        return _Parts({}, [*found, UnsupportedError(told, file=weights.path)])
    for names in _groups(weights, config).values():
        part = copy.copy(weights)
        part.header = replace(weights.header, infos={name: weights.infos[name] for name in names})
        try:
            own = mlx_pairs(part, config.scaling, config.rank, dora=config.dora)
            pairs.update(own)
            if config.dora:
                mlx_magnitudes(part, own)
        except InputError as error:
            alone = FormatError("has magnitudes and no pair", file=weights.path, tensor=names[0])
            found.append(alone if error.tensor is None else error.with_traceback(None))
        if len(pairs) > MAX_PAIRS:  # which the whole is refused for
            break
    ordered = sorted(pairs.values(), key=lambda pair: natural_order(pair.weight))
    return _Parts({pair.module: pair for pair in ordered}, found, dora=config.dora)


def _groups(weights: SafetensorsFile, config: MlxConfig) -> dict[str, list[str]]:
    """Tensor names that may be a pair, by their module; others by themselves."""
    groups: dict[str, list[str]] = {}
    for name in weights.infos:
        match = _MLX_PART.fullmatch(name)
        groups.setdefault(match[1] if match and (match[2] != "m" or config.dora) else name, []).append(name)
    return groups


def _inspection(
    kind: Literal["peft", "mlx"], files: _Files, parts: _Parts, warnings: Sequence[str], notes: Sequence[str]
) -> Inspection:
    weights = [] if files.weights is None else [files.weights]
    tensors = tuple(info for file in weights for info in file.infos.values())
    paths = [file.path for file in weights] or [files.directory / PICKLE]
    modules = _modules(parts.pairs.values())
    return Inspection(
        path=files.directory,
        kind="adapter",
        format=kind,
        architecture=None,
        files=tuple((path, path.stat().st_size) for path in paths),
        fingerprint=fingerprint(weights, extra=files.config_bytes),
        metadata=json_values({**(files.raw or {}), **stored_metadata(weights)}),
        tensors=tensors,
        modules=tuple(modules),
        warnings=(*sentences(parts.findings, files.directory), *parts.losses, *warnings, *not_weights(tensors)),
        notes=(*([_DORA] if parts.dora else []), *parts.notes, *notes, *_end_notes(modules)),
    )


def _modules(pairs: Collection[LoraPair]) -> list[Module]:
    """One for each adapted weight: all experts of a stack are one."""
    experts = Counter(pair.weight for pair in pairs if pair.expert is not None)
    return [
        Module(
            name=pair.weight,
            key=pair.key,
            rank=pair.rank,
            scaling=None if math.isnan(pair.scaling) else pair.scaling,
            shape=pair.shape,
            embedding=pair.embedding,
            experts=None if pair.expert is None else experts[pair.weight],
        )
        for pair in pairs
        if not pair.expert  # an ordinary weight's, or a stack's first
    ]


def _end_notes(modules: Sequence[Module]) -> list[str]:
    ends = [module.name for module in modules if module.name.rpartition(".")[2] in _ENDS]
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
        notes.append(f"{listed(saved)}: the base model's own weights, saved along; merge takes those that differ from "
                     f"its model's: a vocabulary that was resized")  # fmt: skip
    return notes

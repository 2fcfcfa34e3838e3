"""Hugging Face models: directories, shards and single .safetensors files, complete or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converters.adapters.gguf_check import Finding
from converters.checkpoint import open_checkpoint
from converters.errors import FileMissingError, FormatError, UnsupportedError
from converters.fingerprint import fingerprint
from converters.inspection.findings import FLOATS, TIED, listed, sentences, unreadable
from converters.inspection.gguf import table_notes
from converters.inspection.record import Inspection
from converters.inspection.values import encodable, json_values
from converters.paths import read_json_object
from converters.safetensors_file import SafetensorsFile
from converters.tensors import TensorInfo

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_QUANTIZED = (
    "no weights as they are; a checkpoint quantized by bitsandbytes, GPTQ, AWQ or to FP8 must be dequantized first"
)


def inspect_checkpoint(path: Path) -> Inspection:
    """A model directory or a .safetensors file; without its config.json only the tensors can be told.

    Raises:
        FileMissingError: a directory without weights, or a shard is missing.
        FormatError: a header, the index or config.json is damaged.
    """
    try:
        model = open_checkpoint(path)
    except FileMissingError as error:
        return _loose(path, error)
    except UnsupportedError as error:
        return _pickled(path, error)
    findings: list[Finding] = []
    try:
        _ = model.architecture
    except FormatError as error:
        findings.append(error)
    architecture = _named(model.config)
    notes = table_notes(architecture, "Hugging Face's")
    if model.tied_embeddings:
        notes.append(TIED)
    tensors = list(model.infos.values())
    return _inspection(path, model.files, tensors, config=model.config, findings=findings, notes=notes)


def _loose(path: Path, error: FileMissingError) -> Inspection:
    """The tensors alone, where what says how they belong together is missing."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    lost_config = error.file is not None and Path(error.file).name == CONFIG
    if not files or not files[0].exists() or ((path / _INDEX).exists() and not lost_config):
        raise error
    found = [SafetensorsFile(file) for file in files]
    config = {} if lost_config or path.is_file() else _config(path)
    tensors = [info for file in found for info in file.infos.values()]
    return _inspection(
        path, found, tensors, config=config, findings=[error if not lost_config else _without_config(error)]
    )


def _without_config(error: FileMissingError) -> FileMissingError:
    told = f"{error.message}; without it nobody can tell the architecture, and other commands refuse the model"
    return FileMissingError(told, file=error.file)


def _pickled(path: Path, error: UnsupportedError) -> Inspection:
    """A model in pickle files, which are never opened."""
    files = sorted(path.glob("*.bin")) if path.is_dir() else []
    if not files:
        raise error
    config = _config(path)
    return Inspection(
        path=path,
        kind="model",
        format="pickle",
        architecture=_named(config),
        files=tuple((file, file.stat().st_size) for file in files),
        fingerprint=fingerprint([]),
        metadata=json_values(config),
        tensors=(),
        warnings=sentences([error], path),
    )


def _config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    return read_json_object(file, "the model's config.json") if file.exists() else {}


def _named(config: dict[str, Any]) -> str | None:
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else None
    return encodable(first)[:200] if isinstance(first, str) else None


def _inspection(
    path: Path,
    files: Sequence[SafetensorsFile],
    tensors: Sequence[TensorInfo],
    *,
    config: dict[str, Any],
    findings: Sequence[Finding],
    notes: Sequence[str] = (),
) -> Inspection:
    halves = [info.name for info in tensors if ".lora_" in info.name]
    return Inspection(
        path=path,
        kind="adapter" if halves else "model",
        format="safetensors",
        architecture=_named(config),
        files=tuple((file.path, file.path.stat().st_size) for file in files),
        fingerprint=fingerprint(files),
        metadata=json_values({**config, **stored_metadata(files)}),
        tensors=tuple(tensors),
        warnings=(*sentences(findings, path), *_stray(halves), *not_weights(tensors)),
        notes=tuple(notes),
    )


def stored_metadata(files: Sequence[SafetensorsFile]) -> dict[str, Any]:
    """The free-form metadata of the first file that has any, under the name that its header gives it."""
    return next(({"__metadata__": file.header.metadata} for file in files if file.header.metadata), {})


def not_weights(tensors: Sequence[TensorInfo]) -> list[str]:
    """A sentence for every type that no command reads."""
    return unreadable((info for info in tensors if info.dtype not in FLOATS), {}, _QUANTIZED)


def _stray(halves: Sequence[str]) -> list[str]:
    told = (
        "halves of LoRA pairs; an adapter is used by its directory, with adapter_config.json beside "
        "adapter_model.safetensors (PEFT) or adapters.safetensors (MLX)"
    )
    return [f"{listed(halves)}: {told}"] if halves else []

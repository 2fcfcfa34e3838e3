"""What a path names, told apart by what is there: more leniently than by those who open it for use."""

from __future__ import annotations

from pathlib import Path

from converters.errors import FileMissingError, UnsupportedError, system_reason
from converters.inspection.adapters import CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS, PICKLE, inspect_mlx, inspect_peft
from converters.inspection.checkpoint import inspect_checkpoint
from converters.inspection.gguf import inspect_gguf
from converters.inspection.record import Inspection
from converters.paths import existing, is_gguf, without_collecting

_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")


def inspect_path(path: str | Path) -> Inspection:
    """What a model or an adapter of any format holds; reads headers and configurations only.

    Whatever keeps llama.cpp or other functions from using it becomes a warning as long as the headers are sound.

    Raises:
        FileMissingError: it or a part of it is missing.
        FormatError: a header or a configuration is damaged.
        UnsupportedError: a file of another format.
    """
    found = existing(path, "the model or adapter")
    try:
        with without_collecting():
            return _directory(found) if found.is_dir() else _file(found)
    except OSError as error:  # a directory that may not be entered, a file that goes meanwhile
        raise FileMissingError(f"can't be read: {system_reason(error)}", file=error.filename or found) from None


def _directory(path: Path) -> Inspection:
    if (path / MLX_WEIGHTS).exists():
        return inspect_mlx(path)
    if any((path / name).exists() for name in (PEFT_WEIGHTS, PICKLE)):
        return inspect_peft(path)
    if (path / CONFIG).exists() and not any((path / name).exists() for name in _MODEL_FILES):
        told = f"holds {CONFIG} and neither {PEFT_WEIGHTS} nor {MLX_WEIGHTS}"
        raise FileMissingError(told, file=path)
    return inspect_checkpoint(path)


def _file(path: Path) -> Inspection:
    if is_gguf(path):
        return inspect_gguf(path)
    if path.name == PEFT_WEIGHTS:
        return inspect_peft(path.parent)
    if path.name == MLX_WEIGHTS:
        return inspect_mlx(path.parent)
    if path.suffix != ".safetensors":
        told = "is no GGUF file, no .safetensors file and no directory; nothing else is read"
        raise UnsupportedError(told, file=path)
    return inspect_checkpoint(path)

"""What a path names: models and adapters of every format, told apart by what is there."""

from __future__ import annotations

from pathlib import Path

from converters.adapters.gguf import open_gguf_adapter
from converters.adapters.lora import LoraAdapter
from converters.adapters.mlx import is_mlx, open_mlx
from converters.adapters.peft import open_peft
from converters.checkpoint import open_checkpoint
from converters.errors import FileMissingError
from converters.gguf_model import open_gguf_model
from converters.models import Model
from converters.paths import existing, is_gguf


def open_model(path: str | Path) -> Model:
    """Opens a model: a directory with config.json and safetensors, a .safetensors file with config.json beside it,
    a .gguf file, or the first shard of a split one. Reads headers only.

    Raises:
        FileMissingError: it, or a part of it, is missing.
        FormatError: a header is damaged.
        UnsupportedError: sound, but no model that is read here.
    """
    found = existing(path, "the model")
    return open_gguf_model(found) if is_gguf(found) else open_checkpoint(found)


def open_adapter(path: str | Path, *, dora: bool = False) -> LoraAdapter:
    """Opens an adapter: a PEFT directory, an MLX directory, or a GGUF file. Reads headers only.

    Args:
        dora: see `open_peft`.

    Raises:
        FileMissingError: it, or a part of it, is missing.
        FormatError: a header or the configuration is damaged, or the two contradict each other.
        UnsupportedError: it holds what pairs can't express, named in the message.
    """
    found = existing(path, "the adapter")
    if is_gguf(found):
        return open_gguf_adapter(found)
    if found.is_file():
        raise FileMissingError("is a file, expected a directory with adapter_config.json or a .gguf file", file=found)
    return open_mlx(found, dora=dora) if is_mlx(found) else open_peft(found, dora=dora)

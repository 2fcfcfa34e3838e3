"""What model an adapter is for, when nothing of it is at hand but a configuration or a header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.adapters.lora import LoraAdapter
from converters.architectures import HeadCounts
from converters.checkpoint import open_checkpoint
from converters.errors import FileMissingError, InputError, UnsupportedError
from converters.gguf_model import open_gguf_model
from converters.model_config import class_of, experts_of, heads_of, repositories_of, width_of
from converters.models import Layout, ModelDescription
from converters.paths import existing, is_gguf, read_json_object

_CONFIG = "config.json"


class ConfiguredModel:
    """A model known by its config.json alone (a `ModelDescription`)."""

    layout: Layout = "hugging_face"

    def __init__(self, path: Path, config_file: Path) -> None:
        self.path = path
        self.described_by = config_file
        self._config: dict[str, Any] = read_json_object(config_file, "the model's config.json")

    @property
    def architecture(self) -> str:
        return class_of(self._config, self.described_by)

    @property
    def model_class(self) -> str:
        return self.architecture

    @property
    def tied_embeddings(self) -> bool:
        """What the configuration says; transformers leaves the key out where it is true."""
        inner = self._config.get("text_config")
        table = inner if isinstance(inner, dict) and "tie_word_embeddings" in inner else self._config
        return table.get("tie_word_embeddings", True) is not False

    @property
    def repositories(self) -> tuple[str, ...]:
        return repositories_of(self._config)

    @property
    def sources(self) -> tuple[Path, ...]:
        return (self.described_by,)

    @property
    def experts(self) -> int:
        return experts_of(self._config)

    @property
    def width(self) -> int | None:
        return width_of(self._config)

    def heads(self) -> HeadCounts:
        return heads_of(self._config, self.described_by)


class UnnamedModel:
    """The model of a GGUF adapter that came alone (a `ModelDescription`): its architecture is all that is known."""

    layout: Layout = "gguf"
    model_class: str | None = None
    tied_embeddings = False
    repositories: tuple[str, ...] = ()
    width: int | None = None

    def __init__(self, adapter: LoraAdapter, architecture: str) -> None:
        self.path = self.described_by = adapter.path
        self.sources = (adapter.tensor_file,)
        self.architecture = architecture
        self.experts = max((pair.expert + 1 for pair in adapter.pairs.values() if pair.expert is not None), default=0)

    def heads(self) -> HeadCounts:
        """Raises UnsupportedError: they are not known."""
        raise UnsupportedError(
            f"says nothing of the attention heads of its model, which {self.architecture} needs to reorder rows; name "
            f"the model with --base (its config.json or its GGUF file)",
            file=self.path,
        )


def describe_model(path: str | Path) -> ModelDescription:
    """A model by its GGUF file, its directory, or its config.json; weights need not be there, nor be sound.

    Raises:
        FileMissingError: there is no config.json. FormatError: it, or the GGUF header, is damaged.
    """
    found = existing(path, "the base model")
    if is_gguf(found):
        return open_gguf_model(found)
    config = found if found.name == _CONFIG else (found if found.is_dir() else found.parent) / _CONFIG
    try:
        return open_checkpoint(found)  # whose tensors tell more than the configuration
    except InputError:
        return ConfiguredModel(found, config)


def model_of(adapter: LoraAdapter, base: str | Path | None) -> ModelDescription:
    """The model that an adapter is for: `base`, or what stands beside the adapter or is named in it and is there.

    Raises:
        FileMissingError: nothing says which model it is.
    """
    if base is not None:
        return describe_model(base)
    beside = (adapter.path if adapter.path.is_dir() else adapter.path.parent) / _CONFIG
    if beside.is_file():
        return describe_model(beside)
    if adapter.architecture is not None:
        return UnnamedModel(adapter, adapter.architecture)
    named = adapter.base_model_name
    if named is not None and (Path(named) / _CONFIG).is_file():
        return describe_model(named)
    told = f" ({named!r} is no directory here)" if named else ""
    raise FileMissingError(
        f"nothing beside it says for which model it is{told}; name the model with --base: its config.json, its "
        f"directory, or a GGUF file of it",
        file=adapter.path,
    )

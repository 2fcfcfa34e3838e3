"""What model an adapter is for, when nothing of it is at hand but a configuration or a header."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converters.adapters.belonging import check_sizes
from converters.adapters.lora import LoraAdapter
from converters.architectures import HeadCounts
from converters.checkpoint import open_checkpoint
from converters.errors import FileMissingError, InputError, UnsupportedError
from converters.gguf_model import GgufModel, describe_gguf_model
from converters.model_config import class_of, experts_of, heads_of, repositories_of, sizes_of, ties_of, width_of
from converters.models import Layout, ModelDescription, ModelSizes
from converters.paths import existing, is_gguf, read_json_object

_CONFIG = "config.json"
_MOST_FILES = 48  # whose headers are read to find a model among them
_MOST_NAMES = 5


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
        """What the configuration says, or what most models do whose configuration may leave it out."""
        return ties_of(self._config) is not False

    @property
    def ties_assumed(self) -> str | None:
        if ties_of(self._config) is not None:
            return None
        return (
            f'{self.described_by} has no "tie_word_embeddings"; if the model has an output matrix of its own, add '
            f'"tie_word_embeddings": false there'
        )

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

    def sizes(self) -> ModelSizes:
        return sizes_of(self._config)

    def heads(self) -> HeadCounts:
        return heads_of(self._config, self.described_by)


class UnnamedModel:
    """The model of a GGUF adapter that came alone (a `ModelDescription`): its architecture is all that is known.

    Args:
        candidates: GGUF models beside it, of which none stands out.
    """

    layout: Layout = "gguf"
    model_class: str | None = None
    tied_embeddings = False
    ties_assumed: str | None = None
    repositories: tuple[str, ...] = ()
    width: int | None = None

    def __init__(self, adapter: LoraAdapter, architecture: str, candidates: Sequence[ModelDescription] = ()) -> None:
        self.path = self.described_by = adapter.path
        self.sources = (adapter.tensor_file,)
        self.architecture = architecture
        self._candidates = candidates
        self.experts = max((pair.expert + 1 for pair in adapter.pairs.values() if pair.expert is not None), default=0)

    def sizes(self) -> ModelSizes:
        return ModelSizes()

    def heads(self) -> HeadCounts:
        """Raises UnsupportedError: they are not known."""
        found = f", and {_several(self._candidates)} lie beside it" if self._candidates else ""
        raise UnsupportedError(
            f"says nothing of the attention heads of its model, which {self.architecture} needs to reorder rows"
            f"{found}; name the model with --base (its config.json or its GGUF file)",
            file=self.path,
        )


def describe_model(path: str | Path) -> ModelDescription:
    """A model by its GGUF file, its directory, or its config.json; weights need not be there, nor be sound.

    Raises:
        FileMissingError: there is no config.json. FormatError: it, or the GGUF header, is damaged.
    """
    found = existing(path, "the base model")
    if is_gguf(found):
        return describe_gguf_model(found)
    config = found if found.name == _CONFIG else (found if found.is_dir() else found.parent) / _CONFIG
    try:
        return open_checkpoint(found)  # whose tensors tell more than the configuration
    except InputError:
        return ConfiguredModel(found, config)


def model_of(adapter: LoraAdapter, base: str | Path | None) -> ModelDescription:
    """The model that an adapter is for: `base`, or what stands beside the adapter or is named in it and is there.

    Beside it that is a config.json, or the only GGUF model there.

    Raises:
        FileMissingError: nothing says which model it is, or several GGUF models could be it.
    """
    if base is not None:
        return describe_model(base)
    place = adapter.path if adapter.path.is_dir() else adapter.path.parent
    if (place / _CONFIG).is_file():
        return describe_model(place / _CONFIG)
    named = adapter.base_model_name
    if adapter.architecture is None and named is not None and (Path(named) / _CONFIG).is_file():
        return describe_model(named)
    models = _gguf_models(place, adapter)
    if len(models) == 1:
        return models[0]
    if adapter.architecture is not None:
        return UnnamedModel(adapter, adapter.architecture, models)
    told = f" ({named!r} is no directory here)" if named else ""
    told += f", and {_several(models)} lie there" if models else ""
    raise FileMissingError(
        f"nothing beside it says for which model it is{told}; name the model with --base: its config.json, its "
        f"directory, or a GGUF file of it",
        file=adapter.path,
    )


def _gguf_models(place: Path, adapter: LoraAdapter) -> list[GgufModel]:
    """The GGUF models in a directory that an adapter can be for, by name; adapters and damaged files are passed over.

    A GGUF adapter can do without one, so that one which doesn't fit is none of its concern.
    """
    try:
        files = sorted(file for file in place.iterdir() if file.suffix.lower() == ".gguf")
    except OSError:
        return []
    models = []
    for file in files if len(files) <= _MOST_FILES else ():
        try:
            model = describe_gguf_model(file)
            if adapter.architecture is not None:
                if adapter.architecture != model.architecture:
                    continue
                check_sizes(adapter, model)
        except InputError:
            continue
        models.append(model)
        if len(models) > _MOST_NAMES:  # enough to know that none stands out; large vocabularies take their time
            break
    return models


def _several(models: Sequence[ModelDescription]) -> str:
    names = [model.path.name for model in models]
    return f"several GGUF models ({', '.join(names[:_MOST_NAMES])}{', ...' if len(names) > _MOST_NAMES else ''})"

"""What a model is called: names for metadata and for files, never a path of somebody's machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gguf.metadata import Metadata
from gguf.utility import naming_convention

from converters.paths import resolved

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_ANONYMOUS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|config\.json")
_UNFIT_FOR_FILES = re.compile(r"[^\w.+-]+")
_LONGEST_NAME = 96


@dataclass(frozen=True)
class ModelIdentity:
    """A model's name, and where it is published if that is known.

    Attributes:
        name: the part after the organization, `Llama-2-7b-chat-hf`.
    """

    name: str
    organization: str | None = None


def identify(candidates: tuple[str | None, ...], path: Path) -> ModelIdentity:
    """The first candidate that is a repository's name, `organization/model`; else the path's own last part."""
    for candidate in candidates:
        if candidate is not None and is_repository(candidate):
            organization, name = candidate.split("/")
            return ModelIdentity(name, organization)
    return ModelIdentity(plain_name(path))


def is_repository(name: str) -> bool:
    """Whether this reads as `organization/model`, and not as a path of somebody's machine."""
    return _REPOSITORY.fullmatch(name) is not None


def plain_name(path: Path) -> str:
    """A path's last part, without an ending that names a format; a file that is just `model` has its directory's."""
    path = resolved(path)
    name = path.parent.name if _ANONYMOUS.fullmatch(path.name) else path.name
    for ending in (".safetensors", ".gguf"):
        name = name.removesuffix(ending)
    return name[:_LONGEST_NAME] or "model"


def adapter_file_name(base: ModelIdentity, finetune: str, encoding: str) -> str:
    """`BaseName-SizeLabel-FineTune-Encoding-LoRA.gguf`, the naming convention of GGUF files."""
    full, _, basename, chat, version, size = Metadata.get_model_id_components(base.name)
    parts = "-".join(part for part in (chat, finetune) if part)
    stem = naming_convention(full, basename, parts, version, size, encoding, "LoRA")
    return _UNFIT_FOR_FILES.sub("-", stem).lstrip(".-") + ".gguf"

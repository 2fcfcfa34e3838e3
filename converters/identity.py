"""What models and adapters are called: names for metadata and for files, never a path of somebody's machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gguf.metadata import Metadata

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LINK = re.compile(r"https?://(?:www\.)?huggingface\.co/(?:datasets/)?([^/?#]+/[^/?#]+)/?")
_CACHED = re.compile(
    r"(?:^|[\\/])(?:models|datasets)--([^\\/]+?)--([^\\/]+)[\\/]snapshots[\\/][0-9a-f]{7,64}(?:[\\/]|$)"
)
_ANONYMOUS = re.compile(r"(model|adapter_model|adapters)(-\d+-of-\d+)?\.safetensors|(adapter_)?config\.json")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_QUANTIZED = re.compile(
    r"[-.](?:hf|gguf|gptq|awq|exl2|mlx|bnb|unsloth|(?:int)?[2-8]-?bits?|int[48]|b?fp?(?:8|16|32)|(?:mx|nv)fp4"
    r"|i?q\d(?:_\w+)*)$",
    re.IGNORECASE,
)
_CONTEXT_LIMIT = -16_000_000  # gguf's function takes a size under an eighth of this, `4k` or `1M`, for a context length
_LONGEST_NAME = 96


@dataclass(frozen=True)
class ModelIdentity:
    """A model's name, and where it is published if that is known.

    Attributes:
        name: the part after the organization, `Llama-2-7b-chat-hf`.
        url: a link that is all that is known of its place.
    """

    name: str
    organization: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class NameParts:
    """A model's name by the naming convention of GGUF files: `Llama-2`, `7B`, `chat`, None."""

    basename: str
    size_label: str | None = None
    finetune: str | None = None
    version: str | None = None


def identify(name: str) -> ModelIdentity:
    """What a repository's name, a link to it, or a path in the hub's cache is about; else a name alone, the last part
    of a path."""
    repository = repository_of(name)
    if repository is not None:
        organization, own = repository.split("/")
        return ModelIdentity(own, organization)
    url = name if name.startswith(("http://", "https://")) and name.isprintable() else None
    return ModelIdentity(_last_part(name), url=url)


def repository_of(name: str) -> str | None:
    """`organization/model` of a repository's name, a link to it, or a path in the hub's cache; None otherwise."""
    if is_repository(name):
        return name
    link, cached = _LINK.fullmatch(name), _CACHED.search(name)
    found = link[1] if link else f"{cached[1]}/{cached[2]}" if cached else ""
    return found if is_repository(found) else None


def is_repository(name: str) -> bool:
    """Whether this reads as `organization/model`, and not as a path of somebody's machine."""
    return _REPOSITORY.fullmatch(name) is not None


def plain_name(path: Path) -> str:
    """A path's last part, without an ending that names a format; a file that is just `model` has its directory's, and
    what lies in the hub's cache its repository's."""
    place = Path(os.path.abspath(path))  # noqa: PTH100  links keep their names: the cache links to files named by hash
    if _ANONYMOUS.fullmatch(place.name):
        place = place.parent
    cached = _CACHED.search(str(place))
    name = cached[2] if cached and cached.end() == len(str(place)) else place.name
    for ending in (".safetensors", ".gguf"):
        name = name.removesuffix(ending)
    return _SHARD.sub("", name)[:_LONGEST_NAME] or "model"


def name_parts(name: str) -> NameParts:
    """A model's name taken apart, without what says how its weights are stored: `-hf`, `-bnb-4bit`, `.Q4_K_M`."""
    while (shorter := _QUANTIZED.sub("", name)) != name and shorter:
        name = shorter
    full, _, basename, finetune, version, size = Metadata.get_model_id_components(
        name.replace(" ", "-"), _CONTEXT_LIMIT
    )
    if basename is None or (size is None and finetune is None):  # the 2 of phi-2 is no version of phi
        return NameParts(full or name)
    return NameParts(basename, size, finetune, version)


def brief_name(text: str) -> str:
    """A stranger's text as a name: printable and of bounded length; possibly empty."""
    return "".join(letter for letter in text[:_LONGEST_NAME] if letter.isprintable()).strip()


def _last_part(name: str) -> str:
    last = brief_name(re.split(r"[\\/]+", name.rstrip("\\/"))[-1])
    return last if last.strip(".~") else "model"

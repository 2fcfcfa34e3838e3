"""A Hugging Face model on disk: config.json plus safetensors, in one file or in shards with an index."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.architectures import HeadCounts
from converters.errors import FileMissingError, FormatError, UnsupportedError
from converters.fingerprint import fingerprint
from converters.model_config import class_of, experts_of, heads_of, repositories_of, sizes_of, width_of
from converters.models import Layout, ModelSizes
from converters.paths import existing, is_there, read_json_object
from converters.safetensors_file import SafetensorsFile
from converters.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
MAX_INDEX = 16 << 20
"""Bytes of an index that are read; the largest published one has 14 million."""

_SINGLE = "model.safetensors"
_MAX_SHARDS = 10_000


class Checkpoint:
    """A model's configuration and tensors (a `Model`); data is read on demand, one tensor at a time.

    Attributes:
        path: the directory or file that the user named.
        config: the parsed config.json.
        files: the safetensors files, in order of their names.
    """

    format = "safetensors"
    layout: Layout = "hugging_face"
    ties_assumed: str | None = None

    def __init__(self, path: Path, config_file: Path, files: list[Path], index: Mapping[str, str] | None) -> None:
        self.path = path
        self.config_file = config_file
        self.config: dict[str, Any] = read_json_object(config_file, "the model's config.json")
        self.files = [SafetensorsFile(file) for file in files]
        self._owner = self._assign_owners(index)

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: file.infos[name] for name, file in self._owner.items()}

    def load(self, name: str) -> torch.Tensor:
        return self._owner[name].load(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._owner[name].rows(name, start, stop)

    def prefetch(self, name: str) -> None:
        self._owner[name].prefetch(name)

    def rounding(self, name: str, start: int, stop: int) -> None:
        """None: released float weights are the model itself."""

    @property
    def nbytes(self) -> int:
        """The size of all tensor files."""
        return sum(file.path.stat().st_size for file in self.files)

    def check_type(self, name: str) -> None:
        self._owner[name].check_type(name)

    def file_of(self, name: str) -> Path:
        return self._owner[name].path

    def stored_name(self, name: str) -> str:
        return name

    def fingerprint(self) -> str:
        return fingerprint(self.files)

    @property
    def experts(self) -> int:
        return experts_of(self.config)

    @property
    def width(self) -> int | None:
        return width_of(self.config)

    def sizes(self) -> ModelSizes:
        return sizes_of(self.config)

    def heads(self) -> HeadCounts:
        return heads_of(self.config, self.config_file)

    @property
    def described_by(self) -> Path:
        return self.config_file

    @property
    def sources(self) -> tuple[Path, ...]:
        return (self.config_file, *(file.path for file in self.files))

    @property
    def repositories(self) -> tuple[str, ...]:
        return repositories_of(self.config)

    @cached_property
    def architecture(self) -> str:
        return class_of(self.config, self.config_file)

    @property
    def model_class(self) -> str:
        return self.architecture

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output matrix is the embedding matrix, so that no tensor of its own exists."""
        return not any(name.endswith("lm_head.weight") for name in self.infos)

    def _assign_owners(self, index: Mapping[str, str] | None) -> dict[str, SafetensorsFile]:
        by_name = {file.path.name: file for file in self.files}
        if index is None:
            return {name: file for file in self.files for name in file.infos}
        owner = {}
        for tensor, shard in index.items():
            if tensor not in by_name[shard].infos:
                raise FormatError(f"the index says this tensor is in {shard}, which lacks it", tensor=tensor,
                                  file=self.path)  # fmt: skip
            owner[tensor] = by_name[shard]
        return owner


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a model directory or a single .safetensors file with config.json beside it.

    Reads all headers; no tensor data.

    Raises:
        FileMissingError: the model, its config.json or a shard is missing.
        FormatError: a header, the index or config.json is damaged.
        UnsupportedError: the directory holds weights in another format only.
    """
    found = existing(path, "the model")
    if found.is_dir():
        files, index = _directory_files(found)
        return Checkpoint(found, found / "config.json", files, index)
    if found.suffix != ".safetensors":
        raise UnsupportedError("is neither a model directory nor a .safetensors file", file=found)
    return Checkpoint(found, found.parent / "config.json", [found], None)


def _directory_files(directory: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    if is_there(directory / INDEX):
        index = _read_index(directory)
        return [directory / name for name in sorted(set(index.values()))], index
    if is_there(directory / _SINGLE):
        return [directory / _SINGLE], None
    others = sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if len(others) == 1:
        return others, None
    if is_there(directory / "adapter_config.json"):
        raise UnsupportedError("is an adapter, expected a model", file=directory)
    if any(directory.glob("*.bin")):
        raise UnsupportedError(
            "holds weights as pickle (.bin) only, which can run code when opened; convert them to safetensors "
            "first, with the model's own save_pretrained",
            file=directory,
        )
    what = f"{len(others)} .safetensors files and no index" if others else f"neither {_SINGLE} nor {INDEX}"
    raise FileMissingError(f"holds {what}", file=directory)


def _read_index(directory: Path) -> Mapping[str, str]:
    file = directory / INDEX
    table = read_json_object(file, "the index", MAX_INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FormatError("has no weight_map of tensors and their shards", file=file)
    tensors = {shard if isinstance(shard, str) else str(type(shard)): tensor for tensor, shard in table.items()}
    for shard, tensor in tensors.items():
        # Only the text is judged: in download caches the shards themselves are links to other places.
        if not shard.endswith(".safetensors") or shard != Path(shard).name or len(shard) > 255 or "\0" in shard:
            raise FormatError(
                f"names the shard {shard[:200]!r}, expected the name of a .safetensors file in this directory",
                file=file,
                tensor=tensor,
            )
    if len(tensors) > _MAX_SHARDS:
        raise FormatError(f"names {len(tensors)} shards; at most {_MAX_SHARDS} are read", file=file)
    for shard in sorted(tensors):
        if not is_there(directory / shard):
            raise FileMissingError(f"the index names the shard {shard}, which is missing", file=directory)
    return table

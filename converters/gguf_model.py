"""A model as llama.cpp runs it: one GGUF file, or the shards of a split one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.gguf_check import check_model
from converters.architectures import HeadCounts
from converters.errors import FormatError, InputError, UnsupportedError
from converters.fingerprint import fingerprint_gguf
from converters.ggml import dequantize
from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader, published_as
from converters.gguf_shards import read_gguf_headers
from converters.gguf_tensors import GgufTensors
from converters.models import Layout, ModelSizes
from converters.rounding import is_exact, rounding_variances
from converters.tensors import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_HEAD = "output.weight"


class GgufModel:
    """A GGUF model's metadata and tensors (a `Model`); quantized tensors are read as float32.

    Attributes:
        path: the file that the user named, the first shard of a split model.
        headers: of all shards, in order.
    """

    format = "gguf"
    layout: Layout = "gguf"
    model_class: str | None = None

    def __init__(self, path: Path, headers: Sequence[GgufHeader]) -> None:
        self.path = path
        self.headers = headers
        self._tensors = GgufTensors(headers)
        self._lost = {
            name
            for header in headers
            for name, tensor in header.tensors.items()
            if tensor.offset + tensor.nbytes > header.file_size
        }
        self._types = {name: tensor.qtype for header in headers for name, tensor in header.tensors.items()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._tensors.infos

    def load(self, name: str) -> torch.Tensor:
        return self._tensors.load(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._tensors.rows(name, start, stop)

    def prefetch(self, name: str) -> None:
        self._tensors.prefetch(name)

    def rounding(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, int] | None:
        import torch

        qtype = self._types[name]
        if is_exact(qtype):
            return None
        variances, run = rounding_variances(self._tensors.blocks(name, start, stop), qtype, _values)
        return torch.from_numpy(variances), run

    @property
    def nbytes(self) -> int:
        return sum(header.file_size for header in self.headers)

    @property
    def architecture(self) -> str:
        return self.headers[0].text("general.architecture") or ""  # `open_gguf_model` has seen one

    @property
    def tied_embeddings(self) -> bool:
        return _HEAD not in self.infos

    @property
    def ties_assumed(self) -> str | None:
        if self.infos:
            return None
        return f"{self.path} lists no tensors; name a whole GGUF file of the model, or its config.json"

    @property
    def described_by(self) -> Path:
        return self.headers[0].path

    @property
    def sources(self) -> tuple[Path, ...]:
        return tuple(header.path for header in self.headers)

    @property
    def repositories(self) -> tuple[str, ...]:
        found = (published_as(self.headers[0], key) for key in ("general.repo_url", "general.source.url"))
        return tuple(name for name in found if name is not None)

    @property
    def experts(self) -> int:
        return self._number("expert_count") or 0

    @property
    def width(self) -> int | None:
        return self._number("embedding_length")

    def sizes(self) -> ModelSizes:
        layers, inner = self._number("block_count"), self._number("feed_forward_length")
        expert, key, value = self._number("expert_feed_forward_length"), None, None
        if self._number("attention.kv_lora_rank") is None:
            share = self._head_share()
            key = self._number("attention.key_length") or share
            value = self._number("attention.value_length") or share
        return ModelSizes(layers, self.width, inner, expert, key, value)

    def heads(self) -> HeadCounts:
        query = self._count("head_count")
        whole, rotated = self._number("attention.key_length_mla"), self._number("rope.dimension_count")
        latent_key = whole - rotated if whole and rotated else 0
        return HeadCounts(query, self._count("head_count_kv", query), latent_key)

    def check_type(self, name: str) -> None:
        if self.infos[name].dtype == "NVFP4" and f"{name.removesuffix('.weight')}.scale" in self.infos:
            message = "is NVFP4 with a scale in a tensor of its own, which is not read; take another file of the model"
            raise UnsupportedError(message, file=self.file_of(name), tensor=name)
        if self.infos[name].elements and name not in self._lost:
            self.rows(name, 0, 1)
            self.rounding(name, 0, 1)

    def file_of(self, name: str) -> Path:
        return self._tensors.file_of(name)

    def stored_name(self, name: str) -> str:
        return name

    def fingerprint(self) -> str:
        return fingerprint_gguf(*self.headers)

    def _head_share(self) -> int | None:
        """A head's part of the width, which llama.cpp takes for its size where the header gives none."""
        try:
            heads = self._count("head_count")
        except FormatError:
            return None
        return self.width // heads if self.width and self.width % heads == 0 else None

    def _number(self, what: str) -> int | None:
        value = self.headers[0].value(f"{self.architecture}.{what}")
        return value if type(value) is int and value > 0 else None

    def _count(self, what: str, default: int | None = None) -> int:
        """A number of heads; some architectures give one for each layer, which must then be the same."""
        key = f"{self.architecture}.attention.{what}"
        value = self.headers[0].value(key)
        counts = set(value) if isinstance(value, list) else {default if value is None else value}
        if len(counts) != 1:
            raise FormatError(f"{key} differs from layer to layer: its rows can't be reordered", file=self.path)
        count = counts.pop()
        if type(count) is not int or not 0 < count < 1 << 20:
            raise FormatError(f"{key} is {str(count)[:40]}, expected a number of attention heads", file=self.path)
        return count


def _values(blocks: NDArray[np.uint8], qtype: int) -> NDArray[np.float32]:
    values: NDArray[np.float32] = dequantize(blocks, qtype).numpy()
    return values


def open_gguf_model(path: str | Path) -> GgufModel:
    """Opens a GGUF model by its file or first shard; reads all headers, no tensor data.

    Raises:
        FileMissingError: a file is missing. FormatError: a header is damaged, or it is no language model.
    """
    headers = read_gguf_headers(path, "GGUF model")
    check_model(headers, native=False)
    return GgufModel(Path(path), headers)


def describe_gguf_model(path: str | Path) -> GgufModel:
    """A GGUF model of which nothing but the header need be there: its data, and the other shards, may be missing.

    Raises:
        FileMissingError: the file can't be read. FormatError: its header is damaged or cut off, or it is no language
            model.
    """
    try:
        return open_gguf_model(path)
    except InputError as error:
        header = read_gguf_header(path, "GGUF model", whole=False)
        if header.value("split.no"):
            raise error from None  # the others hold no metadata
        check_model([header], native=False)
    if header.value("split.count"):
        header = replace(header, tensors={})  # some of many
    return GgufModel(Path(path), [header])

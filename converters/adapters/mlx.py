"""MLX adapters: a directory with adapter_config.json and adapters.safetensors, as mlx-lm writes it.

Linear:    delta W (out, in)           = scale * (lora_a @ lora_b).T, lora_a (in, r), lora_b (r, out)
Embedding: delta W (vocabulary, width) = scale * lora_a @ lora_b, lora_a (vocabulary, r), lora_b (r, width)

from `fuse` in mlx-lm's tuner/lora.py; so A and B are lora_a.T and lora_b.T either way. The numbered checkpoints
that training leaves beside the adapter (0000100_adapters.safetensors) are not looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.adapters.lora import LoraPair
from converters.errors import FormatError, UnsupportedError
from converters.fingerprint import fingerprint
from converters.models import Layout
from converters.names import canonical, natural_order
from converters.paths import existing, parse_json_object, read_bytes
from converters.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"

_HALF = re.compile(r"(.+)\.lora_([ab])")
_EMBEDDINGS = {
    "embed_tokens", "embed_tokens_per_layer", "wte", "wpe", "word_embeddings", "tok_embeddings", "token_embeddings",
    "embed_in", "embed", "embedding", "embeddings",
}  # fmt: skip
"""What mlx-lm's models call their nn.Embedding; nothing in the file says which pairs belong to one."""

_DEFAULT_SCALE = 20.0
"""LoRALinear's own default, and what mlx-lm trains with unless told otherwise."""

_MERGE = "merge it into its model with mlx_lm.fuse"


class MlxAdapter:
    """An MLX LoRA adapter (a `LoraAdapter`); see `open_mlx`."""

    format = "mlx"
    layout: Layout = "hugging_face"
    architecture: str | None = None
    invocation_tokens: tuple[int, ...] = ()
    peft_config: bytes | None = None
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    magnitudes: Mapping[str, str] = {}

    def __init__(self, path: Path, config_bytes: bytes, config: MlxConfig, file: SafetensorsFile) -> None:
        self.path = path
        self.config = config
        self.frozen_tables: Mapping[str, str] = {}
        self._config_bytes = config_bytes
        self._file = file
        pairs = {canonical(module): self._pair(module, *halves) for module, halves in _pair_keys(file).items()}
        self.pairs: Mapping[str, LoraPair] = {name: pairs[name] for name in sorted(pairs, key=natural_order)}

    @property
    def lora_alpha(self) -> float:
        """scale * r, so that alpha / r is the scale; with several ranks, the largest one's."""
        return self.config.scaling * max(pair.rank for pair in self.pairs.values())

    @property
    def base_model_name(self) -> str | None:
        return self.config.base_model_name

    @property
    def tensor_file(self) -> Path:
        return self._file.path

    @property
    def nbytes(self) -> int:
        return self._file.path.stat().st_size

    def load_frozen_table(self, module: str) -> torch.Tensor:
        """None is ever saved along: `frozen_tables` is empty."""
        raise KeyError(module)

    def load_magnitude(self, module: str) -> torch.Tensor:
        raise KeyError(module)

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a, lora_b = (self._file.load(name) for name in self.pairs[module].tensors)
        return lora_a.T.contiguous(), lora_b.T.contiguous()

    def fingerprint(self) -> str:
        return fingerprint([self._file], extra=self._config_bytes)

    def _pair(self, module: str, a: str, b: str) -> LoraPair:
        shapes = self._file.infos[a].shape, self._file.infos[b].shape
        for name, shape in zip((a, b), shapes, strict=True):
            if len(shape) != 2 or 0 in shape:
                found = f"has the shape {list(shape)}, expected a matrix"
                raise FormatError(found, file=self._file.path, tensor=name)
            self._file.check_type(name)
        (rows_a, rank), (rank_b, columns_b) = shapes
        if rank != rank_b:
            found = f"lora_a has rank {rank}, lora_b has rank {rank_b}"
            raise FormatError(found, file=self._file.path, tensor=b)
        if self.config.rank not in (None, rank):
            raise FormatError(
                f"has rank {rank}, and {CONFIG} says {self.config.rank}: they do not belong together",
                file=self._file.path,
                tensor=a,
            )
        embedding = module.rpartition(".")[2] in _EMBEDDINGS
        shape = (rows_a, columns_b) if embedding else (columns_b, rows_a)
        return LoraPair(canonical(module), module, (a, b), rank, self.config.scaling, shape, embedding)


@dataclass(frozen=True)
class MlxConfig:
    """The part of adapter_config.json that decides what the pairs mean.

    Attributes:
        scaling: the true factor of every pair.
        rank: every pair's, or None where the file doesn't say.
    """

    scaling: float
    rank: int | None
    base_model_name: str | None


def is_mlx(path: Path) -> bool:
    """Whether it is a directory with adapters.safetensors."""
    try:
        return path.is_dir() and (path / WEIGHTS).exists()
    except OSError:  # a directory that may not be entered: whoever opens it says so
        return False


def open_mlx(path: str | Path) -> MlxAdapter:
    """Opens an MLX adapter directory; reads headers only.

    Raises:
        FileMissingError: the directory, its configuration or its weights are missing.
        FormatError: they are damaged or contradict each other.
        UnsupportedError: the adapter is not, or not only, plain LoRA pairs; named in the message.
    """
    directory = existing(path, "the adapter")
    config_bytes = read_bytes(directory / CONFIG, "the adapter's configuration")
    raw = parse_json_object(config_bytes, "the adapter's configuration", directory / CONFIG)
    config = parse_mlx_config(raw, directory / CONFIG)
    return MlxAdapter(directory, config_bytes, config, SafetensorsFile(directory / WEIGHTS))


def parse_mlx_config(raw: Mapping[str, Any], path: Path) -> MlxConfig:
    """Checks a parsed adapter_config.json.

    Raises:
        FormatError: it is not mlx-lm's, or a value has the wrong type or is out of range.
        UnsupportedError: the adapter is no plain LoRA.
    """
    if "peft_type" in raw:
        found = f"is PEFT's configuration beside MLX's {WEIGHTS}; give each adapter a directory of its own"
        raise FormatError(found, file=path)
    kind = raw.get("fine_tune_type", "lora")  # mlx-lm before 0.19 doesn't write it, and reads it with this default
    if kind == "dora" or raw.get("use_dora"):
        raise UnsupportedError(f"uses DoRA, whose update is not of low rank; {_MERGE}", file=path)
    if kind == "full":
        raise UnsupportedError(f"holds whole trained tensors (fine_tune_type full), no pairs; {_MERGE}", file=path)
    if kind != "lora":
        raise UnsupportedError(f"fine_tune_type is {repr(kind)[:80]}; only lora adapters can be read", file=path)
    parameters = raw.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError("has no lora_parameters, expected an object with rank and scale", file=path)
    rank = parameters.get("rank")
    if rank is not None and (type(rank) is not int or not 0 < rank < 1 << 20):
        raise FormatError(f"lora_parameters: rank is {repr(rank)[:80]}, expected a positive whole number", file=path)
    name = raw.get("model")
    scaling = _scaling(raw, parameters, rank, path)
    return MlxConfig(scaling, rank, name if isinstance(name, str) and name else None)


def _scaling(raw: Mapping[str, Any], parameters: Mapping[str, Any], rank: int | None, path: Path) -> float:
    """The factor of lora_a @ lora_b.

    It is `scale` alone, except before mlx-lm 0.14, where it was scale * alpha / rank. Those files can be told:
    they have lora_layers, and not yet use_dora, which came with 0.14. Later ones go on listing an alpha of 16
    that nothing reads.
    """
    if "scale" not in parameters and "alpha" in parameters:
        found = "lora_parameters has alpha and no scale; mlx-lm reads scale, the factor itself: write it there"
        raise FormatError(found, file=path)
    scale = _number(parameters, "scale", path) if "scale" in parameters else _DEFAULT_SCALE
    old = "lora_layers" in raw and not {"use_dora", "fine_tune_type", "num_layers"} & raw.keys()
    if not (old and "alpha" in parameters):
        return scale
    if rank is None:
        raise FormatError("lora_parameters has alpha and no rank, and the scaling depends on both", file=path)
    return scale * (_number(parameters, "alpha", path) / rank)


def _number(parameters: Mapping[str, Any], key: str, path: Path) -> float:
    value = parameters[key]
    if type(value) not in (int, float) or not abs(value) <= 1e30:  # NaN compares false
        raise FormatError(f"lora_parameters: {key} is {repr(value)[:80]}, expected a finite number", file=path)
    return float(value)


def _pair_keys(file: SafetensorsFile) -> dict[str, tuple[str, str]]:
    """The names of lora_a and lora_b by module, as the file calls it.

    Raises:
        FormatError: half a pair, two pairs for one module, or none at all.
        UnsupportedError: a tensor that belongs to no pair, or a pair of stacked experts.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key, info in file.infos.items():
        match = _HALF.fullmatch(key)
        if match is None:
            raise _foreign_tensor(key, file.path)
        if len(info.shape) == 3:
            what = f"is a pair of stacked experts (LoRASwitchLinear), not supported yet; {_MERGE}"
            raise UnsupportedError(what, file=file.path, tensor=key)
        found[match[1]][match[2]] = key
    if not found:
        raise FormatError("holds no LoRA pairs", file=file.path)
    seen: set[str] = set()
    for module, halves in found.items():
        if len(halves) < 2:
            ((half, key),) = halves.items()
            missing = f"has a lora_{half} but no lora_{'b' if half == 'a' else 'a'}: the file is incomplete"
            raise FormatError(missing, file=file.path, tensor=key)
        if canonical(module) in seen:
            raise FormatError("two pairs for one module", file=file.path, tensor=halves["b"])
        seen.add(canonical(module))
    return {module: (halves["a"], halves["b"]) for module, halves in found.items()}


def _foreign_tensor(key: str, path: Path) -> UnsupportedError:
    if key.endswith(".m"):
        what = f"holds DoRA magnitudes; DoRA's update is not of low rank: {_MERGE}"
    elif ".lora_" in key:
        what = "belongs to no plain pair of lora_a and lora_b and can't be expressed"
    else:
        what = f"is a whole tensor trained beside the pairs: {_MERGE}"
    return UnsupportedError(what, file=path, tensor=key)

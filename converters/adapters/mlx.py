"""MLX adapters: a directory with adapter_config.json and adapters.safetensors, as mlx-lm writes it.

Linear:    delta W (out, in)           = scale * (lora_a @ lora_b).T, lora_a (in, r), lora_b (r, out)
Embedding: delta W (vocabulary, width) = scale * lora_a @ lora_b, lora_a (vocabulary, r), lora_b (r, width)
Experts:   delta W[e] (out, in)        = scale * lora_b[e] @ lora_a[e], lora_a (E, r, in), lora_b (E, out, r)

from `fuse` in mlx-lm's tuner/lora.py; so A and B are lora_a.T and lora_b.T, and of experts lora_a[e] and lora_b[e].
DoRA has beside each pair, but never experts', the lengths m of the rows of W' = W + delta W: (out,), or (vocabulary,)
of an embedding, each token's (tuner/dora.py; PEFT takes an embedding's lengths the other way, over all tokens). The
numbered checkpoints that training leaves beside the adapter (0000100_adapters.safetensors) are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.adapters.lora import LoraPair
from converters.adapters.mlx_pairs import MERGE, mlx_magnitudes, mlx_pairs
from converters.adapters.whole import WholeTensor
from converters.errors import FormatError, UnsupportedError
from converters.fingerprint import fingerprint
from converters.models import Layout
from converters.paths import existing, parse_json_object, read_bytes
from converters.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"

_DEFAULT_SCALE = 20.0
"""LoRALinear's own default, and what mlx-lm trains with unless told otherwise."""


class MlxAdapter:
    """An MLX LoRA adapter (a `LoraAdapter`); see `open_mlx`."""

    format = "mlx"
    layout: Layout = "hugging_face"
    architecture: str | None = None
    invocation_tokens: tuple[int, ...] = ()
    peft_config: bytes | None = None
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    whole: Mapping[str, WholeTensor] = {}  # mlx-lm loads no adapter that holds more than its pairs

    def __init__(self, path: Path, config_bytes: bytes, config: MlxConfig, file: SafetensorsFile) -> None:
        self.path = path
        self.config = config
        self.frozen_tables: Mapping[str, str] = {}
        self._config_bytes = config_bytes
        self._file = file
        self.pairs: Mapping[str, LoraPair] = mlx_pairs(file, config.scaling, config.rank, dora=config.dora)
        self.magnitudes: Mapping[str, str] = mlx_magnitudes(file, self.pairs) if config.dora else {}

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

    def load_whole(self, key: str) -> torch.Tensor:
        raise KeyError(key)

    def load_magnitude(self, module: str) -> torch.Tensor:
        """DoRA's row lengths (out,) of one module; of an embedding those of its tokens, as (1, vocabulary)."""
        lengths = self._file.load(self.magnitudes[module])
        return lengths[None, :] if self.pairs[module].embedding else lengths

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.pairs[module]
        if pair.expert is None:
            lora_a, lora_b = (self._file.load(name) for name in pair.tensors)
            return lora_a.T.contiguous(), lora_b.T.contiguous()
        rows = pair.rank, pair.shape[0]
        a, b = (self._file.rows(name, pair.expert * count, (pair.expert + 1) * count)
                for name, count in zip(pair.tensors, rows, strict=True))  # fmt: skip
        return a, b

    def fingerprint(self) -> str:
        return fingerprint([self._file], extra=self._config_bytes)


@dataclass(frozen=True)
class MlxConfig:
    """The part of adapter_config.json that decides what the pairs mean.

    Attributes:
        scaling: the true factor of every pair.
        rank: every pair's, or None where the file doesn't say.
        dora: whether every module has magnitudes beside its pair.
        layers: of how many layers the last were trained, -1 of all of them; None where the file doesn't say.
    """

    scaling: float
    rank: int | None
    base_model_name: str | None
    dora: bool = False
    layers: int | None = None


def is_mlx(path: Path) -> bool:
    """Whether it is a directory with adapters.safetensors."""
    try:
        return path.is_dir() and (path / WEIGHTS).exists()
    except OSError:  # a directory that may not be entered: whoever opens it says so
        return False


def open_mlx(path: str | Path, *, dora: bool = False) -> MlxAdapter:
    """Opens an MLX adapter directory; reads headers only.

    Args:
        dora: open DoRA adapters too, whose update is not that of their pairs (see `LoraAdapter.magnitudes`).

    Raises:
        FileMissingError: the directory, its configuration or its weights are missing.
        FormatError: they are damaged or contradict each other.
        UnsupportedError: the adapter is not, or not only, plain LoRA pairs; named in the message.
    """
    directory = existing(path, "the adapter")
    config_bytes = read_bytes(directory / CONFIG, "the adapter's configuration")
    raw = parse_json_object(config_bytes, "the adapter's configuration", directory / CONFIG)
    config = parse_mlx_config(raw, directory / CONFIG, dora=dora)
    return MlxAdapter(directory, config_bytes, config, SafetensorsFile(directory / WEIGHTS))


def parse_mlx_config(raw: Mapping[str, Any], path: Path, *, dora: bool = False) -> MlxConfig:
    """Checks a parsed adapter_config.json.

    Args:
        dora: accept DoRA, whose magnitudes the caller knows how to use.

    Raises:
        FormatError: it is not mlx-lm's, or a value has the wrong type or is out of range.
        UnsupportedError: the adapter is no plain LoRA.
    """
    if "peft_type" in raw:
        found = f"is PEFT's configuration beside MLX's {WEIGHTS}; give each adapter a directory of its own"
        raise FormatError(found, file=path)
    # Before 0.19 mlx-lm wrote use_dora; since then it reads fine_tune_type alone, with this default.
    kind = raw.get("fine_tune_type", "dora" if raw.get("use_dora") else "lora")
    if kind == "dora" and not dora:
        told = "uses DoRA, whose update has no low rank: convert adapter makes the nearest pairs, or merge it "
        raise UnsupportedError(told + "(safelora-gguf merge)", file=path)
    if kind == "full":
        raise UnsupportedError(f"holds whole trained tensors (fine_tune_type full), no pairs; {MERGE}", file=path)
    if kind not in ("lora", "dora"):
        told = f"fine_tune_type is {repr(kind)[:80]}; only lora and dora adapters can be read"
        raise UnsupportedError(told, file=path)
    parameters = raw.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError("has no lora_parameters, expected an object with rank and scale", file=path)
    rank = parameters.get("rank")
    if rank is not None and (type(rank) is not int or not 0 < rank < 1 << 20):
        raise FormatError(f"lora_parameters: rank is {repr(rank)[:80]}, expected a positive whole number", file=path)
    name = raw.get("model")
    scaling = _scaling(raw, parameters, rank, path)
    layers = raw.get("num_layers", raw.get("lora_layers"))  # the second is older mlx-lm's
    return MlxConfig(scaling, rank, name if isinstance(name, str) and name else None, kind == "dora",
                     layers if type(layers) is int else None)  # fmt: skip


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

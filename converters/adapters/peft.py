"""PEFT adapters as sources: a directory with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.lora import LoraPair
from converters.adapters.peft_config import Meaning, PeftConfig, parse_peft_config
from converters.errors import FileMissingError, FormatError, UnsupportedError
from converters.fingerprint import fingerprint
from converters.models import Layout
from converters.names import canonical, natural_order
from converters.paths import existing, is_there, parse_json_object, read_bytes
from converters.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
_LINEAR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?")
_FROZEN = re.compile(r"(.+)\.base_layer\.weight")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.[^.]+)?")
_MORE_THAN_PAIRS = (
    (
        "lora_magnitude_vector",
        "holds DoRA magnitudes; DoRA's update is not of low rank: convert adapter makes the nearest pairs (or merge "
        "it with PEFT)",
    ),
    ("modules_to_save", "is a whole module trained beside the pairs (modules_to_save): merge it with PEFT"),
    ("trainable_tokens", "holds trained tokens: merge them with PEFT"),
    ("token_adapter", "holds trained tokens: merge them with PEFT"),
    (".lora_B.bias", "is a bias of lora_B, which no GGUF adapter can hold: merge it with PEFT"),
    (".bias", "is a trained bias, which no GGUF adapter can hold: merge it with PEFT"),
    ("norm", "is a trained norm, which llama.cpp would accept and ignore: merge it with PEFT"),
)


class PeftAdapter:
    """A PEFT LoRA adapter (a `LoraAdapter`); see `open_peft`.

    Attributes:
        magnitudes: by module, the tensors of DoRA's row lengths; the pairs alone are then not the update.
    """

    format = "peft"
    layout: Layout = "hugging_face"
    architecture: str | None = None
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()

    def __init__(self, path: Path, config_bytes: bytes, config: PeftConfig, file: SafetensorsFile) -> None:
        self.path = path
        self.config = config
        self.peft_config = config_bytes
        self._file = file
        self._keys = _pair_keys(file, dora=config.use_dora)
        self.frozen_tables = _frozen_tables(file)
        meanings = config.meanings([keys.module for keys in self._keys.values()])
        pairs = {module: self._pair(module, keys, meanings[keys.module]) for module, keys in self._keys.items()}
        self.pairs: Mapping[str, LoraPair] = {name: pairs[name] for name in sorted(pairs, key=natural_order)}
        self.magnitudes: Mapping[str, str] = _magnitudes(file, self.pairs) if config.use_dora else {}

    @property
    def lora_alpha(self) -> float:
        return self.config.lora_alpha

    @property
    def base_model_name(self) -> str | None:
        return self.config.base_model_name

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        return self.config.invocation_tokens

    @property
    def tensor_file(self) -> Path:
        return self._file.path

    @property
    def nbytes(self) -> int:
        return self._file.path.stat().st_size

    def load_frozen_table(self, module: str) -> torch.Tensor:
        """One of `frozen_tables`: PEFT saves the table of an adapted embedding or head along, as it found it."""
        return self._file.load(self.frozen_tables[module])

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self._keys[module]
        return self._file.load(keys.a), self._file.load(keys.b)

    def load_magnitude(self, module: str) -> torch.Tensor:
        """DoRA's row lengths (out,) of one module."""
        return self._file.load(self.magnitudes[module]).reshape(-1)

    def fingerprint(self) -> str:
        return fingerprint([self._file], extra=self.peft_config)

    def _pair(self, module: str, keys: _PairKeys, meaning: Meaning) -> LoraPair:
        rank, columns = self._matrix(keys.a)
        rows, rank_b = self._matrix(keys.b)
        if rank != rank_b:
            raise FormatError(f"A has rank {rank}, B has rank {rank_b}", file=self._file.path, tensor=keys.b)
        if rank != meaning.rank:
            raise FormatError(
                f"has rank {rank}, and {CONFIG} gives it {meaning.rank}: they do not belong together",
                file=self._file.path,
                tensor=keys.a,
            )
        shape = (columns, rows) if keys.embedding else (rows, columns)
        return LoraPair(module, keys.module, (keys.a, keys.b), rank, meaning.scaling, shape, keys.embedding)

    def _matrix(self, key: str) -> tuple[int, int]:
        shape = self._file.infos[key].shape
        if len(shape) != 2 or 0 in shape:
            raise FormatError(
                f"has the shape {list(shape)}, expected a matrix: saved by DeepSpeed ZeRO-3 or FSDP without gathering "
                f"its weights? Save it again from the training script",
                file=self._file.path,
                tensor=key,
            )
        self._file.check_type(key)
        return shape[0], shape[1]


@dataclass(frozen=True)
class _PairKeys:
    """The tensor names of one pair; `module` is the name that PEFT matches its patterns against."""

    module: str
    a: str
    b: str
    embedding: bool


def open_peft(path: str | Path, *, dora: bool = False) -> PeftAdapter:
    """Opens a PEFT adapter directory; reads headers only.

    Args:
        dora: open DoRA adapters too, whose update is not that of their pairs (see `PeftAdapter.magnitudes`).

    Raises:
        FileMissingError: the directory, its configuration or its weights are missing.
        FormatError: they are damaged or contradict each other.
        UnsupportedError: the adapter holds what pairs can't express, named in the message.
    """
    directory = existing(path, "the adapter")
    if not directory.is_dir():
        raise FileMissingError(f"is a file, expected a directory with {CONFIG}", file=directory)
    config_bytes = read_bytes(directory / CONFIG, "the adapter's configuration")
    raw = parse_json_object(config_bytes, "the adapter's configuration", directory / CONFIG)
    config = parse_peft_config(raw, directory / CONFIG, dora=dora)
    weights = directory / WEIGHTS
    if not is_there(weights) and is_there(directory / "adapter_model.bin"):
        raise UnsupportedError(
            "is a pickle, which can run code when opened. If you trust it, convert it once: python -c "
            "\"import torch, safetensors.torch as s; s.save_file(torch.load('adapter_model.bin', weights_only=True), "
            "'adapter_model.safetensors')\"",
            file=directory / "adapter_model.bin",
        )
    return PeftAdapter(directory, config_bytes, config, SafetensorsFile(weights))


def _pair_keys(file: SafetensorsFile, *, dora: bool) -> dict[str, _PairKeys]:
    """Groups a file's tensors into pairs by canonical module.

    Raises:
        FormatError: half a pair, two pairs for one module, or none at all.
        UnsupportedError: a tensor that belongs to no pair.
    """
    found: dict[tuple[str, bool], dict[str, list[str]]] = defaultdict(lambda: {"A": [], "B": []})
    for key in file.infos:
        plain = key.removeprefix(PREFIX)
        if _FROZEN.fullmatch(plain) or (dora and _MAGNITUDE.fullmatch(plain)):
            continue
        match = _LINEAR.fullmatch(plain) or _EMBEDDING.fullmatch(plain)
        if match is None:
            raise _foreign_tensor(key, file.path)
        found[match[1], ".lora_embedding_" in plain][match[2]].append(key)
    if not found:
        raise FormatError("holds no LoRA pairs", file=file.path)
    pairs: dict[str, _PairKeys] = {}
    for (module, embedding), halves in found.items():
        keys = _both_halves(module, halves, file.path)
        if canonical(module) in pairs:
            raise FormatError("two pairs for one module", file=file.path, tensor=keys[1])
        pairs[canonical(module)] = _PairKeys(module, *keys, embedding)
    return pairs


def _frozen_tables(file: SafetensorsFile) -> dict[str, str]:
    """Tensor names of base weights that were saved along, by canonical module."""
    found = {key: _FROZEN.fullmatch(key.removeprefix(PREFIX)) for key in file.infos}
    return {canonical(match[1]): key for key, match in found.items() if match is not None}


def _magnitudes(file: SafetensorsFile, pairs: Mapping[str, LoraPair]) -> dict[str, str]:
    """DoRA's tensors by module.

    Raises:
        FormatError: a module has none, or not one value for every row. UnsupportedError: it is an embedding.
    """
    found = {key: _MAGNITUDE.fullmatch(key.removeprefix(PREFIX)) for key in file.infos}
    magnitudes = {canonical(match[1]): key for key, match in found.items() if match is not None}
    for module, pair in pairs.items():
        if module not in magnitudes:
            raise FormatError("has no magnitudes, and the adapter is DoRA", file=file.path, tensor=pair.tensors[0])
        key = magnitudes[module]
        if pair.embedding:
            raise UnsupportedError("is DoRA on an embedding; merge it with PEFT", file=file.path, tensor=key)
        if file.infos[key].elements != pair.shape[0]:
            told = f"has {file.infos[key].elements} values, expected one for each of {pair.shape[0]} rows"
            raise FormatError(told, file=file.path, tensor=key)
        file.check_type(key)
    stray = sorted(set(magnitudes) - set(pairs))
    if stray:
        raise FormatError("has magnitudes and no pair", file=file.path, tensor=magnitudes[stray[0]])
    return magnitudes


def _both_halves(module: str, halves: Mapping[str, Sequence[str]], path: Path) -> tuple[str, str]:
    for half, other in (("A", "B"), ("B", "A")):
        if not halves[half]:
            message = f"has a lora_{other} but no lora_{half}: the file is incomplete"
            raise FormatError(message, file=path, tensor=halves[other][0])
        if len(halves[half]) > 1:
            raise FormatError(f"{module} has several adapters in one file", file=path, tensor=halves[half][1])
    return halves["A"][0], halves["B"][0]


def _foreign_tensor(key: str, path: Path) -> UnsupportedError:
    for mark, what in _MORE_THAN_PAIRS:
        if mark in key:
            return UnsupportedError(what, file=path, tensor=key)
    return UnsupportedError("is neither a lora_A nor a lora_B and can't be expressed", file=path, tensor=key)

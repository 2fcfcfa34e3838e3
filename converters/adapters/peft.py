"""PEFT adapters as sources: a directory with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.lora import LoraPair
from converters.adapters.peft_config import Meaning, PeftConfig, parse_peft_config
from converters.adapters.peft_pairs import PREFIX, frozen_tables, magnitudes, pairs_by_module, sort_tensors
from converters.adapters.peft_parameters import Tell, notes_on_targets, stop
from converters.adapters.peft_whole import whole_tensors
from converters.adapters.whole import WholeTensor, check_finite
from converters.errors import FileMissingError, UnsupportedError
from converters.fingerprint import fingerprint
from converters.models import Layout
from converters.paths import existing, is_there, parse_json_object, read_bytes, without_collecting
from converters.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    import torch

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "PeftAdapter", "open_peft"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class PeftAdapter:
    """A PEFT LoRA adapter (a `LoraAdapter`); see `open_peft`.

    Attributes:
        losses: what was trained beside the pairs, which pairs can't hold; see `peft_losses`.
        missing: what the configuration announces and the file lacks.
        magnitudes: by module, the tensors of DoRA's row lengths; the pairs alone are then not the update.
    """

    format = "peft"
    layout: Layout = "hugging_face"
    architecture: str | None = None

    def __init__(
        self,
        path: Path,
        config_bytes: bytes,
        config: PeftConfig,
        file: SafetensorsFile,
        *,
        meanings: Callable[[Sequence[str]], Mapping[str, Meaning]] | None = None,
        tell: Tell = stop,
    ) -> None:
        """Reads the header.

        Args:
            meanings: what to take in place of `config.meanings`; see `pairs_by_module`.
            tell: about every part that can't be used, which is then left out; by default the first is raised.
        """
        self.path = path
        self.config = config
        self.peft_config = config_bytes
        self._file = file
        self._stack: tuple[str, torch.Tensor] | None = None
        keys, beside = sort_tensors(file, config, tell)
        adapted = [each.parameter for each in keys if each.parameter is not None]
        self.notes = (*beside.notes(config), *notes_on_targets(config.target_parameters, adapted))
        self.losses, self.missing = beside.losses(config), beside.missing(config)
        self._beside = beside
        self.frozen_tables = frozen_tables(file)
        self.pairs: Mapping[str, LoraPair] = pairs_by_module(
            file, keys, (meanings or config.meanings)([each.matched for each in keys]), tell
        )
        self.magnitudes: Mapping[str, str] = magnitudes(file, self.pairs, tell) if config.use_dora else {}

    @cached_property
    def whole(self) -> Mapping[str, WholeTensor]:
        """See `LoraAdapter.whole`. Found when asked for: whoever needs pairs alone need not mind damage in the rest."""
        return whole_tensors(self._file, self.config, self._beside, self.pairs)

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

    def load_whole(self, key: str) -> torch.Tensor:
        """One of `whole`, in its stored type."""
        return check_finite(self._file.load(key), self._file.path, key)

    def load_frozen_table(self, module: str) -> torch.Tensor:
        """One of `frozen_tables`: PEFT saves the table of an adapted embedding or head along, as it found it."""
        return self._file.load(self.frozen_tables[module])

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.pairs[module]
        a, b = pair.tensors
        if pair.expert is None:
            return self._file.load(a), self._file.load(b)
        return self._file.rows(a, pair.expert * pair.rank, (pair.expert + 1) * pair.rank), self._stacked(pair)

    def _stacked(self, pair: LoraPair) -> torch.Tensor:
        """One expert's B (out, r). The whole stack's is read once for all experts that are asked for in a row."""
        assert pair.expert is not None
        stack = self._stack
        if stack is None or stack[0] != pair.tensors[1]:
            whole = self._file.load(pair.tensors[1])
            by_expert = whole.reshape(pair.shape[0], pair.rank, -1).permute(2, 0, 1).contiguous()
            stack = self._stack = pair.tensors[1], by_expert
        return stack[1][pair.expert]

    def load_magnitude(self, module: str) -> torch.Tensor:
        """DoRA's row lengths (out,) of one module."""
        return self._file.load(self.magnitudes[module]).reshape(-1)

    def fingerprint(self) -> str:
        return fingerprint([self._file], extra=self.peft_config)


def open_peft(path: str | Path, *, dora: bool = False) -> PeftAdapter:
    """Opens a PEFT adapter directory; reads headers only.

    Args:
        dora: open DoRA adapters too, whose update is not that of their pairs (see `PeftAdapter.magnitudes`).

    Raises:
        FileMissingError: the directory, its configuration or its weights are missing.
        FormatError: they are damaged or contradict each other, or there are no pairs.
        UnsupportedError: its pairs are not plain LoRA's, or a tensor is nothing known.
    """
    directory = existing(path, "the adapter")
    if not directory.is_dir():
        raise FileMissingError(f"is a file, expected a directory with {CONFIG}", file=directory)
    config_bytes = read_bytes(directory / CONFIG, "the adapter's configuration")
    raw = parse_json_object(config_bytes, "the adapter's configuration", directory / CONFIG)
    config = parse_peft_config(raw, directory / CONFIG, dora=dora)
    weights = directory / WEIGHTS
    if not is_there(weights) and is_there(directory / "adapter_model.bin"):
        raise refused_pickle(directory)
    with without_collecting():
        return PeftAdapter(directory, config_bytes, config, SafetensorsFile(weights))


def refused_pickle(directory: Path) -> UnsupportedError:
    """What to do about a directory whose weights are a pickle."""
    return UnsupportedError(
        "is a pickle, which can run code when opened. If you trust it, convert it once: python -c "
        "\"import torch, safetensors.torch as s; s.save_file(torch.load('adapter_model.bin', weights_only=True), "
        "'adapter_model.safetensors')\"",
        file=directory / "adapter_model.bin",
    )

"""GGUF LoRA adapters as sources; how they are written is `gguf_output`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.gguf_check import EMBEDDING, adapter_pairs, check_adapter, four
from converters.adapters.lora import LoraPair
from converters.adapters.whole import WholeTensor
from converters.errors import FormatError, UnsupportedError
from converters.fingerprint import fingerprint_gguf
from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader, GgufTensor, published_as
from converters.gguf_tensors import GgufTensors
from converters.models import Layout
from converters.names import natural_order

if TYPE_CHECKING:
    import torch


class GgufAdapter:
    """A GGUF adapter file (a `LoraAdapter`): every matrix of a 3-D expert stack is a pair of its own.

    Attributes:
        header: its checked header.
    """

    format = "gguf"
    layout: Layout = "gguf"
    peft_config: bytes | None = None
    frozen_tables: Mapping[str, str] = {}
    magnitudes: Mapping[str, str] = {}
    whole: Mapping[str, WholeTensor] = {}

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.notes = check_adapter(header, native=False)
        self._tensors = GgufTensors([header])
        halves, norms = adapter_pairs(header)
        told = f"{', '.join(norms)}: norms, which llama.cpp ignores and no pairs can hold: left out"
        self.losses: tuple[str, ...] = (told,) if norms else ()
        self.missing = self.losses
        pairs = [pair for name, (a, b) in halves.items() for pair in self._pairs(name, a, b)]
        if not pairs:
            raise FormatError("holds no LoRA pairs", file=header.path)
        self.pairs: dict[str, LoraPair] = {}
        for pair in sorted(pairs, key=lambda pair: natural_order(pair.module)):
            if pair.module in self.pairs:
                found = f"is a second pair for {pair.module}, the first is {self.pairs[pair.module].tensors[0]}"
                raise FormatError(found, file=header.path, tensor=pair.tensors[0])
            self.pairs[pair.module] = pair

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def tensor_file(self) -> Path:
        return self.header.path

    @property
    def nbytes(self) -> int:
        return self.header.file_size

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.header.text("general.architecture") or ""  # `check_adapter` has seen one

    @property
    def lora_alpha(self) -> float:
        """The stored alpha; where there is none, and llama.cpp leaves pairs unscaled, the largest rank."""
        stored: float | None = self.header.value("adapter.lora.alpha")
        return stored or float(max(pair.rank for pair in self.pairs.values()))

    @property
    def base_model_name(self) -> str | None:
        return published_as(self.header, "general.base_model.0.repo_url")

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        return tuple(self.header.value("adapter.alora.invocation_tokens") or ())

    def load_frozen_table(self, module: str) -> torch.Tensor:
        raise KeyError(module)

    def load_whole(self, key: str) -> torch.Tensor:
        raise KeyError(key)

    def load_magnitude(self, module: str) -> torch.Tensor:
        raise KeyError(module)

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.pairs[module]
        place = pair.expert or 0
        out, into = pair.shape[::-1] if pair.embedding else pair.shape
        rows_a = into if pair.embedding else pair.rank
        a = self._tensors.rows(pair.tensors[0], place * rows_a, (place + 1) * rows_a)
        b = self._tensors.rows(pair.tensors[1], place * out, (place + 1) * out)
        return a.T if pair.embedding else a, b

    def fingerprint(self) -> str:
        return fingerprint_gguf(self.header)

    def _pairs(self, name: str, a: GgufTensor, b: GgufTensor) -> Iterator[LoraPair]:
        """A weight's pair, or those of its experts."""
        embedding = name.endswith(EMBEDDING)
        (outer, experts, *rest), (out, rank) = four(a.shape), four(b.shape)[2:]
        if outer != 1 or (embedding and experts != 1):
            raise UnsupportedError(f"has the shape {list(a.shape)}, expected (r, in) or (experts, r, in)",
                                   file=self.path, tensor=a.name)  # fmt: skip
        module, stacked = name.removesuffix(".weight"), len(a.shape) > 2
        shape = (rest[0], out) if embedding else (out, rest[1])
        scaling = self._scaling(rank)
        for expert in range(experts):
            own = f"{module}[{expert}]" if stacked else module
            yield LoraPair(own, name, (a.name, b.name), rank, scaling, shape, embedding, expert if stacked else None)

    def _scaling(self, rank: int) -> float:
        alpha: float | None = self.header.value("adapter.lora.alpha")
        return alpha / rank if alpha else 1.0


def open_gguf_adapter(path: str | Path) -> GgufAdapter:
    """Opens a GGUF adapter; reads its header only.

    Raises:
        FileMissingError: it can't be read.
        FormatError: it is damaged, or no LoRA adapter.
        UnsupportedError: sound, but in types that llama.cpp can't multiply.
    """
    return GgufAdapter(read_gguf_header(path, "GGUF adapter"))

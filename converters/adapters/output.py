"""Where an adapter goes: the choice of format, the names in it, and everything that can be refused beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from converters.adapters.gguf import folding_factor, write_gguf_adapter
from converters.adapters.lora import LoraPair
from converters.adapters.peft import WEIGHTS, PeftAdapter, write_peft_adapter
from converters.adapters.storing import PairOut, Rounding
from converters.architectures import Architecture, HeadCounts, Rule, architecture_of
from converters.atomic import check_target
from converters.checkpoint import Checkpoint
from converters.errors import Error, OutputPathError, UnsupportedError, UsageError
from converters.ggml import OUTTYPES, QType, nbytes
from converters.gguf_file import Value, float32, text, texts, uint32
from converters.identity import adapter_file_name, identify, is_repository, plain_name

if TYPE_CHECKING:
    import torch

Fact = str | int | float | Sequence[str]
LoadPair = Callable[[str], "tuple[torch.Tensor, torch.Tensor]"]
"""Gives A (r, in) and B (out, r) of a module in float32 on the CPU, in the adapter's own layout and scale."""

_FILE_TYPES = {QType.F32: 0, QType.F16: 1, QType.Q8_0: 7, QType.BF16: 32}  # llama.h, enum llama_ftype


@dataclass(frozen=True)
class Origin:
    """What a reader of the output must be able to trace.

    Attributes:
        title: what happened, for names: "Safe LoRA".
        description: one sentence.
        tags: what hubs file the output under.
        facts: metadata keys and values, kept in order.
    """

    title: str
    description: str
    tags: tuple[str, ...]
    facts: Mapping[str, Fact]


class AdapterOutput(Protocol):
    """An adapter output that has passed every check that headers allow.

    Attributes:
        target: the file or directory that will appear.
        tensor_file: the file in it that holds the tensors.
    """

    target: Path
    tensor_file: Path

    def name_of(self, module: str) -> str | None:
        """The module's tensor in GGUF, where its architecture is known."""

    def planned_bytes(self) -> int:
        """The size of the tensors."""

    def write(self, load: LoadPair, origin: Origin) -> Mapping[str, Rounding]:
        """Writes every pair as `load` gives it; how each was rounded, by module."""


def plan_output(
    out: Path,
    adapter: PeftAdapter,
    model: Checkpoint,
    *,
    outtype: str,
    to: Literal["gguf", "peft"] | None,
    label: str,
    force: bool,
    reads: Sequence[Path] = (),
) -> AdapterOutput:
    """Decides format and names for an output, and checks its place.

    Args:
        out: ends in .gguf for GGUF; otherwise a directory for PEFT, or with `to="gguf"` the directory in which
            a GGUF file gets its conventional name.
        model: what the adapter is for.
        label: what a conventional name says about the adapter beside its own name.
        reads: further inputs of the run, which an output directory must not replace.

    Raises:
        UsageError: an unknown type, or one that the format lacks.
        OutputPathError: the place is taken or unusable.
        UnsupportedError: the adapter can't be expressed in that format.
    """
    if outtype not in OUTTYPES:
        raise UsageError(f"unknown outtype {outtype!r}; adapters can be {', '.join(OUTTYPES)}")
    gguf_name = out.suffix.lower() == ".gguf"
    if to == "peft" and gguf_name:
        raise UsageError("--to peft writes a directory, and --out ends in .gguf")
    if to == "gguf" or gguf_name:
        target = out if gguf_name else out / _conventional_name(adapter, model, label, outtype)
        return GgufOutput(target, OUTTYPES[outtype], adapter, model, force=force)
    if outtype == "q8_0":
        raise UsageError("PEFT directories hold f32, f16 or bf16; q8_0 is for GGUF")
    _refuse_to_swallow(out, (adapter.path, model.path, *reads))
    return PeftOutput(out, OUTTYPES[outtype], adapter, model, force=force)


def _conventional_name(adapter: PeftAdapter, model: Checkpoint, label: str, outtype: str) -> str:
    base = identify(_names_of(adapter, model), model.path)
    return adapter_file_name(base, f"{plain_name(adapter.path)}-{label}", outtype)


def _names_of(adapter: PeftAdapter, model: Checkpoint) -> tuple[str | None, ...]:
    own = model.config.get("_name_or_path")
    return (adapter.base_model_name, own if isinstance(own, str) else None)


def _known_architecture(model: Checkpoint) -> Architecture | None:
    try:
        return architecture_of(model.architecture_class)
    except UnsupportedError:
        return None


class PeftOutput:
    """A PEFT directory with the adapter's own configuration."""

    def __init__(self, out: Path, qtype: QType, adapter: PeftAdapter, model: Checkpoint, *, force: bool) -> None:
        check_target(out, force=force, directory=True)
        self.target, self.tensor_file = out, out / WEIGHTS
        self._qtype, self._adapter, self._force = qtype, adapter, force
        self._architecture = _known_architecture(model)

    def name_of(self, module: str) -> str | None:
        found = self._architecture.to_gguf(module) if self._architecture else None
        return f"{found[0]}.weight" if found else None

    def planned_bytes(self) -> int:
        return sum(_elements(pair) for pair in self._adapter.pairs.values()) * nbytes((1,), self._qtype)

    def write(self, load: LoadPair, origin: Origin) -> Mapping[str, Rounding]:
        by_key = {pair.key: module for module, pair in self._adapter.pairs.items()}
        roundings = write_peft_adapter(
            self.target,
            [_plain_pair(pair, load, self._adapter) for pair in self._adapter.pairs.values()],
            config=self._adapter.config_bytes,
            qtype=self._qtype,
            metadata={key: _as_text(value) for key, value in origin.facts.items()},
            card=_card(self.target, self._adapter, origin),
            force=self._force,
        )
        return {by_key[key]: rounding for key, rounding in roundings.items()}


class GgufOutput:
    """A GGUF file; names, row order and scaling become llama.cpp's."""

    def __init__(self, out: Path, qtype: QType, adapter: PeftAdapter, model: Checkpoint, *, force: bool) -> None:
        check_target(out, force=force)
        self.target = self.tensor_file = out
        self._qtype, self._adapter, self._model, self._force = qtype, adapter, model, force
        try:
            self._architecture = architecture_of(model.architecture_class)
            self._heads = HeadCounts.from_config(model.config)
        except Error as error:
            raise type(error)(error.message, file=model.config_file) from None
        self._places = {module: self._place(module, pair) for module, pair in adapter.pairs.items()}
        # GGUF keeps one alpha, and reads 0 as "none": then B takes the whole scaling (which is 0).
        self._alpha = adapter.lora_alpha or 1.0

    def name_of(self, module: str) -> str | None:
        return self._places[module][0]

    def planned_bytes(self) -> int:
        pairs = (self._pair(module, None) for module in self._places)
        return sum(
            nbytes(shape, kind)
            for pair in pairs
            for shape, kind in zip((pair.stored_a_shape, pair.b_shape), pair.types(self._qtype), strict=True)
        )

    def write(self, load: LoadPair, origin: Origin) -> Mapping[str, Rounding]:
        roundings = write_gguf_adapter(
            self.target,
            [self._pair(module, load) for module in self._places],
            architecture=self._architecture.name,
            alpha=self._alpha,
            qtype=self._qtype,
            metadata=self._metadata(origin),
            invocation_tokens=self._adapter.invocation_tokens,
            force=self._force,
        )
        return {module: roundings[name] for module, (name, _) in self._places.items()}

    def _place(self, module: str, pair: LoraPair) -> tuple[str, Rule]:
        found = self._architecture.to_gguf(module)
        if found is None:
            raise UnsupportedError(
                f"the architecture {self._architecture.name} has no place for this module in GGUF",
                file=self._adapter.path,
                tensor=pair.key,
            )
        if "norm" in found[0]:
            raise UnsupportedError("llama.cpp ignores pairs on norms", file=self._adapter.path, tensor=pair.key)
        if self._model.tied_embeddings and found[0] in ("token_embd", "output"):
            raise UnsupportedError(
                "adapts an embedding that its model uses for input and output; llama.cpp can't apply such a pair. "
                "Merge the adapter into the model instead",
                file=self._adapter.path,
                tensor=pair.key,
            )
        self._check_rows(found[1], pair)
        return f"{found[0]}.weight", found[1]

    def _check_rows(self, rule: Rule, pair: LoraPair) -> None:
        """Tries the rule on a shape without data, so that heads which don't divide are told before any work."""
        import torch

        try:
            rule.weight(torch.empty(pair.shape, device="meta"), self._heads)
        except Error as error:
            raise type(error)(error.message, file=self._model.config_file, tensor=pair.tensors[1]) from None

    def _pair(self, module: str, load: LoadPair | None) -> PairOut:
        pair, (name, rule) = self._adapter.pairs[module], self._places[module]
        plain = _plain_pair(pair, load, self._adapter)
        factor = folding_factor(pair.scaling, pair.rank, self._alpha)

        def load_converted() -> tuple[torch.Tensor, torch.Tensor]:
            a, b = rule.pair(*plain.load(), self._heads)
            return a, b if factor == 1.0 else (b.double() * factor).float()

        return replace(plain, name=name, load=load_converted, transpose_a=pair.embedding)

    def _metadata(self, origin: Origin) -> list[tuple[str, Value]]:
        base = identify(_names_of(self._adapter, self._model), self._model.path)
        finetune = plain_name(self._adapter.path)
        entries = [
            ("general.name", text(f"{base.name} {finetune} ({origin.title})")),
            ("general.finetune", text(finetune)),
            ("general.description", text(origin.description)),
            ("general.file_type", uint32(_FILE_TYPES[self._qtype])),
            ("general.base_model.count", uint32(1)),
            ("general.base_model.0.name", text(base.name)),
        ]
        if base.organization is not None and base.repo_url is not None:
            entries.append(("general.base_model.0.organization", text(base.organization)))
            entries.append(("general.base_model.0.repo_url", text(base.repo_url)))
        if self._qtype == QType.Q8_0:
            entries.append(("general.quantization_version", uint32(2)))
        return entries + [(key, _as_value(value)) for key, value in origin.facts.items()]


def _plain_pair(pair: LoraPair, load: LoadPair | None, adapter: PeftAdapter) -> PairOut:
    rows, columns = pair.shape[::-1] if pair.embedding else pair.shape

    def load_pair() -> tuple[torch.Tensor, torch.Tensor]:
        assert load is not None, "a plan has no tensors"
        return load(pair.module)

    return PairOut(pair.key, (pair.rank, columns), (rows, pair.rank), load_pair, adapter.tensor_file, pair.embedding)


def _elements(pair: LoraPair) -> int:
    return pair.rank * sum(pair.shape)


def _refuse_to_swallow(out: Path, inputs: Sequence[Path]) -> None:
    """A directory that is swapped whole must not be, or hold, what is being read, nor the place one works in."""
    place = out.resolve()
    for path in (*inputs, Path.cwd(), Path.home()):
        if path.resolve().is_relative_to(place):
            raise OutputPathError(f"would replace {path} with everything in it; choose another name", file=out)


def _as_text(value: Fact) -> str:
    return str(value) if isinstance(value, str | int | float) else ",".join(value)


def _as_value(value: Fact) -> Value:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int):
        return uint32(value)
    return float32(value) if isinstance(value, float) else texts(value)


def _card(target: Path, adapter: PeftAdapter, origin: Origin) -> str:
    """A model card whose header hubs understand."""
    base = adapter.base_model_name
    header = ["---", "library_name: peft", "tags:", *(f"- {tag}" for tag in origin.tags)]
    if base is not None and is_repository(base):
        header.append(f"base_model: {json.dumps(base)}")  # quoted: it is a stranger's string
    rows = [f"- {key}: {_as_text(value)}" for key, value in origin.facts.items()]
    lines = [*header, "---", "", f"# {plain_name(target)}", "", origin.description, "", *rows]
    return "\n".join(lines) + "\n"

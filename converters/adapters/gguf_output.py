"""Writing GGUF LoRA adapters, as llama.cpp loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.card import card_of
from converters.adapters.gguf import GgufAdapter
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.output import Fact, LoadPair, Origin, Place, names_of, needed_heads, pair_out
from converters.adapters.storing import PairOut, Rounding, round_pair
from converters.architectures import HeadCounts, Rule, find_architecture
from converters.atomic import atomic_file, check_target
from converters.converted import place_in_gguf
from converters.errors import Error, UnsupportedError
from converters.ggml import QType, nbytes
from converters.gguf_file import TensorOut, Value, float32, text, texts, uint32, uint32s, write_gguf
from converters.identity import ModelIdentity, identify, plain_name
from converters.layouts import table_of
from converters.models import ModelDescription

if TYPE_CHECKING:
    import torch

_FILE_TYPES = {QType.F32: 0, QType.F16: 1, QType.Q8_0: 7, QType.BF16: 32}  # llama.h, enum llama_ftype
_REMEDY = "Writing a PEFT directory (an --out that does not end in .gguf) works for any architecture"


def write_gguf_adapter(
    target: Path,
    pairs: Sequence[PairOut],
    *,
    architecture: str,
    alpha: float,
    qtype: QType,
    metadata: Sequence[tuple[str, Value]] = (),
    invocation_tokens: Sequence[int] = (),
    force: bool = False,
) -> list[Rounding]:
    """Writes an adapter file, whole or not at all.

    llama.cpp scales every pair by alpha / r with the pair's own rank, so the caller folds whatever scaling
    differs from that into B (see `folding_factor`).

    Args:
        pairs: named as GGUF weights, `blk.0.attn_q.weight`; those of one name are the matrices of one 3-D stack,
            in order.
        architecture: `general.architecture` of the model that the adapter is for.
        alpha: `adapter.lora.alpha`; not 0, which llama.cpp takes for "no alpha".
        qtype: the type of all tensors; pairs whose rows are no whole blocks are stored as F16.
        metadata: further keys, in order.

    Returns:
        How each pair was rounded.

    Raises:
        OutputPathError, WriteError: see `converters.atomic`. UnsupportedError: see `round_pair`.
    """
    header = [
        ("general.architecture", text(architecture)),
        ("general.type", text("adapter")),
        *metadata,
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", float32(alpha)),
    ]
    if invocation_tokens:
        header.append(("adapter.alora.invocation_tokens", uint32s(invocation_tokens)))
    stacks: dict[str, list[PairOut]] = {}
    for pair in pairs:
        stacks.setdefault(pair.name, []).append(pair)
    report: dict[str, list[Rounding]] = {}
    tensors = [tensor for stack in stacks.values() for tensor in _tensors(stack, qtype, report)]
    with atomic_file(target, force=force) as file:
        write_gguf(file, header, tensors)
    return [report[pair.name].pop(0) for pair in pairs]


def folding_factor(scaling: float, rank: int, alpha: float) -> float:
    """What B must be multiplied by so that alpha / rank means `scaling`: exactly 1 for plain LoRA, whose alpha
    may differ from the stored float32 in its last bits."""
    factor = scaling * rank / alpha
    return 1.0 if abs(factor - 1.0) < 1e-7 else factor


def _tensors(stack: Sequence[PairOut], qtype: QType, report: dict[str, list[Rounding]]) -> tuple[TensorOut, TensorOut]:
    """A's and B's entries; A is written first, and rounding both then leaves B's bytes waiting.

    Rows are stored whole, so the bytes of a stack are those of its matrices one after the other.
    """
    waiting: list[bytes] = []
    first = stack[0]

    def give_a() -> bytes:
        rounded = [round_pair(pair, qtype) for pair in stack]
        waiting.append(b"".join(pair.b for pair in rounded))
        report[first.name] = [pair.rounding for pair in rounded]
        return b"".join(pair.a for pair in rounded)

    a_type, b_type = first.types(qtype)
    outer = (len(stack),) if first.stacked else ()
    return (
        TensorOut(f"{first.name}.lora_a", outer + first.stored_a_shape, a_type, give_a),
        TensorOut(f"{first.name}.lora_b", outer + first.b_shape, b_type, waiting.pop),
    )


class GgufOutput:
    """A GGUF file; names, row order and scaling become llama.cpp's."""

    def __init__(self, out: Path, qtype: QType, adapter: LoraAdapter, model: ModelDescription, *, force: bool) -> None:
        check_target(out, force=force)
        self.target = self.tensor_file = out
        self._qtype, self._adapter, self._model, self._force = qtype, adapter, model, force
        self._architecture, self._heads, self._places = _places(adapter, model)
        table = find_architecture(self._architecture)
        headless = table is not None and table.to_gguf("lm_head") is None  # GGUF has one matrix for both ends
        for module, pair in adapter.pairs.items():
            self._check(self._places[module].name, pair, tied=headless or model.tied_embeddings)
        # GGUF keeps one alpha, and reads 0 as "none": then B takes the whole scaling (which is 0).
        self._alpha = adapter.lora_alpha or 1.0

    def name_of(self, module: str) -> str | None:
        return self._places[module].name

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
            architecture=self._architecture,
            alpha=self._alpha,
            qtype=self._qtype,
            metadata=self._metadata(origin),
            invocation_tokens=self._adapter.invocation_tokens,
            force=self._force,
        )
        return dict(zip(self._places, roundings, strict=True))

    def _check(self, name: str, pair: LoraPair, *, tied: bool) -> None:
        if "norm" in name:
            raise UnsupportedError("llama.cpp ignores pairs on norms", file=self._adapter.path, tensor=pair.key)
        if tied and name in ("token_embd.weight", "output.weight"):
            raise UnsupportedError(
                "adapts an embedding that its model uses for input and output; llama.cpp can't apply such a pair. "
                "Merge the adapter into the model instead",
                file=self._adapter.path,
                tensor=pair.key,
            )

    def _pair(self, module: str, load: LoadPair | None) -> PairOut:
        pair = self._adapter.pairs[module]
        plain = pair_out(pair, self._places[module], load, self._adapter, self._heads)
        factor = folding_factor(pair.scaling, pair.rank, self._alpha)

        def load_folded() -> tuple[torch.Tensor, torch.Tensor]:
            a, b = plain.load()
            return a, b if factor == 1.0 else (b.double() * factor).float()

        return replace(plain, load=load_folded, transpose_a=pair.embedding, stacked=pair.expert is not None)

    def _metadata(self, origin: Origin) -> list[tuple[str, Value]]:
        card = card_of(self._adapter)
        base = identify((*names_of(self._adapter, self._model), *card.base_models), self._model.path)
        finetune = plain_name(self._adapter.path)
        entries = [
            ("general.name", text(f"{base.name} {finetune}" + (f" ({origin.title})" if origin.title else ""))),
            ("general.finetune", text(finetune)),
            ("general.description", text(origin.description)),
            ("general.file_type", uint32(_FILE_TYPES[self._qtype])),
            *([("general.license", text(card.license))] if card.license else []),
            ("general.tags", texts(tuple(dict.fromkeys((*origin.tags, *card.tags))))),
            *([("general.languages", texts(card.languages))] if card.languages else []),
            ("general.base_model.count", uint32(1)),
            *_published("general.base_model.0", base),
        ]
        if card.datasets:
            entries.append(("general.dataset.count", uint32(len(card.datasets))))
            for place, name in enumerate(card.datasets):
                entries += _published(f"general.dataset.{place}", identify((name,), Path(name)), "datasets/")
        if self._qtype == QType.Q8_0:
            entries.append(("general.quantization_version", uint32(2)))
        return entries + [(key, _as_value(value)) for key, value in origin.facts.items()]


def _published(key: str, what: ModelIdentity, kind: str = "") -> list[tuple[str, Value]]:
    """Name, and where it is published if that is known; `kind` is the hub's word for what is no model."""
    entries = [(f"{key}.name", text(what.name))]
    if what.organization is not None:
        entries.append((f"{key}.organization", text(what.organization)))
        url = f"https://huggingface.co/{kind}{what.organization}/{what.name}"
        entries.append((f"{key}.repo_url", text(url)))
    return entries


def _places(adapter: LoraAdapter, model: ModelDescription) -> tuple[str, HeadCounts | None, dict[str, Place]]:
    """GGUF's name of the architecture, the heads where rules need them, and every module's place.

    Raises:
        UnsupportedError: the architecture has no table, or no place for a module.
        FormatError: heads that can't be told, or don't divide a module's rows.
    """
    if adapter.layout == "gguf":
        named = {module: Place(_gguf_name(adapter, pair)) for module, pair in adapter.pairs.items()}
        return adapter.architecture or model.architecture, None, named
    architecture = table_of(model, _REMEDY)
    places = {}
    for module, pair in adapter.pairs.items():
        name, rule = place_in_gguf(architecture, pair, adapter.path)
        places[module] = Place(f"{name}.weight", rule)
    heads = needed_heads(model, places)
    for module, pair in adapter.pairs.items():
        _check_rows(places[module].rule, pair, heads, model)
    return architecture.name, heads, places


def _check_rows(rule: Rule | None, pair: LoraPair, heads: HeadCounts | None, model: ModelDescription) -> None:
    if rule is None or heads is None:
        return
    try:
        rule.check_rows(pair.shape, heads)
    except Error as error:
        raise type(error)(error.message, file=model.described_by, tensor=pair.tensors[1]) from None


def _gguf_name(adapter: LoraAdapter, pair: LoraPair) -> str:
    """A GGUF file's own name for the weight, which need not end in `.weight`."""
    return pair.key if isinstance(adapter, GgufAdapter) else f"{pair.weight}.weight"


def _as_value(value: Fact) -> Value:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int):
        return uint32(value)
    return float32(value) if isinstance(value, float) else texts(value)

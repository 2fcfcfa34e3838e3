"""Writing GGUF LoRA adapters, as llama.cpp loads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters.card import card_of
from converters.adapters.converted import places_in_gguf
from converters.adapters.gguf import GgufAdapter
from converters.adapters.gguf_check import ACTIVATED
from converters.adapters.gguf_ignored import ignored_kinds
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.adapters.naming import base_names, finetune_of, whole_finetune
from converters.adapters.output import Fact, LoadPair, Origin, Place, needed_heads, pair_out
from converters.adapters.storing import PairOut, RoundedPair, Rounding, of_rank, rounded_in_turn, zeros_like
from converters.architectures import HeadCounts, Rule, find_architecture
from converters.atomic import atomic_file, check_target
from converters.errors import Error, UnsupportedError
from converters.ggml import QType, nbytes
from converters.gguf_file import TensorOut, Value, float32, text, texts, uint32, uint32s, write_gguf
from converters.identity import ModelIdentity, identify
from converters.layouts import table_of
from converters.models import ModelDescription
from converters.names import named

if TYPE_CHECKING:
    import torch

_LEAST_ALPHA = 1e-30  # less would be 0 in float32, or lose its digits
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
    rounded = rounded_in_turn(stacks.values(), qtype)
    tensors = [tensor for stack in stacks.values() for tensor in _tensors(stack, qtype, rounded, report)]
    with atomic_file(target, force=force) as file:
        write_gguf(file, header, tensors)
    return [report[pair.name].pop(0) for pair in pairs]


def folding_factor(scaling: float, rank: int, alpha: float) -> float:
    """What B must be multiplied by so that alpha / rank means `scaling`: exactly 1 for plain LoRA, whose alpha
    may differ from the stored float32 in its last bits."""
    factor = scaling * rank / alpha
    return 1.0 if abs(factor - 1.0) < 1e-7 else factor


def _tensors(
    stack: Sequence[PairOut],
    qtype: QType,
    in_turn: Iterator[Sequence[RoundedPair]],
    report: dict[str, list[Rounding]],
) -> tuple[TensorOut, TensorOut]:
    """A's and B's entries; A is written first, and rounding both then leaves B's bytes waiting.

    Rows are stored whole, so the bytes of a stack are those of its matrices one after the other.
    """
    waiting: list[bytes] = []
    first = stack[0]

    def give_a() -> bytes:
        rounded = next(in_turn)
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
        headless = table is not None and not table.to_gguf("lm_head")  # GGUF has one matrix for both ends
        for module, pair in adapter.pairs.items():
            self._check(self._places[module].name, pair, tied=headless or model.tied_embeddings)
        # GGUF keeps one alpha, and reads 0 as "none": then B takes the whole scaling.
        self._alpha = adapter.lora_alpha if abs(adapter.lora_alpha) > _LEAST_ALPHA else 1.0

    @property
    def losses(self) -> tuple[str, ...]:
        """Pairs that llama.cpp loads and never applies; they are written, so that nothing is gone on the way back."""
        kinds = ignored_kinds(self._architecture, [place.name for place in self._places.values()])
        return tuple(
            f"llama.cpp loads and does not apply the pairs on {kind} ({len(names)}); merge the adapter into the model: "
            f"{named(names)}"
            for kind, names in kinds.items()
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"the adapter {ACTIVATED}",) if self._adapter.invocation_tokens else ()

    def name_of(self, module: str) -> str | None:
        return self._places[module].name

    def planned_bytes(self) -> int:
        return sum(
            nbytes(shape, kind)
            for _, pair in self._matrices(None)
            for shape, kind in zip((pair.stored_a_shape, pair.b_shape), pair.types(self._qtype), strict=True)
        )

    def write(self, load: LoadPair, origin: Origin) -> Mapping[str, Rounding]:
        matrices = self._matrices(load)
        roundings = write_gguf_adapter(
            self.target,
            [pair for _, pair in matrices],
            architecture=self._architecture,
            alpha=self._alpha,
            qtype=self._qtype,
            metadata=self._metadata(origin),
            invocation_tokens=self._adapter.invocation_tokens,
            force=self._force,
        )
        found = zip(matrices, roundings, strict=True)
        return {module: rounding for (module, _), rounding in found if module is not None}

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

    def _matrices(self, load: LoadPair | None) -> list[tuple[str | None, PairOut]]:
        """Every matrix in the file's order and the module behind it; None behind an expert that has no pair."""
        stacks: dict[str, list[str]] = {}
        for module, place in self._places.items():
            stacks.setdefault(place.name, []).append(module)
        return [matrix for modules in stacks.values() for matrix in self._stack(modules, load)]

    def _stack(self, modules: Sequence[str], load: LoadPair | None) -> list[tuple[str | None, PairOut]]:
        """The matrices of one tensor: one, or every expert's. llama.cpp wants all experts, and one rank for them."""
        pairs = [self._adapter.pairs[module] for module in modules]
        rank = max(pair.rank for pair in pairs)
        if pairs[0].expert is None:
            return [(modules[0], self._pair(modules[0], rank, load))]
        known = {pair.expert: pair.module for pair in pairs}
        nothing = zeros_like(self._pair(modules[0], rank, load))
        count = max(self._model.experts, 1 + max(pair.expert or 0 for pair in pairs))
        owners = [known.get(number) for number in range(count)]
        return [(owner, nothing if owner is None else self._pair(owner, rank, load)) for owner in owners]

    def _pair(self, module: str, rank: int, load: LoadPair | None) -> PairOut:
        """A pair with its scaling folded in, of the rank that its tensor has."""
        pair = self._adapter.pairs[module]
        plain = of_rank(pair_out(pair, self._places[module], load, self._adapter, self._heads), rank)
        factor = folding_factor(pair.scaling, rank, self._alpha)

        def load_folded() -> tuple[torch.Tensor, torch.Tensor]:
            a, b = plain.load()
            return a, b if factor == 1.0 else (b.double() * factor).float()

        return replace(plain, load=load_folded, transpose_a=pair.embedding, stacked=pair.expert is not None)

    def _metadata(self, origin: Origin) -> list[tuple[str, Value]]:
        card = card_of(self._adapter)
        base = base_names(self._adapter, self._model)
        own = finetune_of(self._adapter, base)
        name = card.name or f"{base.models[0].name} {own}".rstrip()
        described = f"{card.description.rstrip(' .')}. " if card.description else ""
        told = {
            "name": f"{name} ({origin.title})" if origin.title else name,
            "author": card.author,
            "finetune": whole_finetune(base, own),
            "basename": base.parts.basename,
            "size_label": base.parts.size_label,
            "description": f"{described}{origin.description}",
            "license": card.license,
            "license.name": card.license_name,
            "license.link": card.license_link,
        }
        entries = [(f"general.{key}", text(value)) for key, value in told.items() if value]
        entries += [
            ("general.file_type", uint32(_FILE_TYPES[self._qtype])),
            ("general.tags", texts(tuple(dict.fromkeys((*origin.tags, *card.tags))))),
            *([("general.languages", texts(card.languages))] if card.languages else []),
            *_listed("general.base_model", base.models),
            *_listed("general.dataset", [identify(name) for name in card.datasets], "datasets/"),
        ]
        if self._qtype == QType.Q8_0:
            entries.append(("general.quantization_version", uint32(2)))
        return entries + [(key, as_value(value)) for key, value in origin.facts.items()]


def _listed(key: str, identities: Sequence[ModelIdentity], kind: str = "") -> list[tuple[str, Value]]:
    """A count, and of each its name and where it is published if that is known; none where there are none.

    Args:
        kind: the hub's word for what is no model.
    """
    entries = [(f"{key}.count", uint32(len(identities)))] if identities else []
    for place, what in enumerate(identities):
        url = f"https://huggingface.co/{kind}{what.organization}/{what.name}" if what.organization else what.url
        told = {"name": what.name, "organization": what.organization, "repo_url": url}
        entries += [(f"{key}.{place}.{part}", text(value)) for part, value in told.items() if value]
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
        (found,) = places_in_gguf(architecture, pair, adapter.path)  # see `layouts.written_layout`
        places[module] = Place(f"{found.name}.weight", found.rule)
    heads = needed_heads(model, places.values())
    for module, pair in adapter.pairs.items():
        _check_rows(places[module].rule, pair, heads, model)
    return architecture.name, heads, places


def _check_rows(rule: Rule | None, pair: LoraPair, heads: HeadCounts | None, model: ModelDescription) -> None:
    if rule is None or heads is None:
        return
    try:
        rule.pair_shape(pair.shape, heads)
    except Error as error:
        raise type(error)(error.message, file=model.described_by, tensor=pair.tensors[1]) from None


def _gguf_name(adapter: LoraAdapter, pair: LoraPair) -> str:
    """A GGUF file's own name for the weight, which need not end in `.weight`."""
    return pair.key if isinstance(adapter, GgufAdapter) else f"{pair.weight}.weight"


def as_value(value: Fact) -> Value:
    """A fact as a GGUF value."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int):
        return uint32(value)
    return float32(value) if isinstance(value, float) else texts(value)

"""LoX as an adapter: coef * U_k S_k W_k^T of every matrix is a LoRA pair of rank k for the unchanged aligned model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import pad

from converters.adapters.lora import LoraPair
from converters.adapters.output import Origin
from converters.adapters.plan import plan_output
from converters.adapters.whole import WholeTensor
from converters.errors import UnsupportedError
from converters.models import Layout, Model
from converters.names import first_few, natural_order
from safelora_gguf.lox import EMBEDDINGS
from safelora_gguf.lox_steps import Steps
from safelora_gguf.pairing import Triple

_HEADS = {"output", "lm_head"}
_EXPERTS = "exps"


class LoxAdapter:
    """The pairs of an extrapolation (a `LoraAdapter`), computed when they are loaded.

    Its scaling is 1: with B = coef * U sqrt(S) and A = sqrt(S) W^T the run-time scale 1 means coef.
    """

    format = "lox"
    invocation_tokens: tuple[int, ...] = ()
    peft_config: bytes | None = None
    frozen_tables: Mapping[str, str] = {}
    magnitudes: Mapping[str, str] = {}
    losses: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    whole: Mapping[str, WholeTensor] = {}
    notes: tuple[str, ...] = ()

    def __init__(self, aligned: Model, triples: Sequence[Triple], rank: int) -> None:
        self._aligned = aligned
        self._triples = {triple.pair.module: triple for triple in triples}
        self.pairs: Mapping[str, LoraPair] = {
            triple.pair.module: replace(triple.pair, shape=self._whole_shape(triple)) for triple in triples
        }
        self.lora_alpha = float(rank)
        self.steps: Steps | None = None

    @property
    def path(self) -> Path:
        return self._aligned.path

    @property
    def tensor_file(self) -> Path:
        return self._aligned.sources[-1]

    @property
    def layout(self) -> Layout:
        return self._aligned.layout

    @property
    def architecture(self) -> str | None:
        return self._aligned.architecture if self.layout == "gguf" else None

    @property
    def nbytes(self) -> int:
        return self._aligned.nbytes

    @property
    def base_model_name(self) -> str | None:
        """The aligned model, for which it is."""
        return next(iter(self._aligned.repositories), None) or self._aligned.path.name.removesuffix(".gguf")

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.steps is not None, "a plan has no tensors"
        pair, step = self.pairs[module], self.steps.of(self._triples[module])
        rows, columns = pair.shape[::-1] if pair.embedding else pair.shape
        if step.a is None or step.b is None:
            return torch.zeros(pair.rank, columns), torch.zeros(rows, pair.rank)
        missing = pair.rank - len(step.a)
        a = pad(step.a, (0, columns - step.a.shape[1], 0, missing))  # tokens that only one model has: nothing is added
        return a, pad(step.b, (0, missing, 0, rows - step.b.shape[0]))

    def load_whole(self, key: str) -> torch.Tensor:
        raise KeyError(key)

    def load_magnitude(self, module: str) -> torch.Tensor:
        raise KeyError(module)

    def load_frozen_table(self, module: str) -> torch.Tensor:
        raise KeyError(module)

    def fingerprint(self) -> str:
        return self._aligned.fingerprint()

    def _whole_shape(self, triple: Triple) -> tuple[int, int]:
        shape = self._aligned.infos[triple.aligned_tensor].shape
        return shape[-2], shape[-1]


class AdapterForm:
    """An adapter output of an extrapolation.

    Attributes:
        triples: what it adapts; of tied embeddings and of matrices by head there are no pairs.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        out: str | Path,
        models: tuple[Model, Model],
        triples: Sequence[Triple],
        rank: int,
        *,
        outtype: str,
        to: Literal["gguf", "peft"] | None,
        force: bool,
    ) -> None:
        """Raises what `plan_output` raises; UnsupportedError where nothing is left to adapt."""
        base, aligned = models
        left = [group for group in (_tied_ends(aligned, triples), _other_stacks(aligned, triples)) if group.weights]
        self._left_out = tuple(group.why for group in left)
        without = frozenset[str]().union(*(group.weights for group in left))
        self.triples = [triple for triple in triples if triple.pair.weight not in without]
        if not self.triples:
            raise UnsupportedError("has no matrix that an adapter could change; use --as model", file=aligned.path)
        self.outtype = outtype
        self._adapter = LoxAdapter(aligned, self.triples, rank)
        self._output = plan_output(out, self._adapter, aligned, outtype=outtype, to=to, label="LoX", force=force,
                                   reads=base.sources)  # fmt: skip

    @property
    def target(self) -> Path:
        return self._output.target

    @property
    def tensor_file(self) -> Path:
        return self._output.tensor_file

    @property
    def losses(self) -> tuple[str, ...]:
        return (*self._left_out, *self._output.losses)

    def name_of(self, triple: Triple) -> str:
        """The matrix's tensor, whether it is adapted or not."""
        known = triple.pair.module in self._adapter.pairs
        return (self._output.name_of(triple.pair.module) if known else None) or triple.aligned_tensor

    def planned_bytes(self) -> int:
        return self._output.planned_bytes()

    def write(self, steps: Steps, origin: Origin, *, card: str) -> Mapping[str, float]:
        """Writes every pair; the relative rounding error of each by module. Its card is made from `origin`."""
        self._adapter.steps = steps
        roundings = self._output.write(self._adapter.load, origin)
        return {module: rounding.error for module, rounding in roundings.items()}


class _LeftOut(NamedTuple):
    """Weights without a pair, and a sentence that says why."""

    weights: frozenset[str]
    why: str


def _tied_ends(model: Model, triples: Sequence[Triple]) -> _LeftOut:
    weights = {triple.pair.weight for triple in triples if triple.pair.weight.rpartition(".")[2] in EMBEDDINGS | _HEADS}
    told = "input and output are one matrix (tied), which no adapter can change at both ends: left out; the model form"
    return _LeftOut(frozenset(weights) if model.tied_embeddings else frozenset(), f"{_some(weights)}: {told} has it")


def _other_stacks(model: Model, triples: Sequence[Triple]) -> _LeftOut:
    """In GGUF stacks of anything but experts, DeepSeek's attn_k_b say; elsewhere any, since only a table tells how PEFT
    calls the experts."""
    stacks = {triple.pair.weight for triple in triples if triple.pair.expert is not None}
    weights = {name for name in stacks if model.layout != "gguf" or _EXPERTS not in name}
    told = "a stack of matrices that no adapter has a form for: left out; the model form has"
    return _LeftOut(frozenset(weights), f"{_some(weights)}: {told} {'it' if len(weights) == 1 else 'them'}")


def _some(weights: Collection[str]) -> str:
    return first_few(sorted(weights, key=natural_order))

"""Safe LoRA from files to files: references and adapter in, a repaired adapter and a report out.

Everything is checked from headers first. Then each module is scored on the untouched adapter, one weight of
each reference in memory at a time; then modules are chosen; then the adapter is written. The work is done in
the layout that the inputs share (see `converters.layouts`), and only the small pairs are brought into the output's.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from converters.adapters.lora import LoraAdapter
from converters.adapters.output import AdapterOutput, Fact, Origin
from converters.adapters.plan import kind_of, plan_output
from converters.adapters.storing import Rounding
from converters.errors import UsageError
from converters.identity import plain_name
from converters.layouts import common_layout
from converters.models import Model
from converters.opening import open_adapter, open_model
from safelora_gguf._version import __version__
from safelora_gguf.device import exact_float32, resolve_device
from safelora_gguf.losses import as_plain_pairs, losses_of, refuse_losses
from safelora_gguf.pairing import Triple, pair_up
from safelora_gguf.projection import blend
from safelora_gguf.references import check_references, noise_notes, score_notes
from safelora_gguf.report import InputReport, ModuleReport, OutputReport, ProjectReport, label_of, rounding_notes
from safelora_gguf.scoring import Operator, Progress, Score, Scorer, norm_of
from safelora_gguf.selection import Selection, select

logger = logging.getLogger(__name__)

_PAPER_THRESHOLD = 0.35
_SUBSPACE_RANK = 6


@dataclass(frozen=True)
class Projection:
    """What is done to an adapter, apart from files.

    Attributes:
        operator: `paper` (C = V V^T / ||V||_F) or `subspace` (P_k = U_k U_k^T).
        rank: k of the subspace operator.
        selection: which modules; by default the paper's threshold 0.35, or all for `subspace`, whose cosines
            are small by construction.
        strength: B becomes (1 - strength) B + strength P B.
    """

    operator: Operator = "paper"
    rank: int | None = None
    selection: Selection | None = None
    strength: float = 1.0
    k: int = field(init=False)
    rule: Selection = field(init=False)

    def __post_init__(self) -> None:
        """Fills in the defaults.

        Raises:
            UsageError: options out of range, or that exclude each other.
        """
        if self.operator not in ("paper", "subspace"):
            raise UsageError(f"unknown operator {self.operator!r}; expected paper or subspace")
        if self.rank is not None and (self.operator == "paper" or self.rank < 1):
            raise UsageError("rank is for --operator subspace, and at least 1")
        if not 0 < self.strength <= 1:
            raise UsageError(f"strength is {self.strength:g}, expected more than 0 and at most 1")
        default = Selection("threshold", _PAPER_THRESHOLD) if self.operator == "paper" else Selection("all")
        object.__setattr__(self, "k", self.rank or _SUBSPACE_RANK)
        object.__setattr__(self, "rule", self.selection or default)


def project_adapter(
    base: str | Path,
    aligned: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    operator: Operator = "paper",
    rank: int | None = None,
    selection: Selection | None = None,
    strength: float = 1.0,
    outtype: str = "f32",
    to: Literal["gguf", "peft"] | None = None,
    device: str = "auto",
    dora_rank: int | None = None,
    strict: bool = False,
    allow_noisy_reference: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ProjectReport:
    """Projects a LoRA adapter onto a model's alignment, writes the result and reports on it.

    Args:
        base: the model before its alignment: a directory with config.json and safetensors, a .safetensors file
            beside config.json, a .gguf file (quantized ones included) or the first shard of a split one.
        aligned: the model after it, on which the adapter was trained; it may be in another format.
        adapter: a PEFT directory, an MLX directory or a GGUF adapter.
        out: a file ending in .gguf; or a directory without an adapter in it, existing or ending in a separator, for a
            GGUF file named by convention; any other name is a PEFT directory's.
        to: `gguf` or `peft`, whatever directory `out` is.
        operator, rank, selection, strength: see `Projection`.
        outtype: f32, f16, bf16 or (GGUF only) q8_0.
        device: auto, cpu, cuda, cuda:N or mps.
        dora_rank: of the pairs that stand for a DoRA adapter, whose update has no low rank; by default the smallest
            that keeps each module's error under 1 %. The aligned model must then be in safetensors.
        strict: refuse what would be lost or only approximated, instead of reporting it.
        allow_noisy_reference: go on with the paper's operator where V is mostly the references' rounding noise.
        force: replace an existing output.
        dry_run: check all headers, compute and write nothing.
        progress: called with (bytes done, bytes in all, next module) as the references are read.

    Raises:
        UsageError: options that make no sense.
        InputError: a file or an output path that cannot be used; nothing was written.
        WriteError: the disk is full or fails; nothing partial was left.
    """
    projection, where = Projection(operator, rank, selection, strength), resolve_device(device)
    references, opened = (open_model(base), open_model(aligned)), open_adapter(adapter, dora=True)
    plain, _ = as_plain_pairs(opened, references[1], dora_rank, named_by="--aligned", strict=strict)
    before, after, source = common_layout(*references, plain, to_gguf=kind_of(out, to) != "peft")
    triples = _triples(before, after, source, projection)
    output = plan_output(
        out, source, after, outtype=outtype, to=to, label="SafeLoRA", force=force, reads=before.sources
    )
    refuse_losses(source, losses_of(source, output) if strict else ())
    inputs = InputReport.of("base", before), InputReport.of("aligned", after), InputReport.of("adapter", opened)
    run = _Run(projection, output, source, triples, outtype, inputs, dora=plain is not opened)
    if dry_run:
        return run.report({}, frozenset(), None, {})
    return run.carry_out(before, after, where, progress, allow_noise=allow_noisy_reference)


def _triples(before: Model, after: Model, adapter: LoraAdapter, projection: Projection) -> list[Triple]:
    """Every pair with its weights, once the subspace's rank is known to fit them all."""
    triples = pair_up(before, after, adapter)
    for triple in triples:
        if projection.operator == "subspace" and projection.k > min(triple.pair.shape):
            raise UsageError(f"rank {projection.k} is more than {triple.pair.module} has: {min(triple.pair.shape)}")
    return triples


@dataclass(frozen=True)
class _Run:
    """One projection between its checks and its report."""

    projection: Projection
    output: AdapterOutput
    adapter: LoraAdapter
    triples: Sequence[Triple]
    outtype: str
    inputs: tuple[InputReport, ...]
    dora: bool

    def carry_out(
        self, before: Model, after: Model, where: torch.device, progress: Progress | None, *, allow_noise: bool
    ) -> ProjectReport:
        """Scores all modules, chooses, and writes."""
        operator, rule = self.projection.operator, self.projection.rule
        logger.debug("scoring %d modules on %s", len(self.triples), where)
        with exact_float32(), torch.inference_mode():
            scorer = Scorer(before, after, self.adapter, operator, self.projection.k, where)
            scores = scorer.score_all(self.triples, progress)
            check_references(before, after, scores, allow_noise or rule.chooses_nothing)
            chosen = select({name: score.cosine for name, score in scores.items()}, rule)
            return self.report(scores, chosen, *self.write(scores, chosen))

    def write(
        self, scores: Mapping[str, Score], chosen: Collection[str]
    ) -> tuple[Mapping[str, Rounding], Mapping[str, float]]:
        """How each pair was rounded, and the norm of each delta that was changed (before its scaling), by module."""
        norms: dict[str, float] = {}

        def load(module: str) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = self.adapter.load(module)
            new_b = self._new_b(b.float(), scores[module], module in chosen)
            if module in chosen:
                norms[module] = norm_of(new_b, scores[module])
            return a.float(), new_b

        names = [self._label(triple) for triple in self.triples if triple.pair.module in chosen]
        return self.output.write(load, self._origin(names)), norms

    def report(
        self,
        scores: Mapping[str, Score],
        chosen: Collection[str],
        roundings: Mapping[str, Rounding] | None,
        norms: Mapping[str, float],
    ) -> ProjectReport:
        rounded = roundings or {}
        modules = [self._module(triple, scores, rounded.get(triple.pair.module), norms) for triple in self.triples]
        written = None if roundings is None else OutputReport.of(self.output.target, self.output.tensor_file)
        return ProjectReport(
            operator=self.projection.operator,
            subspace_rank=self.projection.k if self.projection.operator == "subspace" else None,
            selection={"mode": self.projection.rule.mode, "value": self.projection.rule.value},
            strength=self.projection.strength,
            outtype=self.outtype,
            modules=tuple(modules),
            inputs=self.inputs,
            output=written,
            notes=self._notes(scores, chosen, rounded),
            losses=losses_of(self.adapter, self.output),
            planned_output=(str(self.output.target), self.output.planned_bytes()),
        )

    def _new_b(self, b: torch.Tensor, score: Score, projected: bool) -> torch.Tensor:
        if not projected or score.projected_b is None:
            return b
        return blend(b, score.projected_b, self.projection.strength)

    def _module(
        self,
        triple: Triple,
        scores: Mapping[str, Score],
        rounding: Rounding | None,
        norms: Mapping[str, float],
    ) -> ModuleReport:
        pair = triple.pair
        score = scores.get(pair.module)
        before = after = None
        if score is not None:
            before = pair.scaling * score.delta_norm
            after = pair.scaling * norms.get(pair.module, score.delta_norm)
        return ModuleReport(
            name=self._name(triple),
            shape=pair.shape,
            rank=pair.rank,
            cosine=score.cosine if score else None,
            projected=pair.module in norms,
            alignment_norm=score.alignment_norm if score else None,
            delta_norm=None if before is None else abs(before),
            delta_norm_after=None if after is None else abs(after),
            snr=score.snr if score else None,
            noise_edge=score.edge if score and score.snr is not None else None,
            directions=score.directions if score else None,
            stored_error=rounding.error if rounding else None,
            expert=pair.expert,
        )

    def _name(self, triple: Triple) -> str:
        return self.output.name_of(triple.pair.module) or f"base_model.model.{triple.pair.key}"

    def _label(self, triple: Triple) -> str:
        """The name, and which of a stack's experts it is."""
        return label_of(self._name(triple), triple.pair.expert)

    def _notes(
        self, scores: Mapping[str, Score], chosen: Collection[str], roundings: Mapping[str, Rounding]
    ) -> tuple[str, ...]:
        told = (*losses_of(self.adapter, self.output), *self.output.notes, *self.adapter.notes)
        notes = [*told, *noise_notes(scores)]
        for triple in self.triples:
            module, name = triple.pair.module, self._label(triple)
            if module in scores:
                notes += [f"{name}: {note}" for note in score_notes(scores[module], self.projection.k)]
            if module in roundings:
                notes += [f"{name}: {note}" for note in rounding_notes(roundings[module], self.outtype)]
        scored = sum(score.cosine is not None for score in scores.values())
        rule = self.projection.rule
        if scores and rule.mode == "number" and rule.value is not None and rule.value > scored:
            notes.append(f"number {rule.value:g} is more than the {scored} modules with a cosine: all were projected")
        if scores and not chosen:
            notes.append("no module was selected: the output is the adapter as it was")
        return tuple(notes)

    def _origin(self, projected: Sequence[str]) -> Origin:
        projection, rule = self.projection, self.projection.rule
        facts: dict[str, Fact] = {
            "safelora.version": __version__,
            "safelora.operator": projection.operator,
            "safelora.selection.mode": rule.mode,
            "safelora.strength": float(projection.strength),
            "safelora.modules.projected": tuple(projected),
            "safelora.modules.total": len(self.triples),
        }
        if rule.value is not None:
            facts["safelora.selection.value"] = float(rule.value)
        if projection.operator == "subspace":
            facts["safelora.rank"] = projection.k
        for item in self.inputs:
            facts[f"safelora.{item.role}.name"] = plain_name(Path(item.path))
            facts[f"safelora.{item.role}.fingerprint"] = item.fingerprint
        description = (
            f"{'The plain pairs nearest to a DoRA' if self.dora else 'A LoRA'} adapter, projected onto its model's "
            f"alignment with Safe LoRA (arXiv 2405.16833): "
            f"{len(projected)} of {len(self.triples)} modules changed. Measure what it refuses before relying on it."
        )
        return Origin("Safe LoRA", description, ("lora", "safe-lora", "safelora-gguf"), facts)

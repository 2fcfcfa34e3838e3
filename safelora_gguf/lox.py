"""Which weights LoX extrapolates (Perin et al., COLM 2025, arXiv 2506.15606): every matrix of a model, embeddings and
output head included, and every expert of a stack."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from converters.adapters.lora import LoraPair
from converters.errors import MismatchError, UsageError
from converters.models import Model
from converters.names import canonical, natural_order
from safelora_gguf.pairing import Triple

EMBEDDINGS = {"token_embd", "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"}
_POSITIONS = {"wpe", "embed_positions", "position_embeddings", "token_type_embeddings"}
_NOT_MULTIPLIED = re.compile(
    r"(bias|_norm\.weight|position_embd\.weight|token_types\.weight|rope_freqs\.weight|conv(1d)?(_[qkv])?\.weight)$"
)
_IN_LAYER = re.compile(r"\.\d+\.")
_BLOCK = 1 << 20  # entries that are compared at once
_FEW = 16  # sides under this are no limit for the rank: a gate with one row has one direction


def extrapolated_weights(base: Model, aligned: Model, rank: int) -> list[Triple]:
    """Every matrix that both models have, as a pair of this rank would adapt it, in the order of names.

    Both models are in one layout and have passed `check_family`. An embedding or output table of another number of
    rows is there with the rows that both have.

    Raises:
        MismatchError: a layer has a matrix in one of them alone, or they have none in common.
        UnsupportedError: a weight in a type that can't be read.
    """
    ours, theirs = _by_name(base), _by_name(aligned)
    lonely = sorted((name for name in ours.keys() ^ theirs.keys() if _IN_LAYER.search(name)), key=natural_order)
    if lonely:
        there, lacking = (aligned, base) if lonely[0] in theirs else (base, aligned)
        raise MismatchError(
            f"has no {lonely[0]}, which {there.path} has ({len(lonely)} matrices of layers are in one of them alone): "
            f"base and aligned must be the same model before and after its alignment",
            file=lacking.path,
        )
    triples = [triple for name in sorted(theirs, key=natural_order) if name in ours
               for triple in _matrices(name, (ours[name], theirs[name]), (base, aligned), rank)]  # fmt: skip
    if not triples:
        raise MismatchError(f"and the base {base.path} have no matrix in common", file=aligned.path)
    for model, names in ((base, {t.base_tensor for t in triples}), (aligned, {t.aligned_tensor for t in triples})):
        for name in sorted(names):
            model.check_type(name)
    return triples


def single_matrices(base: Model, aligned: Model) -> list[str]:
    """Names of matrices that one of the models has and the other hasn't."""
    return sorted(_by_name(base).keys() ^ _by_name(aligned).keys(), key=natural_order)


def check_rank(rank: int, triples: Sequence[Triple]) -> None:
    """That every matrix has this many directions, but for those of a few rows, which are taken whole.

    Raises:
        UsageError: one hasn't.
    """
    for triple in triples:
        smaller = min(triple.pair.shape)
        if rank > smaller >= _FEW:
            raise UsageError(f"rank {rank} is more than {triple.pair.module} has: {smaller}")


def same_weight(base: Model, aligned: Model, triple: Triple) -> bool:
    """Whether both models have the same values there; most differ in the first rows."""
    rows, columns = triple.pair.shape
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        span = triple.first_row + start, triple.first_row + min(start + step, rows)
        ours, theirs = base.rows(triple.base_tensor, *span), aligned.rows(triple.aligned_tensor, *span)
        if not torch.equal(ours.to(torch.float32), theirs.to(torch.float32)):
            return False
    return True


def identical(base: Model, aligned: Model) -> MismatchError:
    """Two references that are one model."""
    told = f"holds the same weights as the base {base.path}; the aligned model must differ from the base"
    return MismatchError(told, file=aligned.path)


def _by_name(model: Model) -> dict[str, str]:
    """The tensors that may be extrapolated, by canonical name."""
    return {
        canonical(name): name
        for name, info in model.infos.items()
        if len(info.shape) in (2, 3) and 0 not in info.shape and not _NOT_MULTIPLIED.search(canonical(name))
    }


def _matrices(name: str, stored: tuple[str, str], models: tuple[Model, Model], rank: int) -> Iterator[Triple]:
    """A tensor's matrices as pairs: one, or one for every expert.

    Args:
        stored: what base and aligned call it.
    """
    module = name.removesuffix(".weight")
    ours, theirs = (model.infos[own].shape for model, own in zip(models, stored, strict=True))
    shape, rows = theirs, min(theirs[-2], ours[-2])
    matrix = (rows, shape[-1])
    embedding = module.rpartition(".")[2] in EMBEDDINGS | _POSITIONS
    for expert in range(shape[0]) if len(shape) == 3 else (None,):
        own = module if expert is None else f"{module}[{expert}]"
        pair = LoraPair(own, module, (stored[1], stored[1]), min(rank or 1, *matrix), 1.0, matrix, embedding, expert)
        yield Triple(pair, *stored)

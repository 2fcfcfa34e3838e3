"""GGUF LoRA adapters, as llama.cpp loads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.adapters.storing import PairOut, Rounding, round_pair
from converters.atomic import atomic_file
from converters.ggml import QType
from converters.gguf_file import TensorOut, Value, float32, text, uint32s, write_gguf


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
) -> dict[str, Rounding]:
    """Writes an adapter file, whole or not at all.

    llama.cpp scales every pair by alpha / r with the pair's own rank, so the caller folds whatever scaling
    differs from that into B (see `folding_factor`).

    Args:
        pairs: named as GGUF weights, `blk.0.attn_q.weight`.
        architecture: `general.architecture` of the model that the adapter is for.
        alpha: `adapter.lora.alpha`; not 0, which llama.cpp takes for "no alpha".
        qtype: the type of all tensors; pairs whose rows are no whole blocks are stored as F16.
        metadata: further keys, in order.

    Returns:
        How each pair was rounded, by name.

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
    report: dict[str, Rounding] = {}
    tensors = [tensor for pair in pairs for tensor in _tensors(pair, qtype, report)]
    with atomic_file(target, force=force) as file:
        write_gguf(file, header, tensors)
    return report


def folding_factor(scaling: float, rank: int, alpha: float) -> float:
    """What B must be multiplied by so that alpha / rank means `scaling`: exactly 1 for plain LoRA, whose alpha
    may differ from the stored float32 in its last bits."""
    factor = scaling * rank / alpha
    return 1.0 if abs(factor - 1.0) < 1e-7 else factor


def _tensors(pair: PairOut, qtype: QType, report: dict[str, Rounding]) -> tuple[TensorOut, TensorOut]:
    """A's and B's entries; A is written first, and rounding both then leaves B's bytes waiting."""
    waiting: list[bytes] = []

    def give_a() -> bytes:
        rounded = round_pair(pair, qtype)
        waiting.append(rounded.b)
        report[pair.name] = rounded.rounding
        return rounded.a

    a_type, b_type = pair.types(qtype)
    return (
        TensorOut(f"{pair.name}.lora_a", pair.stored_a_shape, a_type, give_a),
        TensorOut(f"{pair.name}.lora_b", pair.b_shape, b_type, waiting.pop),
    )

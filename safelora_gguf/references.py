"""Whether two references say anything about alignment: what a run refuses, and what it tells."""

from __future__ import annotations

from collections.abc import Mapping

from converters.errors import MismatchError, UnsupportedError
from converters.models import Model
from safelora_gguf.scoring import Score

CLEAR = 10  # of the signal to noise ratio: above it, B' was off by at most a few percent
FINER = "Take references in F16, BF16 or F32 (or Q8_0, where the alignment is strong)"


def check_references(base: Model, aligned: Model, scores: Mapping[str, Score], allow_noise: bool) -> None:
    """That the difference of two references is more than nothing, and more than rounding.

    Args:
        allow_noise: let the paper's operator work on V that is mostly noise.

    Raises:
        MismatchError: they hold the same weights.
        UnsupportedError: V is nothing but rounding noise; or mostly, and the operator would use all of it.
    """
    if all(score.alignment_norm == 0 for score in scores.values()):
        raise MismatchError(
            f"holds the same weights as the base {base.path} wherever the adapter acts; the aligned model must "
            f"differ from the base",
            file=aligned.path,
        )
    if all(score.cosine is None for score in scores.values()) and any(s.directions == 0 for s in scores.values()):
        raise UnsupportedError(
            f"minus the base {base.path} is nothing but rounding noise: no singular direction stands above it in any "
            f"module. {FINER}",
            file=aligned.path,
        )
    noisy = {module: score for module, score in scores.items() if _mostly_noise(score)}
    if not noisy or allow_noise:
        return
    worst = min(noisy, key=lambda module: noisy[module].snr or 0.0)
    raise UnsupportedError(
        f"minus the base {base.path} is mostly rounding noise in {len(noisy)} of {len(scores)} modules: the signal to "
        f"noise ratio is {noisy[worst].snr:.2g} in {worst}, expected 1 or more. {FINER}, try --operator subspace, "
        f"which uses only the directions above the noise, or go on at your own risk with --allow-noisy-reference",
        file=aligned.path,
    )


def _mostly_noise(score: Score) -> bool:
    """Whether the paper's operator, which uses all of V, would use more noise than signal."""
    return score.cosine is not None and score.directions is None and score.snr is not None and score.snr < 1


def noise_notes(scores: Mapping[str, Score]) -> list[str]:
    """That quantized references shift what is measured, where they do so visibly."""
    noisy = {
        module: score.snr for module, score in scores.items() if score.snr is not None and score.cosine is not None
    }
    low = [module for module, ratio in noisy.items() if ratio < CLEAR]
    if not low:
        return []
    worst = min(noisy, key=lambda module: noisy[module])
    return [
        f"the references' rounding noise shows: the signal to noise ratio is under {CLEAR} in {len(low)} of "
        f"{len(scores)} modules, lowest in {worst} ({noisy[worst]:.2g}); expect cosines to be off by hundredths (by "
        f"tenths under 3), and other modules to be chosen than with float references"
    ]


def score_notes(score: Score, k: int) -> list[str]:
    """What a reader should know of one module's V; k is the rank that was asked for."""
    notes = [score.note] if score.note else []
    if score.directions is not None and 0 < score.directions < k and score.snr is not None:
        notes.append(f"{score.directions} of {k} directions stand above the references' rounding noise and are used")
    if _mostly_noise(score):
        notes.append(f"V is mostly rounding noise here (signal to noise {score.snr:.2g})")
    return notes

"""Rotary position embeddings: what config.json says of them in both its dialects, as keys and as tensors.

Older files have `rope_theta` beside `rope_scaling: {type, ...}`; transformers 5 writes
`rope_parameters: {rope_theta, rope_type, ...}`, or one such group for each kind of layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from converters.architectures.hyperparameters import MOST_POSITIONS, head_size, not_expressible
from converters.architectures.writing import Hyperparameter, count, number
from converters.config_reader import ConfigReader, shown
from converters.errors import FormatError, UnsupportedError
from converters.gguf_types import Kind

if TYPE_CHECKING:
    import torch

_KINDS_OF_LAYERS = ("full_attention", "sliding_attention")
_ORIGINAL = "original_max_position_embeddings"
_LEAST = 1e-6  # of what is divided by


@dataclass(frozen=True)
class Rope:
    """How the layers of one kind rotate.

    Attributes:
        kind: `rope_type`.
        theta: the base of the frequencies.
        settings: of that kind.
    """

    kind: str
    theta: float
    settings: ConfigReader


def rope(config: ConfigReader) -> Rope:
    """That of a model whose layers all rotate alike.

    Raises:
        FormatError: settings of a wrong type. UnsupportedError: something that llama.cpp has no key for.
    """
    scaling = config.inner("rope_scaling") or config.inner("rope_parameters") or _none(config)
    nested = [key for key in _KINDS_OF_LAYERS if scaling.has(key)]
    if nested:
        raise not_expressible(scaling, nested[0], "one rotation for all layers")
    return _rope(config, scaling, config.number("rope_theta", least=_LEAST))


def ropes_by_layer(config: ConfigReader, sliding_theta: str | None) -> tuple[Rope, Rope]:
    """Those of a family with rotations of their own for layers with and without a sliding window: (full, sliding).

    Args:
        sliding_theta: the older dialect's setting for the second one's base; None: there is none.

    Raises:
        FormatError: settings of a wrong type or not by kind of layer. UnsupportedError: a kind of rotation that
            llama.cpp has no key for.
    """
    groups = config.inner("rope_parameters") or _none(config)
    if groups.config and not set(groups.config) & set(_KINDS_OF_LAYERS):
        raise config.wrong("rope_parameters", f"settings under {' and '.join(_KINDS_OF_LAYERS)}")
    full, sliding = (groups.inner(kind) or _none(config) for kind in _KINDS_OF_LAYERS)
    older = config.inner("rope_scaling")
    added = older or _none(config)
    first = replace(older or full, config={**full.config, **added.config})
    second = _rope(config, sliding, _sliding_theta(config, sliding_theta))
    if second.kind != "default":
        raise unknown(second)
    return _rope(config, first, config.number("rope_theta", least=_LEAST)), second


def _sliding_theta(config: ConfigReader, key: str | None) -> float:
    if key is not None:
        return config.number(key, least=_LEAST)
    return float(config.defaults["rope_theta"])  # transformers gives config.json's to the other layers alone


def _none(config: ConfigReader) -> ConfigReader:
    return ConfigReader({}, config.file, where="rope_scaling.")


def _rope(config: ConfigReader, settings: ConfigReader, theta: float) -> Rope:
    kind = settings.text("rope_type", settings.text("type", "default"))
    theta = settings.number("rope_theta", least=_LEAST) if settings.has("rope_theta") else theta
    if settings.has("mrope_section"):
        raise not_expressible(settings, "mrope_section", "one position for each token")
    return Rope(kind, theta, settings)


def expect_whole_heads(config: ConfigReader, found: Rope) -> None:
    """For families of which llama.cpp rotates whole heads.

    Raises:
        UnsupportedError: config.json wants a part of each rotated.
    """
    for reader in (found.settings, config):
        if reader.has("partial_rotary_factor") and reader.number("partial_rotary_factor") != 1:
            raise not_expressible(reader, "partial_rotary_factor", "whole heads rotated")


def rope_keys(config: ConfigReader, *, llama3: bool = False) -> Iterator[Hyperparameter]:
    """The keys of a model whose layers all rotate alike.

    Args:
        llama3: whether the family has a tensor for Llama 3's way, see `llama3_factors`.

    Raises:
        UnsupportedError: a kind of rotation that has no keys.
    """
    found = rope(config)
    expect_whole_heads(config, found)
    if not (llama3 and found.kind == "llama3"):
        yield from scaling_keys(config, found)
    yield number("rope.freq_base", found.theta)


def rope_keys_by_layer(config: ConfigReader, sliding_theta: str | None) -> Iterator[Hyperparameter]:
    """The keys of a family that `ropes_by_layer` is for; its parameter."""
    full, sliding = ropes_by_layer(config, sliding_theta)
    expect_whole_heads(config, full)
    yield from scaling_keys(config, full)
    yield number("rope.freq_base", full.theta)
    yield number("rope.freq_base_swa", sliding.theta)


def scaling_keys(config: ConfigReader, found: Rope) -> Iterator[Hyperparameter]:
    """The keys for contexts longer than the model was first trained with.

    Raises:
        UnsupportedError: a kind that has no keys.
    """
    if found.kind in ("default", "dynamic"):  # the latter changes nothing before the context's end
        return
    if found.kind not in ("linear", "yarn"):
        raise unknown(found)
    yield Hyperparameter("rope.scaling.type", Kind.STRING, found.kind)
    yield number("rope.scaling.factor", found.settings.number("factor", least=_LEAST))
    if found.kind == "yarn":
        yield from _yarn_keys(config, found.settings)


def _yarn_keys(config: ConfigReader, settings: ConfigReader) -> Iterator[Hyperparameter]:
    _expect_plain_yarn(settings)
    yield count("rope.scaling.original_context_length", original_positions(config, settings))
    for name, key in (
        ("extrapolation_factor", "yarn_ext_factor"),
        ("attention_factor" if settings.has("attention_factor") else "attn_factor", "yarn_attn_factor"),
        ("beta_fast", "yarn_beta_fast"),
        ("beta_slow", "yarn_beta_slow"),
    ):
        if settings.has(name):
            yield number(f"rope.scaling.{key}", settings.number(name))


def _expect_plain_yarn(settings: ConfigReader) -> None:
    if not settings.flag("truncate", default=True):
        raise not_expressible(settings, "truncate", "true")
    for name in ("mscale", "mscale_all_dim"):
        if settings.find(name) and not settings.has("attention_factor"):
            raise not_expressible(settings, name, "an attention_factor")


def original_positions(config: ConfigReader, settings: ConfigReader) -> int:
    """The context before it was stretched; transformers takes the whole where the settings don't say."""
    reader, key = (settings, _ORIGINAL) if settings.has(_ORIGINAL) else (config, "max_position_embeddings")
    return reader.count(key, most=MOST_POSITIONS)


def unknown(found: Rope) -> UnsupportedError:
    """The error for a kind of rotation that a family has no keys for."""
    return UnsupportedError(
        f"the rope type {shown(found.kind)} has no keys in GGUF for this architecture here, and without them the model "
        f"would be another; see whether llama.cpp's convert_hf_to_gguf.py knows it: everything after that step works "
        f"from its GGUF file",
        file=found.settings.file,
    )


def llama3_factors(config: ConfigReader) -> Mapping[str, torch.Tensor]:
    """`rope_freqs.weight` (head size / 2,): what llama.cpp divides each frequency by, for Llama 3.1's rope type.

    Long wavelengths are stretched by `factor`, short ones stay, those between are interpolated, in float32: the formula
    of transformers' `_compute_llama3_parameters`, as its factor by which the frequencies shrink.

    Raises:
        FormatError: settings that are missing or out of bounds.
    """
    found = rope(config)
    if found.kind != "llama3":
        return {}
    import torch

    settings = found.settings
    factor, low, high = (
        settings.number(name, least=_LEAST) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    if low >= high:
        raise settings.wrong("high_freq_factor", f"more than low_freq_factor, {low:g}")
    old = original_positions(config, settings)
    size = head_size(config)
    frequencies = 1.0 / (found.theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    wavelengths = 2 * math.pi / frequencies
    smooth = (old / wavelengths - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors[wavelengths > old / low] = factor
    factors[wavelengths < old / high] = 1
    return {"rope_freqs.weight": factors}


@dataclass(frozen=True)
class LongRope:
    """Phi 3's way: a factor for every frequency, other ones beyond the original context.

    Attributes:
        long, short: (rotated part of a head / 2,).
        attention: by which queries and keys are multiplied.
    """

    long: tuple[float, ...]
    short: tuple[float, ...]
    attention: float


def long_rope(config: ConfigReader, found: Rope, rotated: int, stretched: float, original: int) -> LongRope | None:
    """What a model of this kind says; None for one with a plain rotation.

    Args:
        rotated: dimensions of a head.
        stretched: by how much the context is longer than `original`, where the settings don't say.

    The attention's factor is sqrt(1 + ln(s) / ln(original)) for a context stretched by s, as in transformers'
    `_compute_longrope_parameters`.

    Raises:
        FormatError: settings that are missing or out of bounds. UnsupportedError: another kind of rotation.
    """
    settings = found.settings
    if found.kind == "default" and not settings.has("long_factor"):
        return None
    if found.kind not in ("longrope", "su", "yarn"):  # older files' names for the same
        raise unknown(found)
    long, short = (settings.numbers(f"{name}_factor", rotated // 2) for name in ("long", "short"))
    stretched = settings.number("factor", least=_LEAST) if settings.has("factor") else stretched
    if settings.has("attention_factor"):
        attention = settings.number("attention_factor", least=0)
    elif stretched > 1 and original == 1:
        raise FormatError(f"{_ORIGINAL} is 1, expected at least 2 where the context is longer", file=config.file)
    else:
        attention = math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0
    return LongRope(long, short, attention)


def long_rope_tensors(found: LongRope | None) -> Mapping[str, torch.Tensor]:
    """`rope_factors_long.weight` and `rope_factors_short.weight`."""
    if found is None:
        return {}
    import torch

    return {
        "rope_factors_long.weight": torch.tensor(found.long, dtype=torch.float32),
        "rope_factors_short.weight": torch.tensor(found.short, dtype=torch.float32),
    }

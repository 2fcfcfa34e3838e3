"""Phi 3 and 4: queries, keys and values in one matrix, gate and up in another; GGUF keeps both fused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.architectures.decoder import PRE_NORMS, embeddings, fused_attention, fused_feed_forward, norms
from converters.architectures.hyperparameters import MOST_POSITIONS, expect_divided_width, heads, sizes
from converters.architectures.rope import LongRope, Rope, long_rope, long_rope_tensors, rope
from converters.architectures.table import Architecture
from converters.architectures.windows import window_in_all
from converters.architectures.writing import Hyperparameter, ModelType, ModelWriting, count, number
from converters.config_reader import ConfigReader

if TYPE_CHECKING:
    import torch

_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class _Rotation:
    """What is said of it in several places.

    Attributes:
        dimensions: rotated ones of a head.
        original: the context before it was stretched.
    """

    rope: Rope
    dimensions: int
    original: int
    long: LongRope | None


def _rotation(config: ConfigReader) -> _Rotation:
    found = rope(config)
    part = found.settings if found.settings.has("partial_rotary_factor") else config
    share = part.number("partial_rotary_factor", least=0)
    if share > 1:
        raise part.wrong("partial_rotary_factor", "a number from 0 to 1")
    dimensions = int(share * config.count("hidden_size")) // heads(config)
    # transformers prefers the model's own for every kind but the plain one
    own = found.kind not in ("yarn", "longrope") and found.settings.has(_ORIGINAL)
    original = (found.settings if own else config).count(_ORIGINAL, most=MOST_POSITIONS)
    positions = config.count("max_position_embeddings", most=MOST_POSITIONS)
    return _Rotation(found, dimensions, original, long_rope(config, found, dimensions, positions / original, original))


def _keys(config: ConfigReader) -> Iterator[Hyperparameter]:
    expect_divided_width(config)
    rotation = _rotation(config)
    yield from sizes(config)
    yield count("rope.scaling.original_context_length", rotation.original)
    yield count("rope.dimension_count", rotation.dimensions)
    yield number("rope.freq_base", rotation.rope.theta)
    # 0 tells Phi 4 from the others
    yield count(
        "attention.sliding_window", config.count("sliding_window", least=0) if config.has("sliding_window") else 0
    )
    if rotation.long is not None:
        yield number("rope.scaling.attn_factor", rotation.long.attention)


def _factors(config: ConfigReader) -> Mapping[str, torch.Tensor]:
    return long_rope_tensors(_rotation(config).long)


PHI3 = Architecture(
    name="phi3",
    classes=("Phi3ForCausalLM",),
    rules=(*embeddings(), *fused_attention(), *fused_feed_forward(), *norms(PRE_NORMS)),
    writing=ModelWriting(
        types=(
            ModelType(
                "phi3",
                ("Phi3ForCausalLM",),
                _keys,
                {
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 1.0,
                    "rms_norm_eps": 1e-5,
                    "max_position_embeddings": 4096,
                    "original_max_position_embeddings": 4096,
                },
                {"hidden_act": ("silu", "swish"), "is_causal": (True,)},
                _factors,
                window_in_all,
            ),
        ),
        vocabularies=("sentencepiece", "bpe"),
    ),
)

"""The README's table of adapter features: what llama.cpp's converter and ours make of each.

`test_features` runs both converters on every row; README.md holds `table()` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from conformance.feature_adapters import (
    Make,
    beside,
    config_alone,
    config_directory,
    experts_one_by_one,
    gguf_header,
    index_alone,
    invoked,
    local_path,
    lora,
    older_stacks,
    on_base,
    packed_config,
    pickled,
    renamed,
    transposed,
)
from conformance.feature_mlx import mlx, mlx_dora, mlx_experts
from conformance.feature_truth import Verdict
from conformance.peft_side import ALPHAS, RANKS
from conformance.specs import ATTENTION, PROJECTIONS

Outcome = Verdict | Literal["fails", "rejected", "aborts", "refused"]


@dataclass(frozen=True)
class Cell:
    """What becomes of an adapter.

    Attributes:
        outcome: as the tests tell it. "rejected" and "aborts": what llama.cpp makes of the file.
        words: as the table says it.
        mark: what our error, or the sentence on what was left out, must mention.
        allowed: the relative error of a "right" delta.
    """

    outcome: Outcome
    words: str
    mark: str = ""
    allowed: float = 1e-6


@dataclass(frozen=True)
class Feature:
    """A row.

    Attributes:
        transformers: whether transformers can be imported. It never can when ours runs.
    """

    make: Make
    theirs: Cell
    ours: Cell
    transformers: bool = True


RIGHT = Cell("right", "right")
FAILS = Cell("fails", "fails")
STRENGTH = Cell("off", "**wrong strength**")
REJECTED = Cell("rejected", "**writes a file that llama.cpp rejects**")
ABORTS = Cell("aborts", "**writes a file that llama.cpp aborts on**")
OTHER_BASE = Cell("off", "**wrong**: the update is to another base")
MODEL = Cell("no adapter", "**writes the base model**")
NO_HUB = Cell("fails", "fails: asks the hub")


def refused(words: str, mark: str) -> Cell:
    return Cell("refused", f"refused: {words}", mark)


def left_out(mark: str, words: str = "the pairs") -> Cell:
    return Cell("parts missing", f"{words}, with a warning; `--strict` refuses", mark)


_TIED = refused("merge it", "Merge")
_TARGETS = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
_ROUGH = Cell("right", "right, `lora_b` in F16", allowed=0.02)
_NEAREST = Cell("right", "nearest pairs, every error stated", "DoRA", allowed=0.0101)
_MIXED = {"target_modules": list(ATTENTION), "target_parameters": _TARGETS}

FEATURES: Mapping[str, Feature] = {
    "plain LoRA": Feature(lora(), RIGHT, RIGHT),
    "`rank_pattern`": Feature(lora(rank_pattern=RANKS), RIGHT, RIGHT),
    "`alpha_pattern`": Feature(lora(alpha_pattern=ALPHAS), STRENGTH, RIGHT),
    "rsLoRA": Feature(lora(use_rslora=True), STRENGTH, RIGHT),
    "rsLoRA with both patterns": Feature(
        lora(use_rslora=True, alpha_pattern=ALPHAS, rank_pattern=RANKS), STRENGTH, RIGHT
    ),
    "a `lora_alpha` that is no whole number": Feature(lora(lora_alpha=6.5), RIGHT, RIGHT),
    "embeddings (`lora_embedding_A`)": Feature(lora(target_modules=[*PROJECTIONS, "embed_tokens"]), RIGHT, RIGHT),
    "`lm_head`, untied": Feature(lora(target_modules=[*PROJECTIONS, "lm_head"]), RIGHT, RIGHT),
    "embeddings, tied": Feature(lora("tied", target_modules=[*PROJECTIONS, "embed_tokens"]), ABORTS, _TIED),
    "`lm_head`, tied": Feature(lora("tied", target_modules=[*PROJECTIONS, "lm_head"]), REJECTED, _TIED),
    "`lm_head` of Gemma 1 and 2": Feature(
        lora("gemma2", target_modules=[*PROJECTIONS, "lm_head"]),
        Cell("parts missing", "**dropped in silence**"),
        _TIED,
    ),
    "every expert, one by one": Feature(experts_one_by_one(0, 1, 2, 3), RIGHT, RIGHT),
    "some experts": Feature(experts_one_by_one(1, 3), FAILS, RIGHT),
    "`target_parameters` (fused experts)": Feature(lora("qwen3moe", **_MIXED), FAILS, RIGHT),
    "`target_parameters` of PEFT before 0.19": Feature(older_stacks(**_MIXED), FAILS, RIGHT),
    "DoRA": Feature(lora(use_dora=True), FAILS, _NEAREST),
    "DoRA on embeddings": Feature(lora(use_dora=True, target_modules=["v_proj", "embed_tokens"]), FAILS, _NEAREST),
    "`modules_to_save`": Feature(lora(modules_to_save=["lm_head"]), FAILS, left_out("lm_head")),
    "trained biases": Feature(lora("qwen2", bias="all"), FAILS, left_out("bias")),
    "`lora_bias`": Feature(lora("qwen2", target_modules=["q_proj", "k_proj"], lora_bias=True), FAILS, left_out("bias")),
    "trainable tokens": Feature(lora(trainable_token_indices={"embed_tokens": [3, 9]}), FAILS, left_out("token")),
    "trained norms": Feature(
        lora(modules_to_save=["input_layernorm", "post_attention_layernorm"]),
        Cell("not applied", "**written, and ignored by llama.cpp**"),
        left_out("norm"),
    ),
    "`.default.` in tensor names": Feature(
        renamed(lambda name: name.replace(".weight", ".default.weight"), lora()), FAILS, RIGHT
    ),
    "`model.language_model.` in tensor names": Feature(lora("gemma3"), RIGHT, RIGHT),
    "aLoRA's invocation tokens": Feature(invoked, RIGHT, RIGHT),
    "`fan_in_fan_out` on linear layers": Feature(transposed, RIGHT, RIGHT),
    "a vision-language model, its vision tower adapted too": Feature(
        lora("gemma3", target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
        Cell("parts missing", "**dropped in silence**"),
        left_out("mmproj", "the language model's pairs"),
    ),
    "a Mistral 3 base": Feature(lora("mistral3"), MODEL, RIGHT),
    "PiSSA, not converted": Feature(
        lora(init_lora_weights="pissa"), OTHER_BASE, refused("save it converted", "save it converted")
    ),
    "`layer_replication`": Feature(
        lora(layer_replication=[[0, 2], [1, 2]]), FAILS, refused("no model file is like this", "layer_replication")
    ),
    "`--outtype q8_0`, rank no multiple of 32": Feature(lora(outtype="q8_0"), _ROUGH, _ROUGH),
    "`adapter_model.bin`, a pickle": Feature(
        pickled, RIGHT, refused("names the line that converts it", "weights_only=True")
    ),
    "MLX": Feature(mlx, FAILS, RIGHT),
    "MLX, experts": Feature(mlx_experts, FAILS, RIGHT),
    "MLX, DoRA": Feature(mlx_dora, FAILS, _NEAREST),
    "a base with bitsandbytes in its config": Feature(on_base(packed_config), FAILS, RIGHT),
    "a base with an index and no shards": Feature(on_base(index_alone), FAILS, RIGHT),
    "a base of which only `config.json` is there": Feature(on_base(config_directory), RIGHT, RIGHT),
    "`--base config.json`": Feature(on_base(config_alone), FAILS, RIGHT),
    "`--base` a GGUF file's header": Feature(on_base(gguf_header), FAILS, RIGHT),
    "no `--base`, `config.json` beside the adapter": Feature(on_base(beside), NO_HUB, RIGHT),
    "no `--base`, the adapter names a local path": Feature(on_base(local_path), FAILS, RIGHT),
    "no network, with `--base`": Feature(lora(), RIGHT, RIGHT),
    "no transformers": Feature(lora(), FAILS, RIGHT, transformers=False),
}


def table() -> str:
    """The table in markdown, without its marks."""
    rows = [("adapter", "llama.cpp's `convert_lora_to_gguf.py`", "`convert adapter`"), ("---", "---", "---")]
    rows += [(name, feature.theirs.words, feature.ours.words) for name, feature in FEATURES.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

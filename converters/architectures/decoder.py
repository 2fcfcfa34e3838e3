"""The modules that decoders share, by part; a table entry puts its parts together."""

from __future__ import annotations

from collections.abc import Mapping

from converters.architectures.table import Rule
from converters.architectures.transforms import PermuteHeads, TakeRows, Transform

_LAYER = "model.layers.{i}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

PRE_NORMS: Mapping[str, str] = {
    "model.norm": "output_norm",
    _LAYER + "input_layernorm": "blk.{i}.attn_norm",
    _LAYER + "post_attention_layernorm": "blk.{i}.ffn_norm",
}
"""One norm before attention and one before the feed-forward network, in spite of the second one's name."""

POST_NORMS: Mapping[str, str] = {
    "model.norm": "output_norm",
    _LAYER + "post_attention_layernorm": "blk.{i}.post_attention_norm",
    _LAYER + "post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}
"""One norm after attention and one after the feed-forward network."""

BOTH_NORMS: Mapping[str, str] = {
    **POST_NORMS,
    _LAYER + "input_layernorm": "blk.{i}.attn_norm",
    _LAYER + "pre_feedforward_layernorm": "blk.{i}.ffn_norm",
}
"""Norms before and after both."""

HEAD_NORMS: Mapping[str, str] = {
    _ATTENTION + "q_norm": "blk.{i}.attn_q_norm",
    _ATTENTION + "k_norm": "blk.{i}.attn_k_norm",
}
"""Norms of queries and keys."""


def embeddings(*, head: bool = True) -> tuple[Rule, ...]:
    """The tables of input and output.

    Args:
        head: False where llama.cpp knows no output matrix but the embedding.
    """
    table = Rule("model.embed_tokens", "token_embd")
    return (table, Rule("lm_head", "output")) if head else (table,)


def attention(*, permuted: bool = False) -> tuple[Rule, ...]:
    """Attention with matrices of their own for queries, keys and values.

    Args:
        permuted: whether llama.cpp wants the rows of queries and keys in another order, see `PermuteHeads`.
    """
    query, key = ((PermuteHeads("query"),), (PermuteHeads("key_value"),)) if permuted else ((), ())
    return (
        Rule(_ATTENTION + "q_proj", "blk.{i}.attn_q", query),
        Rule(_ATTENTION + "k_proj", "blk.{i}.attn_k", key),
        Rule(_ATTENTION + "v_proj", "blk.{i}.attn_v"),
        Rule(_ATTENTION + "o_proj", "blk.{i}.attn_output"),
    )


def fused_attention() -> tuple[Rule, ...]:
    """Attention with one matrix for queries, keys and values, which GGUF keeps as it is."""
    return (
        Rule(_ATTENTION + "qkv_proj", "blk.{i}.attn_qkv"),
        Rule(_ATTENTION + "o_proj", "blk.{i}.attn_output"),
    )


def feed_forward() -> tuple[Rule, ...]:
    """A gated feed-forward network."""
    return (
        Rule(_MLP + "gate_proj", "blk.{i}.ffn_gate"),
        Rule(_MLP + "up_proj", "blk.{i}.ffn_up"),
        Rule(_MLP + "down_proj", "blk.{i}.ffn_down"),
    )


def fused_feed_forward() -> tuple[Rule, ...]:
    """A gated feed-forward network with gate and up in one matrix, which GGUF keeps under up's name."""
    return (
        Rule(_MLP + "gate_up_proj", "blk.{i}.ffn_up"),
        Rule(_MLP + "down_proj", "blk.{i}.ffn_down"),
    )


def experts(block: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Rule, ...]:
    """A mixture's experts by all the names that they go under.

    Published checkpoints, and adapters from transformers 4, have a module for every expert. transformers 5 has two
    parameters for all of them in memory, gate's rows before up's, and adapters of PEFT's `target_parameters` are
    for these. mlx-lm has three modules.

    Args:
        block: the module around them, `model.layers.{i}.mlp`.
        gate, up, down: the modules of one expert.
    """
    single = {gate: "gate", up: "up", down: "down"}
    fused = (("gate_up_proj", "gate", (TakeRows("first"),)), ("gate_up_proj", "up", (TakeRows("second"),)),
             ("down_proj", "down", ()))  # fmt: skip
    return (
        *(Rule(f"{block}.experts.{{e}}.{name}", f"blk.{{i}}.ffn_{kind}_exps", one_way=True)
          for name, kind in single.items()),
        *(Rule(f"{block}.experts.{name}", f"blk.{{i}}.ffn_{kind}_exps", transforms, bare="weight", stacked=True,
               parameter=True) for name, kind, transforms in fused),
        *switch_experts(f"{block}.switch_mlp"),
    )  # fmt: skip


def switch_experts(module: str) -> tuple[Rule, ...]:
    """A mixture's experts in mlx-lm."""
    kinds = ("gate", "up", "down")
    return tuple(
        Rule(f"{module}.{kind}_proj", f"blk.{{i}}.ffn_{kind}_exps", one_way=True, stacked=True) for kind in kinds
    )


def router(module: str, *, one_way: bool = False) -> Rule:
    """What chooses the experts: in transformers 5 a class of its own."""
    return Rule(module, "blk.{i}.ffn_gate_inp", one_way=one_way, parameter=True)


def shared_expert(module: str) -> tuple[Rule, ...]:
    """The feed-forward network beside the experts."""
    return tuple(Rule(f"{module}.{kind}_proj", f"blk.{{i}}.ffn_{kind}_shexp") for kind in ("gate", "up", "down"))


def norms(names: Mapping[str, str], *transforms: Transform) -> tuple[Rule, ...]:
    """Norms by their names in a checkpoint and in GGUF, all with the same transforms."""
    return tuple(Rule(source, target, transforms) for source, target in names.items())

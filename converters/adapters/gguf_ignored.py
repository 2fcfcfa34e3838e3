"""Pairs that llama.cpp loads and never applies: weights that a graph multiplies without looking for adapters.

Read in src/models/*.cpp of llama-cpp-python 0.3.36: every weight given to ggml_mul_mat where others are given to
build_lora_mm. Norms, biases and other vectors are never multiplied by a matrix product at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_MLA = "attn_q_a attn_q_b attn_q attn_kv_a_mqa attn_k_b attn_v_b attn_kv_b output"
_IGNORED = {
    "deepseek2": _MLA,
    "deepseek2-ocr": "output",
    "deepseek32": f"{_MLA} indexer.attn_q_b indexer.attn_k indexer.proj",
    "mistral4": _MLA,
    "glm-dsa": f"{_MLA} indexer.attn_q_b indexer.attn_k indexer.proj",
    "dots3note": f"{_MLA} indexer.attn_q_b indexer.attn_k indexer.proj",
    "bailingmoe3": f"{_MLA} attn_output attn_gate ssm_f_a ssm_g_a ssm_beta",
    "kimi-linear": f"{_MLA} attn_output attn_qkv ssm_f_a ssm_f_b ssm_g_a ssm_g_b ssm_beta",
    "minicpm3": "attn_q_a attn_q_b attn_kv_a_mqa attn_kv_b",
    "plm": "attn_q attn_kv_a_mqa attn_kv_b",
    "gemma3n": "altup_proj altup_unembd_proj altup_router",
}
_IGNORED_SETS = {architecture: frozenset(names.split()) for architecture, names in _IGNORED.items()}
_BLOCK = re.compile(r"blk\.\d+\.")


def ignored_kinds(architecture: str | None, names: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """The weights among `names` whose pairs llama.cpp leaves out, by kind: `attn_q`."""
    found: dict[str, list[str]] = {}
    for name in names:
        if ignored(architecture, name):
            found.setdefault(_BLOCK.sub("", name, count=1).removesuffix(".weight"), []).append(name)
    return found


def ignored(architecture: str | None, name: str) -> bool:
    """Whether llama.cpp accepts a pair for this weight, `blk.0.attn_q.weight`, and leaves it out."""
    plain = _BLOCK.sub("", name, count=1)
    if plain.endswith((".bias", "_norm.weight")):
        return True
    return plain.removesuffix(".weight") in _IGNORED_SETS.get(architecture or "", frozenset())

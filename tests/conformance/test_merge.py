"""`merge` against PEFT.

Oracles: the state dict of PEFT's merge_and_unload, in float64; PEFT's logits of the adapter that is not merged, which
is what was trained, where PEFT's own merge does something else (a pair on one of two tied tables); transformers, which
loads the merged checkpoints; llama.cpp's logits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from conformance import feature_adapters, merge_side, peft_side
from conformance.families import Family, Logits, Upstream
from conformance.merge_side import make_adapter, merged, merged_by_peft, off_by, stored, unmerged
from conformance.specs import PROJECTIONS

from converters.errors import UnsupportedError
from safelora_gguf.merge import merge_adapters

pytestmark = pytest.mark.conformance

WEIGHTS_BOUND = 1e-6  # relative; the product promises 1e-5
LOGITS_BOUND = 1e-4  # transformers against itself, of logits of several units
PROMISED = 0.02  # llama.cpp against transformers
QK = ["q_proj", "k_proj"]

KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "plain": ("llama", {"target_modules": list(PROJECTIONS)}),
    "rslora": ("llama", {"target_modules": list(PROJECTIONS), "use_rslora": True}),
    "patterns": ("llama", {"target_modules": list(PROJECTIONS), "rank_pattern": peft_side.RANKS,
                           "alpha_pattern": peft_side.ALPHAS}),
    "tables": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "dora": ("llama", {"target_modules": list(PROJECTIONS), "use_dora": True}),
    "dora-tables": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "modules_to_save": ("llama", {"target_modules": QK, "modules_to_save": ["embed_tokens", "lm_head", "norm", "mlp"]}),
    "norms": ("gemma2", {"target_modules": QK, "modules_to_save": ["input_layernorm", "post_feedforward_layernorm"]}),
    "tokens": ("llama", {"target_modules": QK, "trainable_token_indices": [3, 5, 17]}),
    "tied-tokens": ("tied", {"target_modules": QK, "trainable_token_indices": [3, 5, 17]}),
    "bias-all": ("qwen2", {"target_modules": QK, "bias": "all"}),
    "bias-lora": ("qwen2", {"target_modules": QK, "bias": "lora_only"}),
    "lora_bias": ("qwen2", {"target_modules": QK, "lora_bias": True}),
    "lora_bias-bias": ("qwen2", {"target_modules": QK, "lora_bias": True, "bias": "all"}),
    "vision": ("gemma3", {"target_modules": r".*language_model.*\.(q_proj|up_proj)"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> feature_adapters.Workshop:
    return feature_adapters.Workshop(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_pefts_merge(kind: str, workshop: feature_adapters.Workshop, tmp_path: Path) -> None:
    architecture, options = KINDS[kind]
    model = workshop.model(architecture)
    adapter = make_adapter(model, tmp_path / "adapter", **options)
    wanted = merged_by_peft(model, adapter)
    before = stored(model)
    found = merged(model, [(adapter, 1.0)])
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert off_by(tensor, wanted[merge_side.canonical(name)]) < WEIGHTS_BOUND, name
    assert any(not np.array_equal(found[name], before[name]) for name in found)


TIED: Mapping[str, tuple[bool, Mapping[str, Any]]] = {
    "pair-on-input": (False, {"target_modules": ["q_proj", "embed_tokens"]}),
    "pair-on-output": (False, {"target_modules": ["q_proj", "lm_head"]}),
    "pairs-on-both": (False, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "dora-on-input": (False, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "input-whole": (False, {"target_modules": QK, "modules_to_save": ["embed_tokens"]}),
    "output-whole": (False, {"target_modules": QK, "modules_to_save": ["lm_head"]}),
    "both-whole": (False, {"target_modules": QK, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tokens-of-output": (False, {"target_modules": QK, "trainable_token_indices": {"lm_head": [3, 5]}}),
    "other-tokens": (False, {"target_modules": QK, "trainable_token_indices": {"lm_head": [3], "embed_tokens": [5]}}),
    "one-whole": (True, {"target_modules": QK, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "one-pair": (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "same-tokens": (True, {"target_modules": QK, "trainable_token_indices": [3, 5, 17]}),
    "linear-alone": (True, {"target_modules": list(PROJECTIONS)}),
}
"""Whether input and output stay one tensor."""


@pytest.mark.parametrize("kind", TIED)
def test_tied_tables_part_where_training_parted_them(
    kind: str, workshop: feature_adapters.Workshop, tmp_path: Path
) -> None:
    """The merged checkpoint computes what the adapter does before it is merged."""
    stays, options = TIED[kind]
    model = workshop.model("tied")
    adapter = make_adapter(model, tmp_path / "adapter", **options)
    merge_adapters(model, [(adapter, 1.0)], tmp_path / "merged", device="cpu")
    found = peft_side.logits_of(peft_side.load_model(tmp_path / "merged"))
    assert np.abs(found - unmerged(model, adapter)).max() < LOGITS_BOUND
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is stays
    assert ("lm_head.weight" in stored(tmp_path / "merged")) is not stays
    assert np.abs(found - peft_side.logits_of(peft_side.load_model(model))).max() > LOGITS_BOUND


@pytest.mark.parametrize("architecture", ["llama", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": QK},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": QK, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": QK, "trainable_token_indices": [3, 128, 129, 130, 131]},
    ],
    ids=["tables-saved", "pairs-on-tables", "tables-trained", "tokens"],
)
def test_an_extended_vocabulary(
    options: Mapping[str, Any], architecture: str, workshop: feature_adapters.Workshop, tmp_path: Path
) -> None:
    """Rows, configuration and tokenizer: the merged checkpoint computes what PEFT did on the resized model."""
    model = workshop.model(architecture)
    adapter = make_adapter(model, tmp_path / "adapter", before=merge_side.grown, **options)
    (adapter / "tokenizer.json").write_text('{"added_tokens": []}')
    report = merge_adapters(model, [(adapter, 1.0)], tmp_path / "merged", device="cpu")
    loaded = peft_side.load_model(tmp_path / "merged")
    assert loaded.config.vocab_size == 128 + merge_side.MORE_TOKENS
    wanted = unmerged(model, adapter, merge_side.grown)
    assert np.abs(peft_side.logits_of(loaded) - wanted).max() < LOGITS_BOUND
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert any("vocabulary grows from 128 to 132" in note for note in report.notes)


def test_new_biases_of_a_model_without_any(workshop: feature_adapters.Workshop, tmp_path: Path) -> None:
    """PEFT refuses to merge these, and applies them. transformers misses nothing in what becomes of them."""
    model = workshop.model("llama")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "up_proj"], lora_bias=True)
    merge_adapters(model, [(adapter, 1.0)], tmp_path / "merged", device="cpu")
    found = peft_side.logits_of(peft_side.load_model(tmp_path / "merged"))
    assert np.abs(found - unmerged(model, adapter)).max() < LOGITS_BOUND
    kind = transformers.LlamaForCausalLM
    _, told = kind.from_pretrained(tmp_path / "merged", output_loading_info=True, ignore_mismatched_sizes=True)
    assert not any(told.values()), told


def test_new_biases_in_llama_cpp(
    family_of: Callable[[str], Family], upstream_of: Callable[[str], Upstream], llama_logits: Logits, tmp_path: Path
) -> None:
    """Of queries (whose rows llama.cpp has in another order) and of the feed-forward network."""
    family, out = family_of("llama"), tmp_path / "merged.gguf"
    targets = ["q_proj", "o_proj", "up_proj"]
    adapter = make_adapter(family.aligned, tmp_path / "adapter", target_modules=targets, lora_bias=True)
    merge_adapters(upstream_of("llama").model, [(adapter, 1.0)], out, device="cpu")
    assert np.abs(llama_logits(out, None) - unmerged(family.aligned, adapter)).max() < PROMISED


def test_two_adapters_of_different_ranks_modules_and_scales(
    workshop: feature_adapters.Workshop, tmp_path: Path
) -> None:
    """PEFT's add_weighted_adapter merges no two of different modules; so each by itself, and its formula on top."""
    model = workshop.model("llama")
    one = make_adapter(model, tmp_path / "one", target_modules=list(PROJECTIONS), use_rslora=True)
    two = make_adapter(model, tmp_path / "two", seed=9, r=7, target_modules=["q_proj", "lm_head"], use_dora=True)
    before = stored(model)
    alone = [merged_by_peft(model, path) for path in (one, two)]
    wanted = {name: before[name] + 0.5 * (alone[0][name] - before[name]) - 2 * (alone[1][name] - before[name])
              for name in before}  # fmt: skip
    found = merged(model, [(one, 0.5), (two, -2.0)])
    assert max(off_by(found[name], wanted[name]) for name in before) < WEIGHTS_BOUND


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3moe", "gpt-oss", "granitemoe"])
def test_the_experts_of_a_mixture(architecture: str, family_of: Callable[[str], Family], tmp_path: Path) -> None:
    """transformers trains parameters for all experts; its files have other names, a tensor for each, or the experts
    turned over: read back by it."""
    family = family_of(architecture)
    merge_adapters(family.aligned, [(family.adapters["plain"], 1.0)], tmp_path / "merged", device="cpu")
    found = peft_side.load_model(tmp_path / "merged").state_dict()
    wanted = merged_by_peft(family.aligned, family.adapters["plain"])
    before = peft_side.load_model(family.aligned).state_dict()
    changed = [name for name, tensor in found.items() if not tensor.equal(before[name])]
    assert any("experts" in name or "linear" in name for name in changed)
    for name, tensor in found.items():
        assert off_by(merge_side.reference.float64(tensor), wanted[name]) < WEIGHTS_BOUND, name


def test_experts_trained_whole(
    family_of: Callable[[str], Family], upstream_model_of: Callable[[str], Path], llama_logits: Logits, tmp_path: Path
) -> None:
    """transformers has them in stacks, as GGUF does, and the checkpoint one by one."""
    family, out = family_of("mixtral"), tmp_path / "merged.gguf"
    adapter = make_adapter(family.aligned, tmp_path / "adapter", target_modules=QK, modules_to_save=["experts"])
    with pytest.raises(UnsupportedError, match=r"cut otherwise.*safelora-gguf convert model"):
        merge_adapters(family.aligned, [(adapter, 1.0)], tmp_path / "merged", device="cpu")
    merge_adapters(upstream_model_of("mixtral"), [(adapter, 1.0)], out, device="cpu")
    assert np.abs(llama_logits(out, None) - unmerged(family.aligned, adapter)).max() < PROMISED


def test_untouched_tensors_keep_their_bytes(workshop: feature_adapters.Workshop, tmp_path: Path) -> None:
    model = workshop.model("llama")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    merge_adapters(model, [(adapter, 1.0)], tmp_path / "merged", device="cpu")
    before, after = stored(model), stored(tmp_path / "merged")
    differing = {name for name in before if not np.array_equal(before[name], after[name])}
    assert differing == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}


@pytest.mark.parametrize("kind", ["plain", "rslora", "rank_pattern", "embeddings"])
def test_llama_cpp_runs_a_merged_gguf(
    kind: str, family: Family, upstream: Upstream, llama_logits: Logits, tmp_path: Path
) -> None:
    """Upstream's F32 model with PEFT's adapter merged into it."""
    out = tmp_path / "merged.gguf"
    merge_adapters(upstream.model, [(family.adapters[kind], 1.0)], out, device="cpu")
    found = llama_logits(out, None)
    assert np.abs(found - unmerged(family.aligned, family.adapters[kind])).max() < PROMISED
    assert np.abs(found - llama_logits(upstream.model, None)).max() > 10 * PROMISED


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3moe"])
def test_llama_cpp_runs_a_merged_mixture(
    architecture: str,
    family_of: Callable[[str], Family],
    upstream_model_of: Callable[[str], Path],
    llama_logits: Logits,
    tmp_path: Path,
) -> None:
    family = family_of(architecture)
    out = tmp_path / "merged.gguf"
    merge_adapters(upstream_model_of(architecture), [(family.adapters["plain"], 1.0)], out, device="cpu")
    found = llama_logits(out, None)
    assert np.abs(found - unmerged(family.aligned, family.adapters["plain"])).max() < PROMISED


@pytest.fixture(scope="module")
def upstream_model_of(llama_cpp_sources: Path, family_of: Callable[[str], Family]) -> Callable[[str], Path]:
    """A family's aligned model, as upstream converts it."""
    from functools import cache

    from conformance.families import convert_upstream_each

    def convert(architecture: str) -> Path:
        return convert_upstream_each([family_of(architecture)], llama_cpp_sources, ())[architecture].model

    return cache(convert)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["kv_b_proj", "kv_a_proj_with_mqa"]},
        {"target_modules": ["kv_b_proj"]},
        {"target_modules": ["kv_b_proj", "kv_a_proj_with_mqa"], "use_dora": True},
        {"target_modules": ["kv_b_proj"], "use_dora": True},
    ],
    ids=["two", "alone", "two-dora", "alone-dora"],
)
def test_a_weight_that_llama_cpp_has_by_heads(
    options: Mapping[str, Any],
    family_of: Callable[[str], Family],
    upstream_model_of: Callable[[str], Path],
    llama_logits: Logits,
    tmp_path: Path,
) -> None:
    """DeepSeek's kv_b_proj, which no adapter of llama.cpp can have: nothing is left out of the model."""
    family = family_of("deepseek2")
    both = make_adapter(family.aligned, tmp_path / "adapter", **options)
    out = tmp_path / "merged.gguf"
    report = merge_adapters(upstream_model_of("deepseek2"), [(both, 1.0)], out, device="cpu", strict=True)
    assert np.abs(llama_logits(out, None) - unmerged(family.aligned, both)).max() < PROMISED
    assert {"blk.0.attn_k_b.weight", "blk.1.attn_v_b.weight"} <= {tensor.name for tensor in report.tensors}


def test_an_adapter_that_llama_cpp_would_see_nothing_of(
    family_of: Callable[[str], Family], upstream_model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Upstream's file has no vision half: merged, it would be the same model under another name."""
    family = family_of("gemma3-vision")
    adapter = make_adapter(family.aligned, tmp_path / "adapter", target_modules=r".*vision_tower.*q_proj")
    with pytest.raises(UnsupportedError, match=r"nothing of it can be merged: .* pairs are left out"):
        merge_adapters(upstream_model_of("gemma3-vision"), [(adapter, 1.0)], tmp_path / "out.gguf", device="cpu")
    assert not (tmp_path / "out.gguf").exists()


def test_an_adapter_in_gguf_goes_into_a_checkpoint(family: Family, upstream: Upstream, tmp_path: Path) -> None:
    """Back through the table: upstream's conversion of the adapter gives what PEFT merges."""
    wanted = merged_by_peft(family.aligned, family.adapters["plain"])
    found = merged(family.aligned, [(upstream.adapters["plain", "f32"], 1.0)])
    assert max(off_by(found[name], wanted[name]) for name in found) < WEIGHTS_BOUND


def test_a_merged_checkpoint_needs_nothing_beside_it(workshop: feature_adapters.Workshop, tmp_path: Path) -> None:
    """What lies in the model's directory goes along, and the merged model stands alone."""
    model = Path(shutil.copytree(workshop.model("llama"), tmp_path / "model"))
    (model / "tokenizer.json").write_text("{}")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=QK)
    merge_adapters(model, [(adapter, 1.0)], tmp_path / "merged", device="cpu")
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names
    assert "adapter_config.json" not in names

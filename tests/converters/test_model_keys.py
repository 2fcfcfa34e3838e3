"""What no key can express is refused by name, and configurations that lie end in an error of ours.

That the keys themselves are right is checked against upstream's converter, in the conformance tests.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from converters.architectures import KNOWN, find_architecture
from converters.config_reader import ConfigReader
from converters.errors import Error, FormatError, UnsupportedError
from converters.gguf_file import entry_bytes
from converters.model_keys import generated_tensors, model_keys

CONFIG = Path("somewhere/config.json")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
         "head_dim": 16, "query_pre_attn_scalar": 16}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 2.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
WRITTEN = [name for entry in KNOWN if entry.writing is not None for name in entry.classes]


def config(name: str, **settings: Any) -> dict[str, Any]:
    given = {"architectures": [name], **SIZES, **settings}
    return {**given, "norm_topk_prob": True} if name == "Qwen3MoeForCausalLM" else given


def keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    family = find_architecture(settings["architectures"][0])
    assert family is not None
    return {key: value.data for key, value in model_keys(settings, CONFIG, family)}


REFUSED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "a rope type that nobody knows": (config("LlamaForCausalLM", rope_scaling={"type": "spiral"}), "spiral"),
    "longrope without tensors for it": (config("LlamaForCausalLM", rope_scaling=LONG), "longrope.*convert_hf_to_gguf"),
    "llama3 without tensors for it": (config("Qwen2ForCausalLM", rope_scaling=LLAMA3), "llama3.*convert_hf_to_gguf"),
    "llama3 of Gemma 3": (config("Gemma3ForCausalLM", rope_scaling=LLAMA3), "llama3"),
    "linear of Phi 3": (config("Phi3ForCausalLM", rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    "windows that are scaled": (
        config("Gemma3ForCausalLM", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
        "linear"),
    "positions of images": (config("Qwen2ForCausalLM", rope_scaling={"type": "default", "mrope_section": [1, 2, 1]}),
                            "mrope_section"),
    "a rotation by kind of layer": (
        config("Qwen3ForCausalLM", rope_parameters={"full_attention": {"rope_type": "default"}}), "one rotation"),
    "half a head rotated": (config("LlamaForCausalLM", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "yarn that isn't rounded": (config("Olmo2ForCausalLM", rope_scaling={**YARN, "truncate": False}), "truncate"),
    "yarn with mscale": (config("Qwen3ForCausalLM", rope_scaling={**YARN, "mscale": 0.7}), "mscale is 0.7"),
    "heads of another size": (config("GraniteForCausalLM", head_dim=32), "head_dim is 32.* 16"),
    "another activation": (config("MistralForCausalLM", hidden_act="relu"), "hidden_act is 'relu'.*'silu'"),
    "rotation in other layers": (config("SmolLM3ForCausalLM", no_rope_layers=[1, 0, 1, 0]), "no_rope_layers"),
    "rotation at another interval": (config("SmolLM3ForCausalLM", no_rope_layer_interval=2), "no_rope_layer_interval"),
    "windows in other layers": (config("Gemma2ForCausalLM", layer_types=["full_attention"] * 4), "layer_types"),
    "windows at another interval": (config("Gemma3ForCausalLM", sliding_window_pattern=3), "sliding_window_pattern"),
    "another attention scale": (config("Gemma2ForCausalLM", query_pre_attn_scalar=99), "scalar is 99.* 16"),
    "a softcap that is gone": (config("Gemma3ForCausalLM", attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    "attention both ways": (config("Gemma3ForCausalLM", use_bidirectional_attention=True), "bidirectional"),
    "weights that sum to one": (config("Qwen2MoeForCausalLM", norm_topk_prob=True), "norm_topk_prob is True"),
    "dense layers in a mixture": (config("Qwen3MoeForCausalLM", mlp_only_layers=[0]), "mlp_only_layers"),
    "a family of adapters alone": (config("FalconForCausalLM"), "FalconForCausalLM.*LlamaForCausalLM.*convert_hf"),
}  # fmt: skip

WRONG: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "no layers": (config("LlamaForCausalLM", num_hidden_layers=None), "num_hidden_layers is missing or null"),
    "a fraction of layers": (config("LlamaForCausalLM", num_hidden_layers=4.0), "num_hidden_layers is 4.0, expected a"),
    "a million layers": (config("Olmo3ForCausalLM", num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "heads of nothing": (config("LlamaForCausalLM", hidden_size=3, head_dim=None), "heads of 0"),
    "scaling that is a word": (config("LlamaForCausalLM", rope_scaling="linear"), "rope_scaling is 'linear'"),
    "scaling by nothing": (config("Qwen2ForCausalLM", rope_scaling={"type": "linear"}), "scaling.factor is missing"),
    "scaling by text": (config("Qwen2ForCausalLM", rope_scaling={**YARN, "factor": "4"}), "rope_scaling.factor is '4'"),
    "a rope type that is a list": (config("Qwen2ForCausalLM", rope_scaling={"type": [1]}), "type is a list of 1"),
    "flat settings of Gemma 3": (config("Gemma3ForCausalLM", rope_parameters=YARN), "full_attention and sliding_att"),
    "frequencies upside down": (config("LlamaForCausalLM", rope_scaling={**LLAMA3, "high_freq_factor": 1}), "more"),
    "factors of another length": (config("Phi3ForCausalLM", rope_scaling={**LONG, "long_factor": [1.0] * 9}),
                                  "long_factor is a list of 9, expected a list of 8"),
    "factors that are missing": (config("Phi3ForCausalLM", rope_scaling={"type": "longrope"}), "factor is missing"),
    "a factor that is no number": (config("Phi3ForCausalLM", rope_scaling={**LONG, "short_factor": [math.nan] * 8}),
                                   "finite"),
    "more than a head rotated": (config("Phi3ForCausalLM", partial_rotary_factor=1e30), "from 0 to 1"),
    "layers of another number": (config("Olmo3ForCausalLM", layer_types=["full_attention"]), "is a list of 1"),
    "layers of another kind": (config("Olmo3ForCausalLM", layer_types=["chunked_attention"] * 4), "alone"),
    "more experts used than there are": (config("MixtralForCausalLM", num_experts_per_tok=9), "from 1 to 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_has_no_key_for_is_refused(case: str) -> None:
    settings, told = REFUSED[case]
    with pytest.raises(UnsupportedError, match=told) as error:
        keys(settings)
    assert error.value.file == str(CONFIG)


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str) -> None:
    settings, told = WRONG[case]
    with pytest.raises(FormatError, match=told) as error:
        keys(settings)
        family = find_architecture(settings["architectures"][0])
        assert family is not None
        generated_tensors(settings, CONFIG, family)
    assert error.value.file == str(CONFIG)


def test_gemma_writes_a_base_that_llama_cpp_does_not_assume() -> None:
    assert "gemma.rope.freq_base" not in keys(config("GemmaForCausalLM", rope_theta=10000))
    assert keys(config("GemmaForCausalLM", rope_theta=160000))["gemma.rope.freq_base"] == 160000


def test_longrope_keeps_an_attention_factor_of_its_own() -> None:
    found = keys(config("Phi3ForCausalLM", rope_scaling={**LONG, "attention_factor": 1.25}))
    assert found["phi3.rope.scaling.attn_factor"] == 1.25


def test_the_language_models_settings_come_before_those_around_it() -> None:
    text = {key: value for key, value in config("").items() if key != "architectures"}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "hidden_size": 7, "max_position_embeddings": 9}
    found = keys({**outer, "text_config": {**text, "model_type": "gemma3_text"}})
    assert found["gemma3.embedding_length"] == 64
    assert found["gemma3.context_length"] == 131072  # the default, as in transformers


LIES = (10**400, -1, 0, 1 << 40, 0.5, -0.0, math.nan, math.inf, 1e308, 1e-320, True, "", "x\x1b" * (1 << 20), [], {},
        ["full_attention"] * 99, [[[]]], {"rope_type": {}}, {"full_attention": 3},
        {"type": "yarn", "factor": 1e-300})  # fmt: skip
SETTINGS = (
    *SIZES, "num_key_value_heads", "max_position_embeddings", "vocab_size", "rms_norm_eps", "rope_theta", "is_causal",
    "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor", "sliding_window", "layer_types",
    "sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping", "num_experts", "num_local_experts",
    "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob", "hidden_act",
    "attention_multiplier", "logits_scaling", "no_rope_layers", "original_max_position_embeddings", "model_type",
    "text_config", "mlp_only_layers",
)  # fmt: skip
WITHIN = ("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "truncate",
          "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor", "mscale",
          "partial_rotary_factor", "full_attention", "sliding_attention")  # fmt: skip


def _lying(name: str) -> Iterator[dict[str, Any]]:
    for lie in LIES:
        yield from (config(name, **{key: lie}) for key in SETTINGS)
        for settings in (LLAMA3, YARN, LONG):
            yield from (config(name, rope_scaling={**settings, key: lie}) for key in WITHIN)


@pytest.mark.parametrize("name", WRITTEN)
def test_no_lie_ends_in_anything_but_an_error_of_ours(name: str) -> None:
    family = find_architecture(name)
    assert family is not None
    refused = 0
    for settings in _lying(name):
        try:
            for key, value in model_keys(settings, CONFIG, family):
                entry_bytes(key, value)  # fits its type
            tensors = generated_tensors(settings, CONFIG, family)
        except Error as error:
            assert len(str(error)) < 700
            refused += 1
        else:
            assert all(tensor.numel() <= 1 << 16 and tensor.isfinite().all() for tensor in tensors.values())
    assert refused > 100


def test_a_flag_and_a_text_are_what_they_should_be() -> None:
    with pytest.raises(FormatError, match="is_causal is 1, expected true or false"):
        ConfigReader({"is_causal": 1}, CONFIG).flag("is_causal", default=True)
    with pytest.raises(FormatError, match="kind is 3, expected a text"):
        ConfigReader({"kind": 3}, CONFIG).text("kind", "")


def test_looking_a_family_up_imports_nothing_heavy() -> None:
    code = "import sys, converters.architectures; print(sorted({'torch', 'numpy', 'gguf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

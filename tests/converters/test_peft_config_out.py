"""Oracle: PEFT, which reads the configuration, adapts what it names and merges; W + scaling * B A in float64."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Sizes, pairs, save_adapter
from safetensors.torch import save_file

from converters.adapters.peft import open_peft
from converters.adapters.peft_config_out import ConfigEntry, peft_config_for

SIZES = Sizes(hidden=32, ffn=48, layers=12, vocab=96)
LEFT_OUT = {"model.layers.5.self_attn.k_proj", "model.layers.11.mlp.up_proj"}
SPECIAL = {
    "model.layers.1.self_attn.q_proj": (3, 2.1 / 3),
    "model.layers.11.self_attn.q_proj": (7, 16 / 7),
    "model.layers.11.self_attn.v_proj": (4, 1 / 49),
    "model.layers.2.mlp.down_proj": (5, 2.0),
    "model.layers.0.mlp.gate_proj": (4, -1.5),
    "model.embed_tokens": (6, 0.3),
    "lm_head": (2, 1.0),
}
ENTRIES = [
    ConfigEntry(module, *SPECIAL.get(module, (4, 2.0)))
    for module in ["lm_head", *SIZES.modules(), "model.embed_tokens"]
    if module not in LEFT_OUT
]


def read(entries: Sequence[ConfigEntry], name: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(peft_config_for(entries, name))
    return found


def linear_pairs(entries: Sequence[ConfigEntry]) -> dict[str, torch.Tensor]:
    """Pairs for every entry but the embedding, by PEFT's names."""
    shapes = {**SIZES.modules(), "lm_head": (SIZES.vocab, SIZES.hidden)}
    wanted = {entry.module: shapes[entry.module] for entry in entries if entry.module in shapes}
    return pairs(wanted, 3, ranks={entry.module: entry.rank for entry in entries})


def save(directory: Path, entries: Sequence[ConfigEntry]) -> dict[str, torch.Tensor]:
    """An adapter directory of these entries, and its tensors."""
    tensors = linear_pairs(entries)
    generator = torch.Generator().manual_seed(4)
    for entry in entries:
        if entry.module.endswith("embed_tokens"):
            prefix = f"base_model.model.{entry.module}.lora_embedding_"
            tensors[f"{prefix}A"] = torch.randn(entry.rank, SIZES.vocab, generator=generator)
            tensors[f"{prefix}B"] = torch.randn(SIZES.hidden, entry.rank, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_bytes(peft_config_for(entries, "someone/model"))
    return tensors


def small_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=SIZES.hidden,
        intermediate_size=SIZES.ffn,
        num_hidden_layers=SIZES.layers,
        num_attention_heads=SIZES.heads,
        num_key_value_heads=SIZES.kv_heads,
        vocab_size=SIZES.vocab,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def lora_layers(adapted: Any) -> dict[str, Any]:
    """Every adapted module by its name in the unadapted model."""
    prefix = "base_model.model."
    found = {name.removeprefix(prefix): module for name, module in adapted.named_modules()}
    return {name: module for name, module in found.items() if hasattr(module, "lora_A") and hasattr(module, "scaling")}


@pytest.mark.conformance
def test_peft_adapts_these_modules_with_these_ranks_and_scalings(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save(tmp_path / "adapter", ENTRIES)
    adapted = peft.PeftModel.from_pretrained(small_llama(), tmp_path / "adapter")
    found = {
        ConfigEntry(name, layer.r["default"], layer.scaling["default"]) for name, layer in lora_layers(adapted).items()
    }
    assert found == set(ENTRIES)
    again = adapted.load_adapter(tmp_path / "adapter", adapter_name="again")
    assert again.unexpected_keys == []
    assert [key for key in again.missing_keys if ".again" in key] == []


@pytest.mark.conformance
def test_peft_merges_to_the_dense_formula(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tensors = {name: tensor.double() for name, tensor in save(tmp_path / "adapter", ENTRIES).items()}
    model = small_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", autocast_adapter_dtype=False)
    for entry in ENTRIES:
        prefix, weight = f"base_model.model.{entry.module}.lora_", f"{entry.module}.weight"
        if entry.module == "model.embed_tokens":
            product = (tensors[f"{prefix}embedding_B"] @ tensors[f"{prefix}embedding_A"]).T
        else:
            product = tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"]
        before[weight] += entry.scaling * product
    after = adapted.merge_and_unload().state_dict()
    assert after.keys() == before.keys()
    for name, expected in before.items():
        assert torch.allclose(after[name], expected, rtol=1e-10, atol=1e-10), name


@pytest.mark.conformance
@pytest.mark.parametrize(("outer", "inner"), [((2, 5.0), (4, 2.0)), ((4, 2.0), (2, 5.0))])
def test_names_that_a_careless_pattern_confuses(outer: tuple[int, float], inner: tuple[int, float]) -> None:
    """By PEFT's rule `head` matches `draft.head` as well, and `draft.a`, unless it is escaped, `draft_a`."""
    peft = pytest.importorskip("peft")
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("head", "draft_a")})
    model["draft"] = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("head", "a", "b", "c")})
    special = {"head": outer, "draft.head": inner, "draft.a": (3, 1.5)}
    names = ["head", "draft_a", "draft.head", "draft.a", "draft.b", "draft.c"]
    entries = [ConfigEntry(name, *special.get(name, (4, 2.0))) for name in names]
    layers = lora_layers(peft.get_peft_model(model, peft.LoraConfig(**{**read(entries), "task_type": None})))
    assert {ConfigEntry(n, x.r["default"], x.scaling["default"]) for n, x in layers.items()} == set(entries)


@pytest.mark.conformance
def test_patterns_hold_in_a_wrapped_model() -> None:
    peft = pytest.importorskip("peft")
    inner = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("a", "b", "c")})
    model = torch.nn.ModuleDict({"wrapped": torch.nn.ModuleDict({"model": inner})})
    entries = [ConfigEntry("model.a", 2, 5.0), ConfigEntry("model.b", 4, 2.0), ConfigEntry("model.c", 4, 2.0)]
    layers = lora_layers(peft.get_peft_model(model, peft.LoraConfig(**{**read(entries), "task_type": None})))
    found = {ConfigEntry(n.removeprefix("wrapped."), x.r["default"], x.scaling["default"]) for n, x in layers.items()}
    assert found == set(entries)


def test_our_reader_reads_the_same_back(tmp_path: Path) -> None:
    save(tmp_path / "adapter", ENTRIES)
    adapter = open_peft(tmp_path / "adapter")
    assert {ConfigEntry(pair.key, pair.rank, pair.scaling) for pair in adapter.pairs.values()} == set(ENTRIES)
    assert [name for name, pair in adapter.pairs.items() if pair.embedding] == ["model.embed_tokens"]
    assert adapter.base_model_name == "someone/model"


def test_one_rank_and_scaling_needs_no_patterns() -> None:
    config = read([ConfigEntry(module, 16, 2.0) for module in SIZES.modules()])
    assert (config["r"], config["lora_alpha"]) == (16, 32)
    assert type(config["lora_alpha"]) is int
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["base_model_name_or_path"] is None


def test_alpha_over_r_is_the_scaling_to_the_last_bit() -> None:
    """PEFT divides alpha by r. A scaling that came from a whole alpha finds it again."""
    for r in (1, 3, 7, 8, 49, 64, 100, 255):
        for alpha in (1, 3, 8, 10, 16, 49, 97, 100, 0.1, 20 / 3):
            found = read([ConfigEntry("a", r, alpha / r)])["lora_alpha"]
            assert found / r == alpha / r, (alpha, r)
            assert found == alpha or not float(alpha).is_integer(), (alpha, r)


def test_no_scaling_is_off_by_more_than_a_bit() -> None:
    numbers = random.Random(6)
    for _ in range(2000):
        r, scaling = numbers.randint(1, 300), numbers.uniform(-20, 20)
        alpha = read([ConfigEntry("a", r, scaling)])["lora_alpha"]
        assert abs(alpha / r - scaling) <= 2**-52 * abs(scaling)


def test_equal_calls_give_equal_bytes() -> None:
    shuffled = list(ENTRIES)
    random.Random(5).shuffle(shuffled)
    assert peft_config_for(shuffled, "someone/model") == peft_config_for(ENTRIES, "someone/model")


def test_invocation_tokens_are_carried(tmp_path: Path) -> None:
    entries = [ConfigEntry(module, 4, 2.0) for module in SIZES.modules()]
    config = peft_config_for(entries, invocation_tokens=(5, 7))
    path = save_adapter(tmp_path / "adapter", linear_pairs(entries), json.loads(config))
    assert open_peft(path).invocation_tokens == (5, 7)


def test_a_base_model_named_in_any_script() -> None:
    assert read([ConfigEntry("a", 1, 1.0)], "模型/\ud800é")["base_model_name_or_path"] == "模型/\ud800é"

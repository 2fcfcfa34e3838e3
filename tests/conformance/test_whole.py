"""What adapters hold beside their pairs. Oracle: PEFT makes, saves and merges each kind; W + scaling * B A, DoRA's
formula and the replaced tensors in float64, in the checkpoint's layout and in GGUF's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conformance import peft_side
from conformance.specs import ATTENTION, FALCON, SPECS, Spec

from converters.adapters.converted import ConvertedAdapter
from converters.adapters.lora import LoraAdapter
from converters.adapters.peft import PeftAdapter, open_peft
from converters.bridge import Bridge
from converters.checkpoint import open_checkpoint
from converters.converted_model import ConvertedModel
from converters.errors import UnsupportedError
from converters.layouts import table_of
from converters.names import canonical

pytestmark = pytest.mark.conformance

Tensors = dict[str, torch.Tensor]
GROWN = 136  # rows of a resized vocabulary of 128
BIASED = replace(SPECS["llama"], settings={"attention_bias": True})
TIED = replace(SPECS["llama"], settings={"tie_word_embeddings": True})
COMPOSITE = replace(SPECS["gemma3-vision"], targets=ATTENTION)
BIASED_FALCON = replace(SPECS["falcon"], settings={**SPECS["falcon"].settings, "bias": True})


@dataclass(frozen=True)
class Kind:
    """An adapter that PEFT makes.

    Attributes:
        whole: how many tensors it holds beside pairs.
        options: of its LoraConfig.
        resized: whether the vocabulary grew first.
        tables: save_pretrained's save_embedding_layers.
    """

    spec: Spec
    whole: int
    options: Mapping[str, Any]
    resized: bool = False
    tables: bool = False

    @property
    def tied(self) -> bool:
        return bool(self.spec.options()["tie_word_embeddings"])


def on(spec: Spec, whole: int, *, resized: bool = False, tables: bool = False, **options: Any) -> Kind:
    return Kind(spec, whole, options, resized, tables)


LLAMA, QWEN = SPECS["llama"], SPECS["qwen2"]
TOKENS = [120, 3, 77]
NEW = list(range(128, GROWN))
TABLES = [*ATTENTION, "embed_tokens", "lm_head"]
KINDS = {
    "both tables": on(LLAMA, 2, modules_to_save=["embed_tokens", "lm_head"]),
    "a head": on(LLAMA, 1, modules_to_save=["lm_head"]),
    "norms": on(LLAMA, 5, modules_to_save=["norm"]),
    "norms that add 1": on(SPECS["gemma2"], 9, modules_to_save=["norm"]),
    "norms of a composite": on(
        COMPOSITE, 6, modules_to_save=["language_model.norm", "q_norm", "language_model.layers.0.mlp"],
        target_modules=COMPOSITE.linear,
    ),
    "permuted matrices": on(BIASED, 4, modules_to_save=["k_proj"], target_modules=["q_proj", "up_proj"]),
    "a block": on(LLAMA, 6, modules_to_save=["mlp"], target_modules=["v_proj"]),
    "stacks of experts": on(SPECS["qwen3moe"], 6, modules_to_save=["mlp"]),
    "stacks and routers by other names": on(SPECS["mixtral"], 6, modules_to_save=["mlp"]),
    "split matrices": on(SPECS["granitemoe-shared"], 2, modules_to_save=["input_linear"]),
    "biases": on(QWEN, 6, bias="all", target_modules=["q_proj", "down_proj"]),
    "biases of adapted modules": on(QWEN, 2, bias="lora_only", target_modules=["q_proj", "down_proj"]),
    "permuted biases": on(BIASED, 8, bias="all"),
    "biases and norms of another layout": on(BIASED_FALCON, 13, bias="all", target_modules=list(FALCON)),
    "biases of lora_B": on(BIASED, 8, lora_bias=True, use_rslora=True, alpha_pattern={"k_proj": 3}),
    "biases of lora_B of another layout": on(BIASED_FALCON, 8, lora_bias=True, target_modules=list(FALCON)),
    "biases of both": on(BIASED, 16, bias="all", lora_bias=True),
    "tokens": on(LLAMA, 1, trainable_token_indices=TOKENS),
    "tokens of tied tables": on(TIED, 1, trainable_token_indices=TOKENS),
    "tokens of both tables": on(LLAMA, 2, trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [5]}),
    "a resized vocabulary": on(LLAMA, 2, resized=True, tables=True),
    "a resized tied vocabulary": on(TIED, 2, resized=True, tables=True),
    "a resized vocabulary without a head in GGUF": on(SPECS["gemma2"], 2, resized=True, tables=True),
    "pairs on resized tables": on(LLAMA, 2, resized=True, tables=True, target_modules=TABLES),
    "new tokens": on(LLAMA, 3, resized=True, tables=True, trainable_token_indices=NEW),
    "new tokens of tied tables": on(TIED, 4, resized=True, tables=True, trainable_token_indices={"embed_tokens": NEW}),
    "new tokens without a head in GGUF": on(
        SPECS["gemma2"], 4, resized=True, tables=True, trainable_token_indices=NEW
    ),
    "DoRA": on(LLAMA, 2, use_dora=True, target_modules=TABLES, tables=True),
    "DoRA and biases": on(BIASED, 8, use_dora=True, bias="all"),
    "DoRA of another layout": on(BIASED_FALCON, 13, use_dora=True, bias="all", target_modules=list(FALCON)),
    "DoRA of split matrices": on(SPECS["granitemoe-shared"], 0, use_dora=True, target_modules=["input_linear"]),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A kind's model and adapter on disk."""

    kind: Kind
    root: Path

    @cached_property
    def model(self) -> Path:
        import transformers

        spec = self.kind.spec
        torch.manual_seed(0)
        model = getattr(transformers, spec.model)(getattr(transformers, spec.config)(**spec.options()))
        model.float().save_pretrained(self.root / "model")
        return self.root / "model"

    @cached_property
    def adapter(self) -> PeftAdapter:
        options = {"r": 4, "lora_alpha": 6, "target_modules": list(ATTENTION), **self.kind.options}
        adapted = peft.get_peft_model(self.loaded(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(self.root / "adapter", save_embedding_layers=self.kind.tables)
        return open_peft(self.root / "adapter", dora=True)

    def loaded(self) -> Any:
        model = peft_side.load_model(self.model)
        if self.kind.resized:
            model.resize_token_embeddings(GROWN)
        return model

    @cached_property
    def merged(self) -> Any:
        adapted = peft.PeftModel.from_pretrained(self.loaded(), self.adapter.path)
        return adapted.double().merge_and_unload()


@pytest.fixture(scope="module", params=list(KINDS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(KINDS[request.param], tmp_path_factory.mktemp("whole"))


def changed(before: Tensors, adapter: LoraAdapter) -> Tensors:
    """The model's tensors after the adapter, by the definitions in float64."""
    after = dict(before)
    for kind in ("replaces", "rows"):
        for name, whole in adapter.whole.items():
            if whole.kind == kind:
                loaded = adapter.load_whole(name).double()
                assert loaded.shape == whole.shape
                old = after.get(whole.target, loaded)
                after[whole.target] = loaded if kind == "replaces" else with_rows(old, whole.rows, loaded)
    for name, whole in adapter.whole.items():
        if whole.kind == "adds":
            after[whole.target] = after.get(whole.target, torch.zeros(())) + whole.factor * adapter.load_whole(name)
    for module, pair in adapter.pairs.items():
        weight = after[f"{pair.weight}.weight"]
        own = weight if pair.expert is None else weight[pair.expert]
        new = with_pair(own.T if pair.embedding else own, module, adapter)
        new = new.T if pair.embedding else new
        if pair.expert is not None:
            after[f"{pair.weight}.weight"] = weight = weight.clone()
            weight[pair.expert] = new
        else:
            after[f"{pair.weight}.weight"] = new
    return after


def with_rows(old: torch.Tensor, rows: Iterable[int], new: torch.Tensor) -> torch.Tensor:
    matrix = old.reshape(-1, old.shape[-1]).clone()
    matrix[list(rows)] = new
    return matrix.reshape(old.shape)


def with_pair(weight: torch.Tensor, module: str, adapter: LoraAdapter) -> torch.Tensor:
    a, b = adapter.load(module)
    moved = weight + adapter.pairs[module].scaling * b.double() @ a.double()
    if module not in adapter.magnitudes:
        return moved
    return adapter.load_magnitude(module).double()[:, None] * torch.nn.functional.normalize(moved, dim=1)


def test_pefts_merge_in_the_checkpoints_layout(made: Made) -> None:
    adapter = made.adapter
    assert len(adapter.whole) == made.kind.whole and adapter.missing == ()
    before = {canonical(name): value.double() for name, value in peft_side.load_model(made.model).state_dict().items()}
    after = {canonical(name): value for name, value in made.merged.state_dict().items()}
    compare(changed(before, adapter), after, tied=made.kind.tied)


def test_pefts_merge_in_ggufs_layout(made: Made, tmp_path: Path) -> None:
    stored = open_checkpoint(made.model)
    bridge = Bridge.of(table_of(stored, ""), stored)
    before = ConvertedModel(stored, bridge)
    made.merged.save_pretrained(tmp_path / "merged")
    after = ConvertedModel(open_checkpoint(tmp_path / "merged"), bridge)
    adapter = ConvertedAdapter(made.adapter, bridge)
    found = changed({name: before.load(name).double() for name in before.infos}, adapter)
    compare(found, {name: after.load(name) for name in after.infos}, tied=made.kind.tied)


def compare(found: Tensors, expected: Mapping[str, torch.Tensor], *, tied: bool) -> None:
    """Tied tables are one: what is done to the embedding is done to the head, and both are stored once."""
    heads = {"lm_head.weight", "output.weight"} if tied else set()
    assert found.keys() - heads == expected.keys() - heads
    for name in expected.keys() & found.keys() - heads:
        assert found[name].shape == expected[name].shape, name
        assert torch.allclose(found[name], expected[name].double(), rtol=0, atol=1e-6), name


def test_biases_of_lora_b_where_the_model_has_none(tmp_path: Path) -> None:
    """PEFT can't merge these; what its layer computes is W' x + b'."""
    made = Made(on(LLAMA, 8, lora_bias=True, use_rslora=True), tmp_path)
    name = "model.layers.1.self_attn.k_proj"
    weight = peft_side.load_model(made.model).state_dict()[f"{name}.weight"].double()
    after = changed({f"{module}.weight": weight * (module == name) for module in made.adapter.pairs}, _only(made, name))
    layer = peft.PeftModel.from_pretrained(made.loaded(), made.adapter.path).get_submodule(f"base_model.model.{name}")
    x = torch.randn(7, weight.shape[1], dtype=torch.float64)
    ours = x @ after[f"{name}.weight"].T + after[f"{name}.bias"]
    assert after[f"{name}.bias"].abs().max() > 0.01
    assert torch.allclose(layer.double()(x), ours, rtol=0, atol=1e-6)


def _only(made: Made, module: str) -> LoraAdapter:
    """The adapter with one of its pairs."""
    assert len(made.adapter.whole) == made.kind.whole
    made.adapter.pairs = {module: made.adapter.pairs[module]}
    return made.adapter


def test_a_head_of_its_own_has_no_place_where_gguf_has_none(tmp_path: Path) -> None:
    """PEFT unties what is trained in both places."""
    made = Made(on(SPECS["gemma2"], 2, modules_to_save=["embed_tokens", "lm_head"]), tmp_path)
    stored = open_checkpoint(made.model)
    adapter = ConvertedAdapter(made.adapter, Bridge.of(table_of(stored, ""), stored))
    with pytest.raises(
        UnsupportedError, match="no place in a GGUF model of gemma2, since its input and output are one"
    ):
        _ = adapter.whole


def test_what_llama_cpp_keeps_in_another_file_is_refused_by_name(tmp_path: Path) -> None:
    spec = SPECS["gemma3-vision"]
    made = Made(on(spec, 1, modules_to_save=["mm_soft_emb_norm"], target_modules=spec.linear), tmp_path)
    stored = open_checkpoint(made.model)
    adapter = ConvertedAdapter(made.adapter, Bridge.of(table_of(stored, ""), stored))
    with pytest.raises(UnsupportedError, match=r"no place in a GGUF model of gemma3.*mmproj") as caught:
        _ = adapter.whole
    assert "mm_soft_emb_norm" in (caught.value.tensor or "")

"""Whole tensors of adapters. Oracle: the names that PEFT 0.21 gives them, written out from its own files, and its own
reading of the configuration; the numbers written here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Sizes, adapter_config, config, pairs, save_adapter, save_model, weights
from safetensors.torch import save_file

from converters.adapters.converted import ConvertedAdapter
from converters.adapters.mlx import open_mlx
from converters.adapters.peft import PeftAdapter, open_peft
from converters.adapters.plan import plan_output
from converters.adapters.whole import WholeTensor
from converters.architectures import Architecture, HeadCounts, Rule, find_architecture
from converters.architectures.transforms import TakeRows
from converters.bridge import Bridge
from converters.checkpoint import open_checkpoint
from converters.errors import Error, FormatError, MismatchError, UnsupportedError

P = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.block_sparse_moe.experts.2.w1"
EMBED, HEAD = "model.embed_tokens", "lm_head"
DELTA = f"{P}{EMBED}.token_adapter.trainable_tokens_delta"


def tensor(*shape: int) -> torch.Tensor:
    return 1 + torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def open_with(
    root: Path, shapes: Mapping[str, tuple[int, ...]], lora: Mapping[str, torch.Tensor] | None = None, **settings: Any
) -> PeftAdapter:
    tensors = {**(lora or pairs({Q0: (8, 8)}, 1)), **{name: tensor(*shape) for name, shape in shapes.items()}}
    return open_peft(save_adapter(root / "adapter", tensors, adapter_config(**settings)), dora=True)


def whole(key: str, target: str, shape: tuple[int, ...], **more: Any) -> WholeTensor:
    return WholeTensor(P + key, target, shape, **{"kind": "replaces", **more})


Case = tuple[Mapping[str, tuple[int, ...]], Mapping[str, Any], list[WholeTensor]]
NAMES: dict[str, Case] = {
    "a module, as it is saved": (
        {f"{P}{HEAD}.weight": (6, 8)}, {"modules_to_save": [HEAD]}, [whole(f"{HEAD}.weight", f"{HEAD}.weight", (6, 8))]
    ),
    "a module in its wrapping": (
        {f"{P}{HEAD}.modules_to_save.weight": (6, 8), f"{P}{HEAD}.original_module.weight": (6, 8)}, {},
        [whole(f"{HEAD}.modules_to_save.weight", f"{HEAD}.weight", (6, 8))],
    ),
    "a module with its adapter's name": (
        {f"{P}{HEAD}.modules_to_save.default.weight": (6, 8)}, {},
        [whole(f"{HEAD}.modules_to_save.default.weight", f"{HEAD}.weight", (6, 8))],
    ),
    "a module of modules": (
        {f"{P}model.layers.0.mlp.modules_to_save.up_proj.weight": (6, 8)}, {},
        [whole("model.layers.0.mlp.modules_to_save.up_proj.weight", "model.layers.0.mlp.up_proj.weight", (6, 8))],
    ),
    "a stack of experts": (
        {f"{P}model.layers.0.mlp.experts.down_proj": (2, 6, 8)}, {"modules_to_save": ["mlp"]},
        [whole("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.down_proj", (2, 6, 8))],
    ),
    "a module in a model of text and images": (
        {f"{P}model.language_model.norm.weight": (8,)}, {},
        [whole("model.language_model.norm.weight", "model.norm.weight", (8,))],
    ),
    "tokens": (
        {DELTA: (2, 8)}, {"trainable_token_indices": [7, 3]},
        [whole(DELTA.removeprefix(P), f"{EMBED}.weight", (2, 8), kind="rows", rows=(7, 3))],
    ),
    "tokens of a resized tied table": (
        {DELTA: (2, 8), f"{P}{EMBED}.token_adapter.base_layer.weight": (9, 8),
         f"{P}{HEAD}.token_adapter.trainable_tokens_delta": (2, 8)},
        {"trainable_token_indices": {"embed_tokens": [7, 8]}},
        [whole(f"{HEAD}.token_adapter.trainable_tokens_delta", f"{HEAD}.weight", (2, 8), kind="rows", rows=(7, 8)),
         whole(f"{EMBED}.token_adapter.base_layer.weight", f"{EMBED}.weight", (9, 8), frozen=True),
         whole(DELTA.removeprefix(P), f"{EMBED}.weight", (2, 8), kind="rows", rows=(7, 8))],
    ),
    "tokens of two tables": (
        {DELTA: (2, 8), f"{P}{HEAD}.token_adapter.trainable_tokens_delta": (1, 8)},
        {"trainable_token_indices": {"lm_head": [2], "embed_tokens": [1, 0]}},
        [whole(f"{HEAD}.token_adapter.trainable_tokens_delta", f"{HEAD}.weight", (1, 8), kind="rows", rows=(2,)),
         whole(DELTA.removeprefix(P), f"{EMBED}.weight", (2, 8), kind="rows", rows=(1, 0))],
    ),
    "biases": (
        {f"{P}{Q0}.base_layer.bias": (8,), f"{P}{Q0}.lora_B.default.bias": (8,)}, {"bias": "all", "lora_bias": True},
        [whole(f"{Q0}.base_layer.bias", f"{Q0}.bias", (8,)),
         whole(f"{Q0}.lora_B.default.bias", f"{Q0}.bias", (8,), kind="adds", factor=2.0)],
    ),
    "a table beside the pairs": (
        {f"{P}{EMBED}.weight": (9, 8)}, {}, [whole(f"{EMBED}.weight", f"{EMBED}.weight", (9, 8))]
    ),
    "an adapted table and its bias": (
        {f"{P}{HEAD}.base_layer.weight": (6, 8), f"{P}{HEAD}.base_layer.bias": (6,)}, {},
        [whole(f"{HEAD}.base_layer.bias", f"{HEAD}.bias", (6,), frozen=True),
         whole(f"{HEAD}.base_layer.weight", f"{HEAD}.weight", (6, 8), frozen=True)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_what_the_names_mean(case: str, tmp_path: Path) -> None:
    shapes, settings, expected = NAMES[case]
    adapter = open_with(tmp_path, shapes, **settings)
    assert dict(adapter.whole) == {each.key: each for each in expected}
    for key in adapter.whole:
        assert torch.equal(adapter.load_whole(key), tensor(*shapes[key]))
    assert adapter.missing == ()


def test_an_adapter_s_own_name_is_no_module(tmp_path: Path) -> None:
    lora = {name.replace(".weight", ".mine.weight"): value for name, value in pairs({Q0: (8, 8)}, 1).items()}
    adapter = open_with(tmp_path, {f"{P}{HEAD}.modules_to_save.mine.weight": (6, 8)}, lora)
    assert [each.target for each in adapter.whole.values()] == [f"{HEAD}.weight"]


def test_what_is_announced_is_missing_and_not_whole(tmp_path: Path) -> None:
    adapter = open_with(tmp_path, {f"{P}{HEAD}.weight": (6, 8)}, modules_to_save=[HEAD, "embed_tokens"])
    assert len(adapter.whole) == 1 and len(adapter.losses) == 2
    (missing,) = adapter.missing
    assert "embed_tokens (modules_to_save) were trained, too" in missing


DEFECTS: dict[str, tuple[Mapping[str, tuple[int, ...]], Mapping[str, Any], str]] = {
    "a table that is a vector": ({f"{P}{HEAD}.weight": (8,)}, {}, "expected a matrix: saved by DeepSpeed"),
    "a bias that is a matrix": ({f"{P}{Q0}.bias": (8, 1)}, {"bias": "all"}, "expected a vector"),
    "an empty module": ({f"{P}{HEAD}.weight": (0,)}, {"modules_to_save": [HEAD]}, "saved by DeepSpeed ZeRO-3"),
    "a bias of another size": ({f"{P}{Q0}.base_layer.bias": (7,)}, {"bias": "all"}, "its module's pair is for [8]"),
    "a bias of lora_B of another size": ({f"{P}{Q0}.lora_B.bias": (7,)}, {}, "its module's pair is for [8]"),
    "a bias of no lora_B": ({f"{P}{HEAD}.lora_B.bias": (7,)}, {}, "there is no pair of a linear weight"),
    "tokens too few": (
        {DELTA: (1, 8)}, {"trainable_token_indices": [1, 2]}, "has 1 rows, and adapter_config.json numbers 2"
    ),
    "tokens of another width": (
        {f"{P}{Q0}.token_adapter.trainable_tokens_delta": (1, 7)}, {"trainable_token_indices": [1]},
        "its module's pair is for [1, 8]",
    ),
    "tokens without numbers": ({DELTA: (1, 8)}, {}, "doesn't say which they are"),
    "tokens of other tables": (
        {DELTA: (1, 8)}, {"trainable_token_indices": {"wte": [1], "lm_head": [2]}}, "doesn't say which they are"
    ),
    "two tensors for one place": (
        {f"{P}{HEAD}.weight": (6, 8), f"{P}{HEAD}.base_layer.weight": (6, 8)}, {},
        "is a second tensor for lm_head.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DEFECTS)
def test_defects_are_told_when_they_are_asked_for(case: str, tmp_path: Path) -> None:
    """An adapter whose pairs alone are wanted opens: it is merging that needs the rest."""
    shapes, settings, told = DEFECTS[case]
    adapter = open_with(tmp_path, shapes, **settings)
    with pytest.raises(FormatError) as caught:
        _ = adapter.whole
    assert told in caught.value.message and caught.value.tensor in shapes


@pytest.mark.parametrize(
    "value",
    [
        "yes",
        5,
        [1, -1],
        [1.0],
        [True],
        [[1]],
        {"embed_tokens": 3},
        [4, 4],
        [1 << 32],
        {f"table{number}": [1] for number in range(101)},
    ],
)
def test_token_indices_that_are_none(value: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="trainable_token_indices"):
        open_with(tmp_path, {}, trainable_token_indices=value)


def test_a_bias_of_an_embedding_s_lora_b(tmp_path: Path) -> None:
    """PEFT has none: an embedding's delta is added to rows that are looked up."""
    lora = {f"{P}{EMBED}.lora_embedding_A": tensor(4, 6), f"{P}{EMBED}.lora_embedding_B": tensor(6, 4)}
    adapter = open_with(tmp_path, {f"{P}{EMBED}.lora_B.bias": (6,)}, lora)
    with pytest.raises(FormatError, match="there is no pair of a linear weight"):
        _ = adapter.whole


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    key = f"{P}model.norm.weight"
    lora = {**pairs({Q0: (8, 8)}, 1), key: torch.tensor([1.0, value])}
    adapter = open_with(tmp_path, {}, lora)
    with pytest.raises(FormatError, match="not finite") as caught:
        adapter.load_whole(next(iter(adapter.whole)))
    assert caught.value.tensor == key


def test_whole_tensors_stored_as_integers(tmp_path: Path) -> None:
    adapter = open_with(
        tmp_path, {}, {**pairs({Q0: (8, 8)}, 1), f"{P}model.norm.weight": torch.ones(8, dtype=torch.int8)}
    )
    with pytest.raises(UnsupportedError, match="stored as I8"):
        _ = adapter.whole


def bridge(experts: int = 4, architecture: str = "llama") -> Bridge:
    table = find_architecture(architecture)
    assert table is not None
    return Bridge(table, HeadCounts(2, 1), experts, 8)


@pytest.mark.parametrize(("ending", "offset"), [("base_layer.weight", 1), ("base_layer.bias", 1), ("lora_B.bias", 0)])
def test_what_replaces_a_norm_gets_its_1_and_what_is_added_does_not(ending: str, offset: int, tmp_path: Path) -> None:
    """No trainer adapts norms; where GGUF's are 1 + weight, a delta is the same."""
    shape = (1, 8) if ending.endswith("weight") else (8,)
    lora = pairs({Q0: (8, 8), "model.norm": (1, 8) if len(shape) == 2 else (8, 8)}, 1)
    adapter = open_with(tmp_path, {f"{P}model.norm.{ending}": shape}, lora, bias="all")
    seen = ConvertedAdapter(adapter, bridge(architecture="gemma2"))
    ((name, each),) = seen.whole.items()
    assert each.target == f"output_norm.{ending.rpartition('.')[2]}"
    assert torch.equal(seen.load_whole(name), tensor(*shape) + offset)


def test_one_expert_is_rows_of_its_stack(tmp_path: Path) -> None:
    key = f"{P}{EXPERT}.weight"
    adapter = ConvertedAdapter(open_with(tmp_path, {key: (6, 8)}, modules_to_save=["w1"]), bridge())
    expected = WholeTensor(key, "blk.0.ffn_gate_exps.weight", (6, 8), "rows", rows=tuple(range(12, 18)))
    assert dict(adapter.whole) == {key: expected}
    assert torch.equal(adapter.load_whole(key), tensor(6, 8))


def test_an_expert_that_the_model_lacks(tmp_path: Path) -> None:
    key = f"{P}{EXPERT}.weight"
    adapter = ConvertedAdapter(open_with(tmp_path, {key: (6, 8)}, modules_to_save=["w1"]), bridge(experts=2))
    with pytest.raises(MismatchError, match="expert 2, and its model has 2") as caught:
        _ = adapter.whole
    assert caught.value.tensor == key and caught.value.file == str(adapter.tensor_file)


def test_a_stack_that_is_split(tmp_path: Path) -> None:
    """Gate's rows stand before up's in every expert's matrix."""
    key = f"{P}model.layers.0.mlp.experts.gate_up_proj"
    adapter = ConvertedAdapter(open_with(tmp_path, {key: (2, 6, 8)}, modules_to_save=["mlp"]), bridge())
    stack = tensor(2, 6, 8)
    found = {each.target: adapter.load_whole(name) for name, each in adapter.whole.items()}
    assert torch.equal(found["blk.0.ffn_gate_exps.weight"], stack[:, :3])
    assert torch.equal(found["blk.0.ffn_up_exps.weight"], stack[:, 3:])
    assert {each.shape for each in adapter.whole.values()} == {(2, 3, 8)}
    assert {each.key for each in adapter.whole.values()} == {key}


def test_a_module_that_the_table_lacks(tmp_path: Path) -> None:
    key = f"{P}score.weight"
    adapter = ConvertedAdapter(open_with(tmp_path, {key: (2, 8)}, modules_to_save=["score"]), bridge())
    with pytest.raises(UnsupportedError, match="no place in a GGUF model of llama") as caught:
        _ = adapter.whole
    assert caught.value.tensor == key


def test_rows_that_gguf_has_elsewhere(tmp_path: Path) -> None:
    """No trainer takes the rows of a projection for tokens, and llama.cpp has a llama's queries in another order."""
    key = f"{P}{Q0}.token_adapter.trainable_tokens_delta"
    adapter = ConvertedAdapter(open_with(tmp_path, {key: (1, 8)}, trainable_token_indices=[1]), bridge())
    with pytest.raises(UnsupportedError, match="single rows of a tensor that GGUF has in another form") as caught:
        _ = adapter.whole
    assert caught.value.tensor == key


def test_row_lengths_go_with_their_rows(tmp_path: Path) -> None:
    """Llama's queries change their rows' order: two heads of four rows (0 1 | 2 3) become (0 2 1 3)."""
    adapter = ConvertedAdapter(open_with(tmp_path, {f"{P}{Q0}.lora_magnitude_vector": (8,)}, use_dora=True), bridge())
    assert dict(adapter.magnitudes) == {"blk.0.attn_q": f"{P}{Q0}.lora_magnitude_vector"}
    assert adapter.load_magnitude("blk.0.attn_q").tolist() == [1, 3, 2, 4, 5, 7, 6, 8]


def test_mlx_lengths_of_columns(tmp_path: Path) -> None:
    """An embedding's, whose columns stay where they are."""
    tensors = {f"{EMBED}.lora_a": tensor(6, 2), f"{EMBED}.lora_b": tensor(2, 8), f"{EMBED}.m": tensor(6)}
    save_adapter(tmp_path / "adapter", {}, {"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 1.0}})
    save_file(tensors, tmp_path / "adapter" / "adapters.safetensors")
    opened = open_mlx(tmp_path / "adapter", dora=True)
    adapter = ConvertedAdapter(opened, bridge())
    assert torch.equal(adapter.load_magnitude("token_embd"), tensor(1, 6))
    assert dict(adapter.whole) == {} and adapter.missing == ()
    halved = Architecture("halved", (), (Rule(EMBED, "token_embd", (TakeRows("first"),)),))
    with pytest.raises(UnsupportedError, match="lengths of columns") as caught:
        ConvertedAdapter(opened, replace(bridge(), architecture=halved)).load_magnitude("token_embd")
    assert caught.value.tensor == f"{EMBED}.m"


def test_pairs_without_a_place_are_missing(tmp_path: Path) -> None:
    lora = pairs({"model.layers.0.self_attn.kv_b_proj": (8, 8), "model.layers.0.self_attn.o_proj": (8, 8)}, 1)
    adapter = ConvertedAdapter(open_with(tmp_path, {}, lora), bridge(architecture="deepseek2"))
    assert adapter.source.missing == () and list(adapter.pairs) == ["blk.0.attn_output"]
    (missing,) = adapter.missing
    assert "1 of 2 pairs are left out" in missing and "kv_b_proj" in missing


def test_no_writer_takes_pairs_without_their_lengths(tmp_path: Path) -> None:
    sizes = Sizes(hidden=8, ffn=8, layers=1, heads=2, kv_heads=1, vocab=6)
    model = open_checkpoint(save_model(tmp_path / "model", weights(sizes, 1), config(sizes)))
    adapter = open_with(tmp_path, {f"{P}{Q0}.lora_magnitude_vector": (8,)}, use_dora=True)
    for out in ("out.gguf", "out"):
        with pytest.raises(AssertionError, match="DoRA"):
            plan_output(tmp_path / out, adapter, model, outtype="f32", to=None, label="", force=False)
    assert not list(tmp_path.glob("out*"))


def test_errors_say_which_file(tmp_path: Path) -> None:
    adapter = open_with(tmp_path, {f"{P}{HEAD}.weight": (8,)})
    with pytest.raises(Error) as caught:
        _ = adapter.whole
    assert caught.value.file == str(adapter.tensor_file)

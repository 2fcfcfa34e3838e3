"""Which tensors a checkpoint's GGUF model has. Oracles: the tensors put in by hand, and torch's own stacking and
rounding of them; what is wrong is made wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import permuted
from models import Sizes, config, save_model, save_sharded, weights
from rewriting import edits_of

from converters.changed_model import ChangedModel
from converters.changes import Edits
from converters.checkpoint import open_checkpoint
from converters.converted_tensors import ConvertedTensors, converted_tensors
from converters.errors import FormatError, UnsupportedError
from converters.ggml import QType
from converters.gguf_layout import ModelTensor, Rounded, Stored
from converters.layouts import find_table
from converters.quantization import FileType, file_type

SIZES = Sizes()
Tensors = dict[str, torch.Tensor]


def converted(
    directory: Path, tensors: Mapping[str, torch.Tensor], wanted: FileType | None = None, **settings: Any
) -> ConvertedTensors:
    save = save_sharded if settings.pop("sharded", False) else save_model
    model = open_checkpoint(save(directory, tensors, {**config(SIZES), **settings}))
    table = find_table(model)
    assert table is not None
    return converted_tensors(ChangedModel(model, Edits()), table, wanted)


def data_of(tensor: ModelTensor) -> bytes:
    """The bytes that are copied, or those of the rows that come in their stored type."""
    if isinstance(tensor.data, Stored):
        return b"".join(path.read_bytes()[at : at + size] for path, at, size in tensor.data.pieces)
    rows = tensor.data.rows(0, int(torch.tensor(tensor.shape[:-1]).prod()))
    return (rows.float() if tensor.qtype == QType.F32 else rows).contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_keeps_its_type_is_copied(dtype: torch.dtype, sharded: bool, tmp_path: Path) -> None:
    tensors = weights(SIZES, 1, dtype)
    found = converted(tmp_path / "m", tensors, sharded=sharded)
    assert len(found.tensors) == len(tensors) and not found.losses and not found.notes
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert [*by_name][::20] == ["token_embd.weight", "output_norm.weight"]
    for own, name in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        tensor = by_name[f"blk.1.{name}.weight"]
        assert isinstance(tensor.data, Stored)
        wanted = tensors[f"model.layers.1.{own}.weight"].view(torch.uint8).numpy().tobytes()
        assert data_of(tensor) == wanted
    query, norm = by_name["blk.1.attn_q.weight"], by_name["blk.1.attn_norm.weight"]
    own_query = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert isinstance(query.data, Rounded) and query.data.rows(0, 1).dtype == dtype
    assert data_of(query) == torch.from_numpy(permuted(own_query.float().numpy(), 4)).to(dtype).view(
        torch.uint8).numpy().tobytes()  # fmt: skip
    assert norm.qtype == QType.F32
    assert data_of(norm) == tensors["model.layers.1.input_layernorm.weight"].float().numpy().tobytes()


def test_types_that_are_asked_for(tmp_path: Path) -> None:
    tensors = weights(Sizes(ffn=80), 1, torch.bfloat16)
    found = converted(tmp_path / "m", tensors, file_type("q8_0"), intermediate_size=80)
    types = {tensor.name: tensor.qtype for tensor in found.tensors}
    assert types["blk.0.attn_v.weight"] == types["token_embd.weight"] == QType.Q8_0
    assert types["blk.0.ffn_down.weight"] == QType.F16  # whose rows are no whole blocks
    assert types["blk.0.ffn_norm.weight"] == QType.F32
    assert set(found.sources.values()) == {"BF16"}


def mixture(dtype: torch.dtype) -> Tensors:
    tensors = {name: tensor for name, tensor in weights(SIZES, 1, dtype).items() if ".mlp." not in name}
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{block}.gate.weight"] = torch.randn(3, 64).to(dtype)
        for expert in range(3):
            for kind, shape in (("w1", (96, 64)), ("w2", (64, 96)), ("w3", (96, 64))):
                tensors[f"{block}.experts.{expert}.{kind}.weight"] = torch.randn(shape).to(dtype)
    return tensors


def test_a_stack_of_experts_is_copied_from_many_places(tmp_path: Path) -> None:
    tensors = mixture(torch.float16)
    settings = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "sharded": True}
    found = {tensor.name: tensor for tensor in converted(tmp_path / "m", tensors, **settings).tensors}
    stack = found["blk.1.ffn_down_exps.weight"]
    assert isinstance(stack.data, Stored) and len(stack.data.pieces) == 3 and stack.shape == (3, 64, 96)
    own = [tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"] for expert in range(3)]
    assert data_of(stack) == torch.stack(own).view(torch.uint8).numpy().tobytes()
    assert found["blk.1.ffn_gate_inp.weight"].qtype == QType.F32
    del tensors["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    with pytest.raises(FormatError, match="2 of 3 experts"):
        converted(tmp_path / "n", tensors, **settings)


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def with_more(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): tensor for name, tensor in more.items()}}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


WRONG: Mapping[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str, str]] = {
    "unknown": (with_more(model__layers__0__self_attn__q_proj__weight_scale=torch.ones(1)), {}, "no place", "scale"),
    "a layer's": (without("model.layers.1.mlp.up_proj.weight"), {}, "incomplete", "model.layers.1.mlp.up_proj.weight"),
    "a layer's norm": (
        without("model.layers.1.input_layernorm.weight"),
        {},
        "incomplete",
        "model.layers.1.input_layernorm.weight",
    ),
    "a bias": (with_more(model__layers__1__self_attn__q_proj__bias=torch.ones(64)), {}, "incomplete", "layers.0"),
    "everybody's": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "v_proj" not in name},
        {},
        "attn_v",
        "v_proj",
    ),
    "too few layers": (lambda tensors: tensors, {"num_hidden_layers": 3}, "incomplete", "model.layers.2"),
    "too many layers": (lambda tensors: tensors, {"num_hidden_layers": 1}, "says that there are 1", "blk.1"),
    "head": (without("lm_head.weight"), {}, "output.weight", "lm_head.weight"),
    "embedding": (without("model.embed_tokens.weight"), {}, "token_embd", "embed_tokens"),
    "final norm": (without("model.norm.weight"), {}, "output_norm", "model.norm"),
    "another prefix": (renamed("model.layers.1", "transformer.layers.1"), {}, "no place", "transformer"),
    "a million layers": (lambda tensors: tensors, {"num_hidden_layers": 10_000_000}, "can't be", "None"),
    "cut off": (
        lambda tensors: {name: tensor[:90] if "1.mlp.up_proj" in name else tensor for name, tensor in tensors.items()},
        {},
        "config.json makes it 96 x 64",
        "up_proj",
    ),
    "another width": (lambda tensors: tensors, {"hidden_size": 60, "head_dim": 16}, "makes it 128 x 60", "weight"),
    "another width alone": (
        lambda tensors: tensors,
        {"hidden_size": 60, "head_dim": 16, "vocab_size": None},
        "makes it 60 wide",
        "weight",
    ),
    "another vocabulary": (lambda tensors: tensors, {"vocab_size": 120}, "makes it 120 x 64", "weight"),
    "a shorter head": (
        lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"][:100].clone()},
        {"vocab_size": None},
        "the embedding model.embed_tokens.weight is 128 x 64",
        "lm_head.weight",
    ),
    "head by default": (
        without("lm_head.weight"),
        {"tie_word_embeddings": None},
        "set tie_word_embeddings to true in config.json",
        "lm_head.weight",
    ),
    "heads": (lambda tensors: tensors, {"num_attention_heads": 24}, "heads", "q_proj"),
    "vision of a model that has none": (with_more(vision_tower__a__weight=torch.ones(2, 2)), {}, "no place", "vision"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_would_be_another_one_is_refused(wrong: str, tmp_path: Path) -> None:
    change, settings, message, tensor = WRONG[wrong]
    with pytest.raises(FormatError) as caught:
        converted(tmp_path / "m", change(weights(SIZES, 1)), **settings)
    assert message in caught.value.message and tensor in str(caught.value.tensor)
    assert caught.value.file is not None


def test_what_is_packed_is_refused(tmp_path: Path) -> None:
    tensors = weights(SIZES, 1)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="F8_E4M3"):
        converted(tmp_path / "m", tensors)


def test_a_tied_model_needs_no_head(tmp_path: Path) -> None:
    tensors = without("lm_head.weight")(weights(SIZES, 1))
    found = converted(tmp_path / "m", tensors, tie_word_embeddings=True)
    assert "output.weight" not in {tensor.name for tensor in found.tensors}


def test_buffers_and_other_halves_are_left_out_and_told(tmp_path: Path) -> None:
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    found = converted(tmp_path / "m", {**weights(SIZES, 1), **buffers})
    assert "inv_freq" in found.notes[0] and not found.losses
    tensors = {f"language_model.{name}": tensor for name, tensor in weights(Sizes(tied=True), 1).items()}
    norms = {f"language_model.model.layers.{layer}.{norm}.weight": torch.zeros(size) for layer in range(2)
             for norm, size in (("pre_feedforward_layernorm", 64), ("post_feedforward_layernorm", 64),
                                ("self_attn.q_norm", 16), ("self_attn.k_norm", 16))}  # fmt: skip
    vision = {"vision_tower.vision_model.embeddings.patch_embedding.weight": torch.ones(4, 3),
              "multi_modal_projector.mm_input_projection_weight": torch.ones(4, 4)}  # fmt: skip
    settings = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"num_hidden_layers": 2},
                "tie_word_embeddings": True}  # fmt: skip
    found = converted(tmp_path / "g", {**tensors, **norms, **vision}, **settings)
    assert "2 tensors beside the language model" in found.losses[0] and "mmproj" in found.losses[0]
    plus = next(tensor for tensor in found.tensors if tensor.name == "blk.0.attn_q_norm.weight")
    assert data_of(plus) == torch.ones(16).numpy().tobytes()


def test_a_head_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    """Gemma's. Left out where it is the embedding; tests/conformance has transformers' logits of the others."""
    tensors, gemma = weights(SIZES, 1), {"architectures": ["GemmaForCausalLM"]}
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    for ties in (False, True):
        with pytest.raises(UnsupportedError, match="another matrix") as caught:
            converted(tmp_path / f"apart-{ties}", tensors, **gemma, tie_word_embeddings=ties)
        assert caught.value.tensor == "lm_head.weight"
        found = converted(tmp_path / f"same-{ties}", same, **gemma, tie_word_embeddings=ties)
        assert "lm_head.weight" in found.notes[0] and found.losses == ()
        assert not any(tensor.name == "output.weight" for tensor in found.tensors)


BOTH = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("changed", "ties", "fits"),
    [(BOTH[:1], True, False), (BOTH[1:], True, False), (BOTH, True, True), (BOTH, False, False), ((), False, True)],
)
def test_changes_that_part_such_a_head(changed: tuple[str, ...], ties: bool, fits: bool, tmp_path: Path) -> None:
    """What changes both tables alike leaves config.json's ties alone."""
    tensors = weights(SIZES, 1)
    tensors[BOTH[1]] = tensors[BOTH[0]].clone()
    settings = {**config(SIZES), "architectures": ["GemmaForCausalLM"], "tie_word_embeddings": ties}
    model = open_checkpoint(save_model(tmp_path / "m", tensors, settings))
    table, edits = find_table(model), edits_of({name: tensors[name] + 1 for name in changed})
    assert table is not None
    if fits:
        assert "lm_head" in converted_tensors(ChangedModel(model, edits), table, None).notes[0]
        return
    with pytest.raises(UnsupportedError, match="another matrix"):
        converted_tensors(ChangedModel(model, edits), table, None)

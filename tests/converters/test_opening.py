"""Oracle: the contract's list of what MODEL and ADAPTER may be, and llama.cpp's converter for the head counts."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_bytes import LITTLE, Tensor
from gguf_models import QType, permuted, put, write_gguf_adapter, write_gguf_model
from models import Sizes, adapter_config, config, pairs, save_adapter, save_model, save_sharded, weights

from converters.errors import FileMissingError, FormatError, MismatchError, UnsupportedError
from converters.layouts import common_layout
from converters.models import Model
from converters.opening import open_adapter, open_model

SIZES = Sizes(hidden=32, ffn=64, layers=2)
SETTINGS = config(SIZES)
TENSORS = weights(SIZES, 1)


def forms(root: Path) -> dict[str, Path]:
    single = save_model(root / "single", TENSORS, SETTINGS)
    gguf_file = write_gguf_model(root / "model.gguf", TENSORS, SETTINGS)
    unnamed = root / "blob"
    unnamed.write_bytes(gguf_file.read_bytes())
    return {
        "directory": single,
        "sharded": save_sharded(root / "sharded", TENSORS, SETTINGS),
        "file": single / "model.safetensors",
        "gguf": gguf_file,
        "gguf by its content": unnamed,
    }


@pytest.mark.parametrize("form", ["directory", "sharded", "file", "gguf", "gguf by its content"])
def test_every_form_of_a_model(form: str, tmp_path: Path) -> None:
    model = open_model(forms(tmp_path)[form])
    hugging_face = not form.startswith("gguf")
    assert model.architecture == ("LlamaForCausalLM" if hugging_face else "llama")
    assert (model.heads().query, model.heads().key_value) == (4, 2)
    assert not model.tied_embeddings
    name = "model.layers.1.mlp.up_proj.weight" if hugging_face else "blk.1.ffn_up.weight"
    exact = TENSORS["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.load(name), exact)
    assert torch.equal(model.rows(name, 5, 9), exact[5:9])
    assert model.rounding(name, 0, 4) is None


def test_a_split_model_by_its_first_shard(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "plamo7", split_max_tensors=2)
    values = {f"blk.{n}.ffn_up.weight": np.full((4, 8), n, np.float32) for n in range(5)}
    for name, value in values.items():
        put(writer, name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_model(tmp_path / "model-00001-of-00003.gguf")
    assert set(model.infos) == set(values)
    assert all(np.array_equal(model.load(name), value) for name, value in values.items())
    assert model.file_of("blk.4.ffn_up.weight").name == "model-00003-of-00003.gguf"


@pytest.mark.parametrize("opening", [open_model, open_adapter])
def test_nothing_there(opening: object, tmp_path: Path) -> None:
    assert callable(opening)
    with pytest.raises(FileMissingError):
        opening(tmp_path / "nothing")


def test_a_model_is_no_adapter_and_an_adapter_no_model(tmp_path: Path) -> None:
    model = write_gguf_model(tmp_path / "model.gguf", TENSORS, SETTINGS)
    lora = pairs(SIZES.modules(), 3)
    adapter = write_gguf_adapter(tmp_path / "adapter.gguf", lora, SETTINGS)
    with pytest.raises(FormatError, match=r"general\.type"):
        open_adapter(model)
    with pytest.raises(FormatError, match="adapter"):
        open_model(adapter)
    with pytest.raises(UnsupportedError, match="is an adapter"):
        open_model(save_adapter(tmp_path / "peft", lora, adapter_config()))


def test_a_checkpoint_beside_a_gguf_file_is_seen_in_its_layout(tmp_path: Path) -> None:
    found = forms(tmp_path)
    adapter = open_adapter(save_adapter(tmp_path / "adapter", pairs(SIZES.modules(), 3), adapter_config()))
    base, aligned, lora = common_layout(open_model(found["sharded"]), open_model(found["gguf"]), adapter, to_gguf=False)
    assert {model.layout for model in (base, aligned)} == {lora.layout} == {"gguf"}
    assert base.architecture == aligned.architecture == "llama"
    assert set(base.infos) == set(aligned.infos)
    for name in base.infos:
        assert torch.equal(base.load(name), aligned.load(name)), name
    for start, stop in ((0, 7), (7, 32), (3, 4)):
        assert torch.equal(
            base.rows("blk.1.attn_q.weight", start, stop), aligned.rows("blk.1.attn_q.weight", start, stop)
        )
    for module, pair in adapter.pairs.items():
        name = {"q_proj": "attn_q", "k_proj": "attn_k"}.get(module.rpartition(".")[2])
        if name is None:
            continue
        ours = lora.load(f"blk.{module.split('.')[2]}.{name}")
        theirs = adapter.load(module)
        assert torch.equal(ours[0], theirs[0])
        heads = 4 if name == "attn_q" else 2
        assert np.array_equal(ours[1], permuted(theirs[1].numpy(), heads)), pair.key


def test_files_of_one_layout_are_left_as_they_are(tmp_path: Path) -> None:
    found = forms(tmp_path)
    inputs = open_model(found["file"]), open_model(found["sharded"]), open_adapter(
        save_adapter(tmp_path / "adapter", pairs(SIZES.modules(), 3), adapter_config())
    )  # fmt: skip
    assert common_layout(*inputs, to_gguf=False) == inputs


def test_mixed_models_must_have_the_same_heads(tmp_path: Path) -> None:
    other = write_gguf_model(tmp_path / "other.gguf", TENSORS, {**SETTINGS, "num_attention_heads": 8})
    base = open_model(save_model(tmp_path / "base", TENSORS, SETTINGS))
    adapter = open_adapter(save_adapter(tmp_path / "adapter", pairs(SIZES.modules(), 3), adapter_config()))
    with pytest.raises(MismatchError, match="8 attention heads"):
        common_layout(base, open_model(other), adapter, to_gguf=False)


def test_heads_that_differ_from_layer_to_layer_have_no_order(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_head_count([4, 8])
    put(writer, "blk.0.attn_q.weight", np.zeros((32, 32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model: Model = open_model(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="differs from layer to layer"):
        model.heads()


def test_quantized_tensors_state_their_rounding(tmp_path: Path) -> None:
    """Q8_0's step is the largest entry of 32 over 127, its variance a twelfth of the step's square."""
    model = open_model(write_gguf_model(tmp_path / "model.gguf", TENSORS, SETTINGS, QType.Q8_0))
    found = model.rounding("blk.0.ffn_up.weight", 4, 10)
    assert found is not None
    variances, run = found
    exact = TENSORS["model.layers.0.mlp.up_proj.weight"][4:10].reshape(6, 1, 32).abs().amax(dim=2) / 127
    assert run == 32
    assert torch.allclose(variances, exact.square() / 12, rtol=2e-3)


def test_nvfp4_with_scales_of_its_own_is_no_reference(tmp_path: Path) -> None:
    """llama.cpp multiplies such a weight by the `.scale` beside it; without it the difference would mean nothing."""
    tensors = [Tensor("blk.0.attn_q.weight", (2, 64), 40, nbytes=72), Tensor("blk.0.attn_q.scale", (1,))]
    file = tmp_path / "model.gguf"
    for count in (1, 2):
        file.write_bytes(LITTLE.file([("general.architecture", LITTLE.text("llama"))], tensors[:count]))
        model = open_model(file)
        if count == 1:
            model.check_type("blk.0.attn_q.weight")
        else:
            with pytest.raises(UnsupportedError, match="scale in a tensor of its own"):
                model.check_type("blk.0.attn_q.weight")

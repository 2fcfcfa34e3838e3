"""What configurations make of the tensors of a whole model. Oracle: the parameters that transformers gives models of
published configurations, on the meta device, which takes no memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import transformers
from conformance.test_published_sizes import on_meta
from published_configs import PUBLISHED

from converters.architectures import KNOWN, find_architecture
from converters.bridge import Bridge
from converters.changed_model import ChangedModel
from converters.converted_model import ConvertedModel
from converters.converted_tensors import check_complete
from converters.description import ConfiguredModel
from converters.errors import FormatError
from converters.expected_biases import expected_biases
from converters.expected_shapes import check_shapes
from converters.model_config import ties_of, vocabulary_of
from converters.models import Model
from converters.tensors import TensorInfo

pytestmark = pytest.mark.conformance

GGUF = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 0}  # fmt: skip
BIASED = [name for table in KNOWN if table.writing for name in table.classes if name not in table.composites]
CONVERTED = [name for name, published in PUBLISHED.items()
             if (table := find_architecture(published.config["architectures"][0])) and table.writing]  # fmt: skip


class Shapes(ConfiguredModel):
    """A configuration with the tensors that it should have."""

    infos: dict[str, TensorInfo]

    @property
    def config(self) -> dict[str, object]:
        return self._config

    def file_of(self, name: str) -> Path:
        return self.path

    def stored_name(self, name: str) -> str:
        return name


@pytest.mark.parametrize("name", CONVERTED)
def test_transformers_has_these_shapes(name: str, tmp_path: Path) -> None:
    config = json.loads(json.dumps(PUBLISHED[name].config))
    parameters = on_meta(config).state_dict()
    config.get("text_config", config)["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = Shapes(tmp_path, tmp_path / "config.json")
    model.infos = {own: TensorInfo(own, tuple(tensor.shape), "BF16", 2 * tensor.numel())
                   for own, tensor in parameters.items()}  # fmt: skip
    table = find_architecture(model.architecture)
    assert table is not None
    seen = ConvertedModel(cast(Model, model), Bridge.of(table, model))
    biases = {
        own.rpartition(".")[0].rpartition(".")[2] for own in parameters if own.endswith(".bias") and "vision" not in own
    }
    expected = expected_biases(seen, config)
    assert {GGUF[module] for module in biases} == expected
    check_complete(seen.infos, table, cast(ChangedModel, model), expected)
    check_shapes(seen, vocabulary_of(config))
    longer = next(own for own in parameters if own.endswith("layers.1.mlp.down_proj.weight") or "1.mlp.experts" in own)
    shape = list(model.infos[longer].shape)
    model.infos[longer] = TensorInfo(longer, (*shape[:-1], shape[-1] + 2), "BF16", 0)
    with pytest.raises(FormatError, match="cut off"):
        check_shapes(ConvertedModel(cast(Model, model), Bridge.of(table, model)), vocabulary_of(config))


KINDS = [name for table in KNOWN for name in table.classes
         if hasattr(transformers, name) and name != "Mistral3ForConditionalGeneration"]  # fmt: skip


@pytest.mark.parametrize("model_class", KINDS)
def test_transformers_ties_what_says_nothing(model_class: str) -> None:
    """But for Mistral 3, whose two configurations have two defaults."""
    config = getattr(transformers, model_class).config_class()
    told = config.to_dict()
    bare = {"architectures": [model_class], "model_type": told["model_type"]}
    assert ties_of(bare) is config.tie_word_embeddings
    for ties in (True, False):
        assert ties_of({**bare, "tie_word_embeddings": ties}) is ties


@pytest.mark.parametrize("model_class", BIASED)
@pytest.mark.parametrize("settings", [{"attention_bias": True}, {"mlp_bias": True}, {"qkv_bias": False}], ids=str)
def test_transformers_gives_these_modules_biases(model_class: str, settings: dict[str, bool], tmp_path: Path) -> None:
    kind = getattr(transformers, model_class)
    known = {key: value for key, value in settings.items() if hasattr(kind.config_class(), key)}
    config = {**json.loads(kind.config_class(**SMALL, **known).to_json_string()), "architectures": [model_class]}
    names = [name for name, _ in on_meta(config).named_parameters() if name.endswith(".bias")]
    (tmp_path / "config.json").write_text(json.dumps(config))
    table = find_architecture(model_class)
    model = Shapes(tmp_path, tmp_path / "config.json")
    model.infos = {}
    assert table is not None
    seen = ConvertedModel(cast(Model, model), Bridge.of(table, model))
    assert {GGUF[name.split(".")[-2]] for name in names} == expected_biases(seen, {**config, **settings})


def test_there_are_several_of_each_kind() -> None:
    assert len(CONVERTED) > 12

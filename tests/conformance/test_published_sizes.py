"""What configurations say of weights' shapes. Oracle: the modules that transformers makes of the same configurations,
on the meta device, which takes no memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from conformance import peft_side
from conformance.specs import SPECS
from published_configs import PUBLISHED

from converters.adapters.belonging import check_sizes
from converters.adapters.lora import LoraAdapter, LoraPair
from converters.architectures import find_architecture
from converters.description import ConfiguredModel
from converters.names import canonical

pytestmark = pytest.mark.conformance


def linear_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of all linear modules and embeddings of the text half."""
    return {
        canonical(name): (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and "vision" not in name
    }


def on_meta(config: Mapping[str, Any]) -> torch.nn.Module:
    """The model with no more than two layers."""
    settings = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    settings.get("text_config", settings)["num_hidden_layers"] = 2
    cls = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model: torch.nn.Module = cls(cls.config_class(**settings))
    return model


def taken(root: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises unless a pair for every module is taken."""
    (root / "config.json").write_text(json.dumps(config))
    pairs = {name: LoraPair(name, name, ("A", "B"), 1, 1.0, shape) for name, shape in shapes.items()}
    adapter = SimpleNamespace(
        layout="hugging_face",
        pairs=pairs,
        path=root,
        tensor_file=root,
        format="peft",
        base_model_name=None,
        peft_config=None,
    )
    check_sizes(cast(LoraAdapter, adapter), ConfiguredModel(root, root / "config.json"))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_listed_shapes_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """All but single experts and routers, which transformers 5 has as parameters; and every module of it is taken."""
    published = PUBLISHED[name]
    config = json.loads(json.dumps(published.config))
    shapes = linear_shapes(on_meta(config))
    listed = {**published.shapes, **published.by_width}
    layer = "transformer.h" if "Falcon" in published.config["architectures"][0] else "model.layers"
    compared = {module: shape for module, shape in listed.items() if f"{layer}.0.{module}" in shapes}
    assert {"o_proj", "dense"} & {module.rpartition(".")[2] for module in compared}
    for module, shape in compared.items():
        assert shapes[f"{layer}.0.{module}"] == shape, module
    taken(tmp_path, published.config, shapes)


@pytest.mark.parametrize("name", list(SPECS))
def test_no_module_of_the_small_models_is_refused(name: str, tmp_path: Path) -> None:
    """With the config.json that transformers writes for them, and nothing beside it."""
    model = peft_side.make_model(name)
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = [SPECS[name].model]
    assert find_architecture(SPECS[name].model) is not None
    taken(tmp_path, config, linear_shapes(model))

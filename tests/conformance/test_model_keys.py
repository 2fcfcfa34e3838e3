"""A model's keys and generated tensors, against upstream's own `set_gguf_parameters` and `generate_extra_tensors`.

Upstream reads config.json through transformers, which is the oracle for the defaults.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from conformance.families import HERE
from conformance.model_configs import CONFIGS

from converters.architectures import KNOWN, Architecture, find_architecture
from converters.architectures.writing import ModelType
from converters.gguf_file import entry_bytes
from converters.model_config import class_of
from converters.model_keys import generated_tensors, model_keys

pytestmark = pytest.mark.conformance

CONFIG = Path("config.json")
TYPES = [kind for entry in KNOWN if entry.writing is not None for kind in entry.writing.types]


@pytest.fixture(scope="module")
def upstream(llama_cpp_sources: Path) -> Mapping[str, Any]:
    """What upstream writes of each configuration, all asked for in one process."""
    command = [sys.executable, str(HERE / "model_keys_child.py"), str(llama_cpp_sources)]
    told = json.dumps(list(CONFIGS.values()))
    done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CONFIGS, json.loads(done.stdout), strict=True))


def _family(config: Mapping[str, Any]) -> Architecture:
    found = find_architecture(class_of(config, CONFIG))
    assert found is not None
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_generated_tensors_are_upstreams(name: str, upstream: Mapping[str, Any]) -> None:
    config, family = CONFIGS[name], _family(CONFIGS[name])
    theirs = upstream[name]
    assert "error" not in theirs
    keys = {key: entry_bytes(key, value)[8 + len(key) :].hex() for key, value in model_keys(config, CONFIG, family)}
    assert keys == {key: value for key, value in theirs["keys"].items() if not key.startswith("general.")}
    tensors = generated_tensors(config, CONFIG, family)
    assert {key: tensor.numpy().tobytes().hex() for key, tensor in tensors.items()} == theirs["tensors"]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_defaults_are_those_of_transformers(kind: ModelType) -> None:
    config = transformers.CONFIG_MAPPING[kind.name]()
    if hasattr(config, "use_sliding_window"):  # which hides the window
        config = transformers.CONFIG_MAPPING[kind.name](use_sliding_window=True)
    rope = config.rope_parameters
    theirs = {**config.to_dict(), **rope, **rope.get("full_attention", {}),
              "rope_local_base_freq": rope.get("sliding_attention", {}).get("rope_theta"),
              "num_experts": getattr(config, "num_experts", None)}  # fmt: skip
    assert kind.defaults
    assert {key: theirs[key] for key in kind.defaults} == kind.defaults

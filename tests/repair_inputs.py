"""Models of transformers as GGUF files that hold what a header must, for tests that don't run them."""

from __future__ import annotations

from pathlib import Path

import gguf
from gguf_models import finish, put

from converters.bridge import Bridge
from converters.converted_model import ConvertedModel
from converters.layouts import table_of
from converters.opening import open_model


def gguf_of(checkpoint: Path, target: Path) -> Path:
    """A checkpoint's tensors under llama.cpp's names, with its heads, experts and width."""
    model = open_model(checkpoint)
    bridge = Bridge.of(table_of(model, ""), model)
    seen = ConvertedModel(model, bridge)
    writer = gguf.GGUFWriter(target, bridge.architecture.name)
    writer.add_head_count(bridge.heads.query)
    writer.add_head_count_kv(bridge.heads.key_value)
    writer.add_embedding_length(bridge.width or 0)
    if bridge.experts:
        writer.add_expert_count(bridge.experts)
    for name in seen.infos:
        put(writer, name, seen.load(name).float().numpy())
    finish(writer)
    return target

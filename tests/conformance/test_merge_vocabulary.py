"""`merge` with new tokens, and with tables that part, all the way to a GGUF file that llama.cpp runs.

Oracles: the logits of PEFT's unmerged adapter on the resized model; transformers' tokenizer, which added the tokens;
llama.cpp, which loads the files and splits text with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conformance import peft_side
from conformance.checkpoints import VARIANTS, make_checkpoint
from conformance.families import Logits
from conformance.merge_side import MORE_TOKENS, grown, make_adapter, unmerged

from safelora_gguf.merge import merge_adapters
from safelora_gguf.model_conversion import convert_model

pytestmark = pytest.mark.conformance

PROMISED = 0.02
NEW = [f"<|new_{number}|>" for number in range(MORE_TOKENS)]
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "tables-saved": {"target_modules": ["q_proj", "k_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 384, 385, 386, 387]},
    "tables-trained": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "pairs-on-tables": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda variant: make_checkpoint(VARIANTS[variant], root / variant))


@pytest.fixture(params=["llama3-rope", "qwen2-yarn"])
def checkpoint(request: pytest.FixtureRequest, checkpoint_of: Callable[[str], Path]) -> Path:
    """One tied, and one with two tables."""
    return checkpoint_of(request.param)


def adapter_with_tokens(model: Path, place: Path, options: Mapping[str, Any]) -> Path:
    """As a trainer leaves it: the adapter with the tokenizer that it extended."""
    import transformers

    make_adapter(model, place, before=grown, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert tokenizer.add_tokens(NEW, special_tokens=True) == MORE_TOKENS
    tokenizer.save_pretrained(place)
    return place


def pieces(path: Path) -> list[str]:
    return gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()


def text_as_tokens(path: Path, text: str) -> list[int]:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return model.tokenize(text.encode(), add_bos=False, special=True)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("way", ["at-once", "by-a-directory", "into-gguf"])
def test_new_tokens(way: str, kind: str, checkpoint: Path, llama_logits: Logits, tmp_path: Path) -> None:
    model = checkpoint
    adapter = adapter_with_tokens(model, tmp_path / "adapter", OPTIONS[kind])
    out = tmp_path / "merged.gguf"
    if way == "at-once":
        merge_adapters(model, [(adapter, 1.0)], out, device="cpu")
    elif way == "by-a-directory":
        merge_adapters(model, [(adapter, 1.0)], tmp_path / "merged", device="cpu")
        convert_model(tmp_path / "merged", out)
    else:
        convert_model(model, tmp_path / "model.gguf")
        merge_adapters(tmp_path / "model.gguf", [(adapter, 1.0)], out, device="cpu")
    assert pieces(out)[-MORE_TOKENS:] == NEW
    assert text_as_tokens(out, NEW[1]) == [384 + 1]
    assert np.abs(llama_logits(out, None) - unmerged(model, adapter, grown)).max() < PROMISED


@pytest.mark.parametrize("way", ["at-once", "into-gguf"])
def test_tables_that_part(way: str, checkpoint_of: Callable[[str], Path], llama_logits: Logits, tmp_path: Path) -> None:
    """A pair on the input of a tied model, which no adapter of llama.cpp can have."""
    model = checkpoint_of("llama3-rope")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    if way == "into-gguf":
        convert_model(model, tmp_path / "model.gguf")
    source = model if way == "at-once" else tmp_path / "model.gguf"
    merge_adapters(source, [(adapter, 1.0)], tmp_path / "merged.gguf", device="cpu")
    found = llama_logits(tmp_path / "merged.gguf", None)
    assert np.abs(found - unmerged(model, adapter)).max() < PROMISED
    assert np.abs(found - peft_side.logits_of(peft_side.load_model(model))).max() > PROMISED

"""Stands in for the llama.cpp child: says the same whatever it is asked, and is loaded before."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fake_llama_child import VOCABULARY, WIDE, WIDTH

from safelora_gguf.smoke.parent.process import LlamaProcess
from safelora_gguf.smoke.protocol import InputShape, ModelOptions


def replying(tmp_path: Path, *lines: str) -> tuple[str, ...]:
    """A child that answers every request with these lines, after a proper load."""
    script = tmp_path / "reply.py"
    loaded = {"ok": {"n_vocab": 3, "vocabulary": VOCABULARY, "n_ctx": 64, "notes": []}}
    script.write_text(
        f"import sys\nfor line in sys.stdin:\n    load = '\"load\"' in line\n"
        f"    print({json.dumps(loaded)!r} if load else {chr(10).join(lines)!r}, flush=True)\n"
    )
    return (sys.executable, str(script))


def loaded(command: tuple[str, ...]) -> LlamaProcess:
    process = LlamaProcess(command)
    process.load(ModelOptions("model.gguf"), 20)
    return process


def shapes(*weights: str) -> dict[str, InputShape]:
    """What `fake_llama_child` says of the inputs of weights."""
    return {weight: InputShape(WIDE if "down" in weight else WIDTH) for weight in weights}

"""Inputs that don't belong together, or must not be harmed. Oracle: the contract's exit statuses, and the files' bytes
before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import QType, adapter_writer, finish, put, write_gguf_adapter, write_gguf_model, write_trio
from models import Sizes, adapter_config, config, moved, pairs, save_adapter, save_model, weights
from safetensors.torch import save_file
from typer.testing import CliRunner

from safelora_gguf.cli import app

SIZES = Sizes(hidden=64, ffn=96, layers=1, heads=4, kv_heads=2)
BEFORE = weights(SIZES, 1)
AFTER = moved(BEFORE, 2)
SETTINGS = config(SIZES)


def project(base: Path, aligned: Path, adapter: Path, out: Path, *more: object) -> dict[str, Any]:
    command = ["project", "--base", base, "--aligned", aligned, "--adapter", adapter, "--out", out, "--json", *more]
    result = CliRunner().invoke(app, list(map(str, command)))
    return {"exit": result.exit_code, **json.loads(result.stdout)}


def ggufs(root: Path, settings: dict[str, Any] = SETTINGS) -> tuple[Path, Path]:
    return (
        write_gguf_model(root / "base.gguf", BEFORE, SETTINGS),
        write_gguf_model(root / "aligned.gguf", AFTER, settings),
    )


def peft(root: Path, modules: dict[str, tuple[int, int]] | None = None) -> Path:
    return save_adapter(root / "adapter", pairs(modules or SIZES.modules(), 3), adapter_config())


@pytest.mark.parametrize("role", ["base", "aligned", "adapter"])
def test_force_never_overwrites_an_input(role: str, tmp_path: Path) -> None:
    base, aligned = ggufs(tmp_path)
    adapter = write_gguf_adapter(tmp_path / "adapter.gguf", pairs(SIZES.modules(), 3), SETTINGS)
    target = {"base": base, "aligned": aligned, "adapter": adapter}[role]
    link = tmp_path / "link.gguf"
    link.symlink_to(target)
    before = target.read_bytes()
    for out in (target, link):
        told = project(base, aligned, adapter, out, "--force")
        assert (told["exit"], told["error"]["kind"]) == (3, "output")
    assert target.read_bytes() == before


@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_other_heads_are_another_order_of_rows(form: str, tmp_path: Path) -> None:
    """Same shapes, same names: nothing but the metadata tells."""
    other = {**SETTINGS, "num_attention_heads": 8, "num_key_value_heads": 4}
    if form == "gguf":
        base, aligned = ggufs(tmp_path, other)
    else:
        base, aligned = (save_model(tmp_path / name, tensors, settings)
                         for name, tensors, settings in (("b", BEFORE, SETTINGS), ("a", AFTER, other)))  # fmt: skip
    told = project(base, aligned, peft(tmp_path), tmp_path / "out.gguf")
    assert (told["exit"], told["error"]["kind"]) == (3, "mismatch")
    assert "8 attention heads" in told["error"]["message"]


@pytest.mark.parametrize("form", ["gguf", "safetensors"])
def test_a_pair_on_a_tied_head_is_told_to_merge(form: str, tmp_path: Path) -> None:
    sizes = Sizes(hidden=64, ffn=96, layers=1, tied=True)
    before = weights(sizes, 1)
    models = before, moved(before, 2)
    if form == "gguf":
        base, aligned = (write_gguf_model(tmp_path / f"{n}.gguf", m, config(sizes)) for n, m in enumerate(models))
    else:
        base, aligned = (save_model(tmp_path / str(n), m, config(sizes)) for n, m in enumerate(models))
    adapter = peft(tmp_path, {"lm_head": (sizes.vocab, sizes.hidden)})
    told = project(base, aligned, adapter, tmp_path / "out.gguf")
    assert (told["exit"], told["error"]["kind"]) == (3, "unsupported")
    assert "tied" in told["error"]["message"] and "merge" in told["error"]["message"]


def test_a_grown_vocabulary_is_told_as_such(tmp_path: Path) -> None:
    grown = Sizes(hidden=64, ffn=96, layers=1, heads=4, kv_heads=2, vocab=160)
    base = save_model(tmp_path / "base", BEFORE, SETTINGS)
    aligned = save_model(tmp_path / "aligned", weights(grown, 5), config(grown))
    told = project(base, aligned, peft(tmp_path, {"lm_head": (160, 64)}), tmp_path / "out.gguf")
    assert (told["exit"], told["error"]["kind"]) == (3, "unsupported")
    assert "the vocabulary grew" in told["error"]["message"]


def noisy(root: Path, change: float) -> tuple[Path, Path, Path]:
    random = np.random.default_rng(4)
    name, base = "blk.0.ffn_up.weight", random.normal(0, 0.02, (256, 256))
    lora = {name: (random.normal(size=(4, 256)), random.normal(size=(256, 4)))}
    moved_by = change * random.normal(size=(256, 256))
    return write_trio(root, "llama", {name: (base, base + moved_by)}, lora, qtype=QType.Q8_0)


def test_where_nothing_can_be_chosen_noise_does_not_matter(tmp_path: Path) -> None:
    trio = noisy(tmp_path, 5e-5)
    assert project(*trio, tmp_path / "1.gguf")["exit"] == 3
    assert project(*trio, tmp_path / "2.gguf", "--number", 0)["exit"] == 0
    assert project(*trio, tmp_path / "3.gguf", "--ratio", 0)["exit"] == 0
    # A threshold that nothing falls under is no such wish: noise itself lifts the cosines.
    assert project(*trio, tmp_path / "4.gguf", "--threshold", 0)["exit"] == 3


def test_visible_noise_is_told(tmp_path: Path) -> None:
    clear, dim = noisy(tmp_path / "clear", 2e-3), noisy(tmp_path / "dim", 3e-4)
    notes = project(*clear, tmp_path / "1.gguf")["notes"]
    assert not any("rounding noise" in note for note in notes)
    told = project(*dim, tmp_path / "2.gguf")
    assert 1 < told["modules"][0]["snr"] < 10
    assert any("rounding noise shows" in note for note in told["notes"])


def smoke(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["smoke", "--json", *map(str, arguments)])
    return {"exit": result.exit_code, **json.loads(result.stdout)}


def test_smoke_keeps_what_llama_cpp_would_refuse_away_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("llama.cpp was started")

    monkeypatch.setattr("subprocess.Popen", never)
    model = tmp_path / "model.gguf"
    base = write_gguf_model(tmp_path / "base.gguf", BEFORE, SETTINGS)  # has no hyperparameters
    told = smoke("--model", base)
    assert (told["exit"], told["error"]["kind"]) == (3, "format") and "context_length" in told["error"]["message"]

    # Nothing known to any ggml stands under number 3999: the type of the first tensor, patched.
    data = base.read_bytes()
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    assert data[at : at + 4] == (0).to_bytes(4, "little")
    model.write_bytes(data[:at] + (3999).to_bytes(4, "little") + data[at + 4 :])
    told = smoke("--model", model)
    assert told["exit"] == 3

    writer = adapter_writer(tmp_path / "experts.gguf", "llama")
    put(writer, "blk.0.attn_q.weight.lora_a", np.zeros((5000, 1, 64)))
    put(writer, "blk.0.attn_q.weight.lora_b", np.zeros((5000, 64, 1)))
    finish(writer)
    tiny = Path(__file__).parents[2] / "safelora_gguf" / "tiny_family" / "aligned.gguf"
    told = smoke("--model", tiny, "--adapter", tmp_path / "experts.gguf")
    assert told["exit"] == 3 and "5000 experts" in told["error"]["message"]


def test_an_mlx_pair_on_a_tied_embedding_is_no_peft_pair(tmp_path: Path) -> None:
    """mlx-lm applies it at the output too, PEFT at the input alone: the same file would mean another update."""
    sizes = Sizes(hidden=64, ffn=96, layers=1, tied=True)
    before = weights(sizes, 1)
    base, aligned = (save_model(tmp_path / str(n), m, config(sizes)) for n, m in enumerate((before, moved(before, 2))))
    adapter = tmp_path / "mlx"
    adapter.mkdir()
    halves = {"lora_a": torch.randn(sizes.vocab, 4), "lora_b": torch.randn(4, sizes.hidden)}
    save_file(
        {f"model.embed_tokens.{half}": tensor for half, tensor in halves.items()}, adapter / "adapters.safetensors"
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 4, "scale": 2.0}}))
    told = project(base, aligned, adapter, tmp_path / "peft")
    assert (told["exit"], told["error"]["kind"]) == (3, "unsupported")
    assert "safelora-gguf merge" in told["error"]["message"]


def test_the_table_shows_noise_where_there_is_some(tmp_path: Path) -> None:
    shown = {}
    for name, qtype in (("exact", QType.F16), ("noisy", QType.Q8_0)):
        random = np.random.default_rng(4)
        weight, base = "blk.0.ffn_up.weight", random.normal(0, 0.02, (256, 256))
        lora = {weight: (random.normal(size=(4, 256)), random.normal(size=(256, 4)))}
        both = {weight: (base, base + 2e-3 * random.normal(size=(256, 256)))}
        trio = write_trio(tmp_path / name, "llama", both, lora, qtype=qtype)
        command = ["project", "--out", tmp_path / f"{name}.gguf"]
        for option, path in zip(("--base", "--aligned", "--adapter"), trio, strict=True):
            command += [option, path]
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 0
        shown[name] = result.stdout.splitlines()[0]
    assert "snr" not in shown["exact"]
    assert "snr" in shown["noisy"] and "noise edge" in shown["noisy"]

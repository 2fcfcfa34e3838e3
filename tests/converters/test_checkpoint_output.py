"""Oracles: the safetensors package reads what was written, torch rounds, the source's bytes, transformers loads it."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from models import Sizes, config, save_model, save_sharded, weights
from rewriting import edits_of, listing, raw, write
from safetensors import safe_open
from safetensors.torch import load_file

from converters.changes import Edits
from converters.checkpoint import open_checkpoint
from converters.checkpoint_output import write_checkpoint
from converters.checkpoint_plan import plan_checkpoint
from converters.errors import FormatError, UnsupportedError, UsageError, WriteError

SIZES = Sizes()
CHANGED = ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"]


def new_values(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(tensors[name].shape, generator=generator) for name in CHANGED}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shards_index_and_untouched_tensors_stay_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights(SIZES, 1, dtype)
    source = save_sharded(tmp_path / "source", tensors, config(SIZES))
    values = new_values(tensors)
    errors = write(source, tmp_path / "out", values)
    assert listing(tmp_path / "out") == sorted([*listing(source), "README.md"])
    for name in ("model.safetensors.index.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    for shard in source.glob("*.safetensors"):
        before, after = raw(shard), raw(tmp_path / "out" / shard.name)
        assert list(before) == list(after)
        for name in before:
            assert before[name][:2] == after[name][:2]
            assert (before[name] == after[name]) == (name not in CHANGED)
        read = load_file(tmp_path / "out" / shard.name)
        for name in set(read) & set(CHANGED):
            assert torch.equal(read[name], values[name].to(dtype))
            expected = (values[name].to(dtype).double() - values[name]).norm() / values[name].double().norm()
            assert errors[name].relative == pytest.approx(float(expected), rel=1e-5, abs=0)
        with safe_open(tmp_path / "out" / shard.name, "pt") as file:
            assert file.metadata() == {"format": "pt", "tool": "ours"}
    assert set(errors) == set(CHANGED)


@pytest.mark.parametrize(("outtype", "dtype"), [("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16")])
def test_another_type_for_all_and_nothing_else_in_the_configuration(tmp_path: Path, outtype: str, dtype: str) -> None:
    tensors = weights(SIZES, 1, torch.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["counts"] = torch.arange(5)
    inner = {"text_config": {"dtype": "float64", "x": 1e-05}, "note": 'a "torch_dtype": "float16"', "other": "float16"}
    source = save_sharded(tmp_path / "source", tensors, {**config(SIZES), "torch_dtype": "torch.bfloat16", **inner})
    index = source / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["metadata"] = {"total_size": 1, "more": [1]}
    index.write_text(json.dumps(table, indent=2))
    values = new_values(tensors)
    write(source, tmp_path / "out", values, outtype=outtype)
    read = {}
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        read |= load_file(shard)
    wanted = getattr(torch, dtype)
    for name, tensor in tensors.items():
        expected = values.get(name, tensor)
        assert torch.equal(read[name], expected if name == "counts" else expected.to(wanted))
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = sum(tensor.numel() * tensor.element_size() for tensor in read.values())
    assert written == {**table, "metadata": {"total_size": sizes, "more": [1]}}
    settings = json.loads((source / "config.json").read_text())
    settings["torch_dtype"] = f"torch.{dtype}"
    settings["text_config"]["dtype"] = dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == settings


def test_types_that_nobody_here_reads_are_copied(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", {"w": torch.ones(3, 4)}, config(SIZES))
    generator = np.random.default_rng(0)
    parts = {"packed": ("F8_E4M3", [3, 5], 15), "w": ("F32", [3, 4], 48), "odd": ("I8", [7], 7),
             "none": ("F32", [0, 4], 0), "small": ("F4", [2, 3], 3), "big": ("I64", [300_001], 2_400_008)}  # fmt: skip
    table, data = {}, b""
    for name, (dtype, shape, size) in parts.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += generator.bytes(size) if name != "w" else np.ones(12, np.float32).tobytes()
    header = json.dumps(table).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    write(source, tmp_path / "out", {"w": torch.full((3, 4), 2.0)})
    before, after = raw(source / "model.safetensors"), raw(tmp_path / "out" / "model.safetensors")
    assert {name: after[name] for name in after if name != "w"} == {
        name: before[name] for name in before if name != "w"
    }
    assert after["w"][2] == np.full(12, 2, np.float32).tobytes()
    with pytest.raises(UnsupportedError, match="F8_E4M3"):
        plan_checkpoint(open_checkpoint(source), outtype="f16")
    with pytest.raises(UnsupportedError, match="F8_E4M3"):
        plan_checkpoint(open_checkpoint(source), edits_of({"packed": torch.ones(3, 5)}))


def test_stacks_vectors_scalars_and_doubles(tmp_path: Path) -> None:
    tensors = {
        "stack": torch.randn(4, 6, 8, dtype=torch.bfloat16),
        "vector": torch.randn(9).half(),
        "scalar": torch.tensor(1.5),
        "double": torch.randn(3, 5, dtype=torch.float64),
        "wide": torch.zeros(3, 700_000, dtype=torch.bfloat16),
    }
    source = save_model(tmp_path / "source", tensors, config(SIZES))
    values = {name: torch.randn(tensor.shape, dtype=torch.float64) for name, tensor in tensors.items()}
    edits = edits_of({name: tensor.reshape(tensor.shape or (1,)) for name, tensor in values.items()})
    write_checkpoint(open_checkpoint(source), tmp_path / "out", edits, outtype=None, card="", metadata={}, force=False)
    read = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], values[name].to(tensor.dtype))


def test_values_out_of_range_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.full((2, 3), -torch.inf, dtype=torch.bfloat16)}
    source = save_model(tmp_path / "source", tensors, config(SIZES))
    for value, outtype, message in ((65_520.0, "f16", "65520"), (1e-9, None, None), (3.4e38, "bf16", "3.4e+38"),
                                    (float("nan"), None, "not finite"), (65_519.0, "f16", None)):  # fmt: skip
        target = tmp_path / f"{value}{outtype}"
        new = torch.ones(2, 3)
        new[1, 1] = -value
        if message is None:
            errors = write(source, target, {"a": new}, outtype=outtype)
            assert "b" not in errors or errors["b"].relative == 0.0
            assert load_file(target / "model.safetensors")["b"].float().max() == -torch.inf  # the source's own
            continue
        with pytest.raises(UnsupportedError, match=message.replace("+", r"\+")) as caught:
            write(source, target, {"a": new}, outtype=outtype)
        assert caught.value.tensor == "a"
        assert not target.exists()
    quantized = save_model(tmp_path / "quantized", tensors, {**config(SIZES), "quantization_config": {"bits": 4}})
    with pytest.raises(UnsupportedError, match="quantization_config"):
        plan_checkpoint(open_checkpoint(quantized), outtype="f16")
    with pytest.raises(UsageError, match="q8_0"):
        plan_checkpoint(open_checkpoint(source), outtype="q8_0")


def test_equal_calls_write_equal_bytes_and_progress_ends_whole(tmp_path: Path) -> None:
    tensors = weights(SIZES, 1, torch.bfloat16)
    source = save_sharded(tmp_path / "source", tensors, config(SIZES))
    seen: list[tuple[int, int]] = []
    for name in ("one", "two"):
        write(source, tmp_path / name, new_values(tensors), progress=lambda done, total, _: seen.append((done, total)))
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    sizes = sum(tensor.numel() * 2 for tensor in tensors.values())
    assert seen[0] == (0, sizes) and seen[-1] == (sizes, sizes)
    plan = plan_checkpoint(open_checkpoint(source), edits_of(new_values(tensors)), outtype="f32")
    assert plan.tensor_bytes == 2 * sizes


def test_a_source_cut_short_meanwhile_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", weights(SIZES, 1), config(SIZES))
    opened = open_checkpoint(source)
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(FormatError, match="changed"):
        write_checkpoint(opened, tmp_path / "out", Edits(), outtype=None, card="", metadata={}, force=False)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_the_old_directory(tmp_path: Path) -> None:
    """The system's own limit on a file's size stands for the disk's."""
    source = save_model(tmp_path / "source", weights(SIZES, 1), config(SIZES))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(WriteError):
            write(source, tmp_path / "out", {}, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert listing(tmp_path / "out") == ["old"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]


_SLOW = """
import sys, time
from pathlib import Path
from converters.changes import Edits
from converters.checkpoint import open_checkpoint
from converters.checkpoint_output import write_checkpoint
def progress(done, total, name):
    if done > total / 2:
        print("writing", flush=True)
        time.sleep(60)
write_checkpoint(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), Edits(), outtype=None, card="", metadata={},
                 force=True, progress=progress)
"""


def test_after_sigkill_the_old_directory_stands_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", weights(SIZES, 1), config(SIZES))
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    process = subprocess.Popen([sys.executable, "-c", _SLOW, str(source), str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert listing(target) == ["old"]
    assert all("safelora-gguf" in file.name for file in tmp_path.iterdir() if file.name not in {"out", "source"})
    write(source, target, {}, force=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]
    assert listing(target) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.conformance
@pytest.mark.parametrize("outtype", [None, "bf16"])
def test_transformers_loads_the_changed_weights(tmp_path: Path, outtype: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    settings = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings).half()
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    values = {name: torch.randn(model.state_dict()[name].shape) for name in CHANGED}
    write(tmp_path / "source", tmp_path / "out", values, outtype=outtype)
    loaded, told = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    wanted = torch.bfloat16 if outtype else torch.float16
    assert loaded.dtype == wanted
    for name, tensor in loaded.state_dict().items():
        expected = values[name] if name in values else model.state_dict()[name]
        assert torch.equal(tensor, expected.to(wanted)), name

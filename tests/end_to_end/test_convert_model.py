"""`convert_model` from end to end, on the packaged family.

Oracles: the packaged GGUF file, which llama.cpp's own converter made; the gguf package's reader; the exit statuses that
the contract gives to errors; llama.cpp, which loads what came out; and the bytes of all files before and after.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from extrapolating import ALIGNED, BASE, FAMILY, GGUF, in_gguf, listing
from safetensors.torch import load_file, save_file

from converters.errors import Error, FormatError, UnsupportedError, WriteError
from safelora_gguf.model_conversion import convert_model
from safelora_gguf.model_conversion_report import ConvertModelReport


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def keys_of(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def refused(status: int, *words: str, source: object = ALIGNED, out: object, **options: Any) -> Error:
    with pytest.raises(Error) as caught:
        convert_model(source, out, **options)  # type: ignore[arg-type]
    assert caught.value.exit_status == status, caught.value
    for word in words:
        assert word in str(caught.value)
    return caught.value


def test_the_packaged_family(tmp_path: Path) -> None:
    report = convert_model(ALIGNED, tmp_path / "a.gguf")
    ours, theirs = in_gguf(tmp_path / "a.gguf"), in_gguf(GGUF)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    mine, packaged = keys_of(tmp_path / "a.gguf"), keys_of(GGUF)
    assert {key for key in packaged if key.startswith(("llama.", "tokenizer."))} <= mine.keys()
    assert all(mine[key] == packaged[key] for key in packaged if key.startswith("llama."))
    told = report.to_json()
    assert told["command"] == "convert model" and told["outtype"] == "keep" and "planned_output" not in told
    assert told["output"]["path"] == str(tmp_path / "a.gguf") and "shards" not in told["output"]
    kinds = {tensor["name"]: (tensor["source_type"], tensor["type"]) for tensor in told["tensors"]}
    assert kinds["blk.0.attn_q.weight"] == ("F16", "F16") and kinds["output_norm.weight"] == ("F16", "F32")
    assert {tensor["stored_error"] for tensor in told["tensors"]} == {0.0}
    json.dumps(told, allow_nan=False)


@pytest.mark.llama
@pytest.mark.parametrize("outtype", [None, "q8_0", "Q4_K_M"])
def test_llama_cpp_loads_it_and_says_the_same(outtype: str | None, tmp_path: Path) -> None:
    from safelora_gguf import smoke_test

    convert_model(ALIGNED, tmp_path / "a.gguf", outtype=outtype)
    ours, theirs = (smoke_test(path, max_tokens=8) for path in (tmp_path / "a.gguf", GGUF))
    texts = [[one["text"] for one in report.to_json()["runs"][0]["responses"]] for report in (ours, theirs)]
    alike = sum(a == b for a, b in zip(*texts, strict=True))
    assert alike >= len(texts[0]) * (0.5 if outtype == "Q4_K_M" else 0.9)


def test_a_dry_run_writes_nothing_and_knows_the_size(tmp_path: Path) -> None:
    for name, options in {"a": {}, "b": {"outtype": "q8_0"}, "c": {"split_max_size": 500_000}}.items():
        out = tmp_path / f"{name}.gguf"
        dry = convert_model(ALIGNED, out, dry_run=True, **options).to_json()  # type: ignore[arg-type]
        assert not list(tmp_path.glob(f"{name}*")) and "output" not in dry
        wet = convert_model(ALIGNED, out, **options).to_json()  # type: ignore[arg-type]
        assert dry["planned_output"]["path"] == wet["output"]["path"]
        assert dry["planned_output"]["bytes"] == pytest.approx(wet["output"]["bytes"], abs=1000)


def test_equal_calls_write_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert_model(ALIGNED, tmp_path / f"{name}.gguf", outtype="bf16")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_shards(tmp_path: Path) -> None:
    whole = convert_model(ALIGNED, tmp_path / "w.gguf")
    report = convert_model(ALIGNED, tmp_path / "a.gguf", split_max_size=500_000).to_json()
    shards = report["output"]["shards"]
    assert [Path(one["path"]) for one in shards] == sorted(tmp_path.glob("a-*.gguf")) and len(shards) > 2
    assert report["output"]["path"] == shards[0]["path"]
    assert report["output"]["bytes"] == sum(one["bytes"] for one in shards)
    found = {name: values for one in shards for name, values in in_gguf(Path(one["path"])).items()}
    assert found.keys() == {tensor.name for tensor in whole.tensors}
    again = convert_model(shards[0]["path"], tmp_path / "again.gguf")
    assert again.files is not None
    assert all(np.array_equal(values, found[name]) for name, values in in_gguf(tmp_path / "again.gguf").items())
    refused(3, "--force", out=tmp_path / "a.gguf", split_max_size=500_000)
    convert_model(ALIGNED, tmp_path / "a.gguf", split_max_size=2_000_000, force=True)  # fewer: none of the old stays
    assert len(sorted(tmp_path.glob("a-*.gguf"))) == 2


def test_gguf_in_another_type(tmp_path: Path) -> None:
    q8 = convert_model(GGUF, tmp_path / "q8.gguf", outtype="q8_0")
    assert {tensor.type for tensor in q8.tensors if len(tensor.shape) > 1} == {"Q8_0"}
    errors = [tensor.stored_error for tensor in q8.tensors if len(tensor.shape) > 1]
    assert all(error is not None and 1e-4 < error < 0.01 for error in errors)
    refused(3, "--allow-requantize", source=tmp_path / "q8.gguf", out=tmp_path / "f.gguf", outtype="f16")
    convert_model(tmp_path / "q8.gguf", tmp_path / "f.gguf", outtype="f32", allow_requantize=True)
    for name, values in in_gguf(tmp_path / "f.gguf").items():
        assert np.array_equal(values, in_gguf(tmp_path / "q8.gguf")[name])


def test_a_vocabulary_from_another_file(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ALIGNED / name, bare)
    refused(3, "--vocab-from", source=bare, out=tmp_path / "a.gguf")
    report = convert_model(bare, tmp_path / "a.gguf", vocab_from=GGUF)
    mine, theirs = keys_of(tmp_path / "a.gguf"), keys_of(GGUF)
    assert {key: mine[key] for key in mine if "tokenizer" in key} == {
        key: theirs[key] for key in theirs if "tokenizer" in key
    }
    assert [one["role"] for one in report.to_json()["inputs"]] == ["model", "vocabulary"]


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    refused(2, ".gguf", out=tmp_path / "a")
    refused(2, "q4_z", out=tmp_path / "a.gguf", outtype="q4_z")
    refused(2, "split", out=tmp_path / "a.gguf", split_max_size=0)
    refused(3, "IQ1_S", "--imatrix", out=tmp_path / "a.gguf", outtype="IQ1_S")
    refused(3, "importance matrix", out=tmp_path / "a.gguf", outtype="Q4_K_M", imatrix=GGUF)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    mlx = tmp_path / "mlx"
    mlx.mkdir()
    (mlx / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 4}}')
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.zeros(4, 4)}, mlx / "adapters.safetensors")
    from safelora_gguf.convert import convert_adapter

    convert_adapter(FAMILY / "adapter", tmp_path / "adapter.gguf", base=BASE)
    for source in (FAMILY / "adapter", mlx, tmp_path / "adapter.gguf",
                   FAMILY / "adapter" / "adapter_model.safetensors"):  # fmt: skip
        refused(3, "convert adapter", source=source, out=tmp_path / "a.gguf")


def broken(tmp_path: Path, **settings: Any) -> Path:
    directory = shutil.copytree(ALIGNED, tmp_path / f"broken{len(list(tmp_path.iterdir()))}")
    table = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**table, **settings}))
    return directory


def test_architectures_that_are_not_known(tmp_path: Path) -> None:
    for name in ("XyzForCausalLM", "FalconForCausalLM", "BertModel"):
        error = refused(3, name, "convert_hf_to_gguf.py", source=broken(tmp_path, architectures=[name]),
                        out=tmp_path / "a.gguf")  # fmt: skip
        assert isinstance(error, UnsupportedError) and "everything after it" in error.message


def test_an_incomplete_model(tmp_path: Path) -> None:
    directory = broken(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    error = refused(3, "up_proj", source=directory, out=tmp_path / "a.gguf")
    assert isinstance(error, FormatError)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.full((256, 256), torch.nan)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    refused(3, "NaN", "ffn_up", source=directory, out=tmp_path / "a.gguf", outtype="f16")
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    directory = broken(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e20
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    refused(3, "F16", "e+19", source=directory, out=tmp_path / "a.gguf", outtype="f16")
    convert_model(directory, tmp_path / "a.gguf")
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["a.gguf"]


def test_no_input_is_harmed(tmp_path: Path) -> None:
    directory = shutil.copytree(ALIGNED, tmp_path / "m")
    shutil.copy(GGUF, tmp_path / "a.gguf")
    before = listing(tmp_path)
    refused(3, "input", source=tmp_path / "a.gguf", out=tmp_path / "a.gguf", force=True)
    refused(3, "input", source=directory, out=tmp_path / "a.gguf", vocab_from=tmp_path / "a.gguf", force=True)
    refused(3, "--force", source=directory, out=tmp_path / "a.gguf")
    assert listing(tmp_path) == before
    convert_model(directory, tmp_path / "a.gguf", force=True)
    assert listing(tmp_path).keys() == before.keys()


@pytest.mark.llama
@pytest.mark.parametrize("options", [{}, {"split_max_size": 500_000}, {"outtype": "Q4_K_M"}, {"outtype": "q8_0"}])
def test_a_full_disk_leaves_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    """The system's own limit on a file's size stands for the disk's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(WriteError):
            convert_model(ALIGNED, tmp_path / "a.gguf", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.llama
def test_without_room_for_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=GGUF.stat().st_size + 1000))
    refused(5, "float file", "room", out=tmp_path / "a.gguf", outtype="Q4_K_M")
    assert list(tmp_path.iterdir()) == []


def test_a_card_beside_it(tmp_path: Path) -> None:
    convert_model(ALIGNED, tmp_path / "a.gguf", card=True, invocation="safelora-gguf convert model aligned")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.Modelfile", "a.gguf", "a.md"]
    (tmp_path / "b.md").write_text("a letter")
    refused(3, "b.md", out=tmp_path / "b.gguf", card=True)
    assert not (tmp_path / "b.gguf").exists()


def test_progress_ends_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert_model(ALIGNED, tmp_path / "a.gguf", progress=lambda done, total, _: seen.append((done, total)))
    assert seen == sorted(seen) and len({total for _, total in seen}) == 1
    assert 0 < seen[-1][0] <= seen[-1][1]


def test_the_report_of_a_quantized_model(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    report: ConvertModelReport = convert_model(ALIGNED, tmp_path / "a.gguf", outtype="Q4_K_M")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert {tensor.name: tensor.type for tensor in report.tensors} == types
    assert {tensor.stored_error for tensor in report.tensors} == {None} and "Q4_K" in report.notes[0]


@pytest.mark.parametrize(("limit", "words"), [(None, ""), (2_000_000, " and 1 file more"), (500_000, " files more")])
def test_the_summary_counts_the_files(limit: int | None, words: str, tmp_path: Path) -> None:
    from safelora_gguf.model_tables import convert_model_summary

    report = convert_model(ALIGNED, tmp_path / "a.gguf", split_max_size=limit)
    more = len(list(tmp_path.glob("a*.gguf"))) - 1
    wrote = convert_model_summary(report)[0]
    assert words in wrote and (f"and {more} " in wrote) == (more > 0)

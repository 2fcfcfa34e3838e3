"""What `extrapolate` computes and writes, on the packaged family.

Oracles: LoX's formula with numpy's dense SVD in float64; the gguf package, which reads what was written and quantizes
the wanted values itself; llama.cpp, which loads the models; transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from extrapolating import (
    ALIGNED,
    BASE,
    FAMILY,
    GGUF,
    Arrays,
    as_float32,
    float64,
    formula,
    in_gguf,
    listing,
    lox,
    model,
    refused,
    run,
    worst,
)
from gguf_models import QType, permuted, write_gguf_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from converters.errors import LlamaError
from converters.quantizer import quantize_gguf
from safelora_gguf.cli import app
from safelora_gguf.extrapolate import extrapolate_models
from safelora_gguf.model_conversion import convert_model

HEADS = {"attn_q": 4, "attn_k": 2}
ENDS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The family in float32."""
    root = tmp_path_factory.mktemp("floats")
    base, aligned = as_float32(BASE, root / "base"), as_float32(ALIGNED, root / "aligned")
    tensors = load_file(base / "model.safetensors")  # alignment left the family's embedding and head alone
    generator = torch.Generator().manual_seed(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] += 0.01 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base, aligned


@pytest.fixture(scope="module")
def q8_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp")
    target = tmp_path_factory.mktemp("q8_0") / "aligned.gguf"
    quantize_gguf(GGUF, target, "Q8_0", threads=1)
    return target


@pytest.mark.parametrize("rank", [0, 6])
def test_the_formula_on_every_tensor(rank: int, floats: tuple[Path, Path], tmp_path: Path) -> None:
    told = model(tmp_path / "lox", "--rank", rank, base=floats[0], aligned=floats[1])
    assert told["exit"] == 0
    wanted = formula(float64(floats[0]), float64(floats[1]), rank=rank)
    assert worst(float64(tmp_path / "lox"), wanted) < 1e-6
    assert {tensor["stored_error"] for tensor in told["tensors"] if tensor["alignment_norm"]} == {0}


@pytest.mark.parametrize("rank", [0, 6])
def test_as_stored_the_error_is_the_types_and_is_told(rank: int, tmp_path: Path) -> None:
    """The packaged family is in F16: half a unit in the last place is 2.4e-4 of a value, 2e-4 over a tensor."""
    told = model(tmp_path / "lox", "--rank", rank)
    found, wanted = float64(tmp_path / "lox"), formula(float64(BASE), float64(ALIGNED), rank=rank)
    assert {tensor.dtype for tensor in load_file(tmp_path / "lox" / "model.safetensors").values()} == {torch.float16}
    assert 1e-5 < worst(found, wanted) < 3e-4
    measured = [float(np.linalg.norm(found[n] - wanted[n]) / np.linalg.norm(wanted[n])) for n in found if "proj" in n]
    errors = [tensor["stored_error"] for tensor in told["tensors"] if "blk" in tensor["name"]]
    assert sorted(errors) == pytest.approx(sorted(measured), rel=1e-2)


def test_the_report_is_the_formulas(tmp_path: Path) -> None:
    told = run(BASE, ALIGNED, tmp_path / "lox.gguf", "--outtype", "f16")
    assert told.keys() >= {"command", "version", "inputs", "output", "rank", "coef", "tensors", "notes"}
    assert (told["command"], told["rank"], told["coef"]) == ("extrapolate", 6, 1.25)
    before, after = float64(BASE), float64(ALIGNED)
    spectra = {
        name: np.linalg.svd(after[name] - before[name], compute_uv=False) for name in after if after[name].ndim == 2
    }
    assert len(told["tensors"]) == len(spectra)
    by_norm = {round(float(np.linalg.norm(s)), 4): s for s in spectra.values()}
    alike = [tensor["name"] for tensor in told["tensors"] if tensor["alignment_norm"] == 0]
    assert alike == ["output.weight", "token_embd.weight"] and any("same values" in note for note in told["notes"])
    for tensor in told["tensors"]:
        if tensor["name"] in alike:
            assert (tensor["singular_values"], tensor["r_align"], tensor["stored_error"]) == ([], None, None)
            continue
        s = by_norm[round(tensor["alignment_norm"], 4)]
        assert tensor["singular_values"] == pytest.approx(s[:6].tolist(), rel=1e-4)
        assert tensor["r_align"] == pytest.approx(np.linalg.norm(s[:6]) / np.linalg.norm(s), rel=1e-4)
        assert 0 <= tensor["residual"] <= 1e-3 and tensor["iterations"] >= 0
        assert 1e-5 < tensor["stored_error"] < 1e-3
    data = (tmp_path / "lox.gguf").read_bytes()
    assert told["output"]["bytes"] == len(data)


def test_q8_0_in_and_out(q8_0: Path, tmp_path: Path) -> None:
    told = run(BASE, q8_0, tmp_path / "lox.gguf", "--as", "model")
    assert told["exit"] == 0
    before, after = gguf.GGUFReader(q8_0), gguf.GGUFReader(tmp_path / "lox.gguf")
    assert [(t.name, t.tensor_type, t.shape.tolist()) for t in before.tensors] == \
        [(t.name, t.tensor_type, t.shape.tolist()) for t in after.tensors]  # fmt: skip
    bases = in_gguf_order(float64(BASE))
    changed = 0
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.tensor_type != gguf.GGMLQuantizationType.Q8_0:
            assert old.data.tobytes() == new.data.tobytes(), old.name
            continue
        weight = gguf.quants.dequantize(old.data, old.tensor_type).astype(np.float64)
        kept = len(next(t for t in told["tensors"] if t["name"] == old.name)["singular_values"])
        wanted = lox(bases[old.name], weight, kept) if kept else weight
        blocks = gguf.quants.quantize(wanted.astype(np.float32), old.tensor_type)
        changed += old.data.tobytes() != new.data.tobytes()
        assert np.mean(blocks == new.data) > 0.999, old.name  # a value between two codes may go to either
    assert changed > 20
    ours = [key for key in after.fields if key.startswith("safelora.")]
    assert {"safelora.lox.rank", "safelora.lox.coef", "safelora.base.fingerprint"} <= set(ours)
    for key, field in before.fields.items():
        if not key.startswith("GGUF."):
            theirs = after.fields[key]
            assert [part.tobytes() for part in field.parts] == [part.tobytes() for part in theirs.parts], key


def in_gguf_order(tensors: Arrays) -> dict[str, np.ndarray]:
    """The family's tensors by llama.cpp's names and in its order of rows."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    found = {}
    for name, values in tensors.items():
        module = name.removesuffix(".weight")
        place = names.get_name(module)
        heads = HEADS.get(place.rpartition(".")[2])
        found[f"{place}.weight"] = permuted(values, heads) if heads else values
    return found


@pytest.mark.llama
def test_smoke_runs_on_the_result(q8_0: Path, tmp_path: Path) -> None:
    run(BASE, q8_0, tmp_path / "lox.gguf", "--as", "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join((FAMILY / "prompts.jsonl").read_text().splitlines(keepends=True)[:4]))
    command = ["smoke", "--model", tmp_path / "lox.gguf", "--prompts", prompts, "--max-tokens", 4, "--json"]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code in (0, 1), result.stderr
    assert len(json.loads(result.stdout)["runs"][-1]["responses"]) == 4


def test_what_both_models_share_stays_as_it_is(q8_0: Path, tmp_path: Path) -> None:
    """The family's embedding and head; byte for byte in a model, absent from an adapter."""
    run(BASE, ALIGNED, tmp_path / "lox.gguf")
    adapted = {tensor.name.rpartition(".lora_")[0] for tensor in gguf.GGUFReader(tmp_path / "lox.gguf").tensors}
    assert len(adapted) == 21 and not adapted & {"token_embd.weight", "output.weight"}
    model(tmp_path / "lox")
    before, after = (load_file(path / "model.safetensors") for path in (ALIGNED, tmp_path / "lox"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sharded_checkpoint_comes_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    base, aligned = (sharded(source, tmp_path / source.name, dtype) for source in (BASE, ALIGNED))
    (aligned / "notes.txt").write_text("beside")
    assert model(tmp_path / "lox", base=base, aligned=aligned)["exit"] == 0
    before, after = listing(aligned), listing(tmp_path / "lox")
    assert before.keys() | {"README.md"} == after.keys()
    assert {name for name in before if before[name] != after[name]} == {name for name in before if "-of-" in name}
    for name in (name for name in before if "-of-" in name):
        ours, theirs = (load_file(path / name) for path in (tmp_path / "lox", aligned))
        assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
        assert all(torch.equal(ours[n], theirs[n]) == (theirs[n].ndim == 1 or n in ENDS) for n in ours)
    error = worst(float64(tmp_path / "lox"), formula(float64(base), float64(aligned)))
    assert error < {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}[dtype]


def sharded(source: Path, target: Path, dtype: torch.dtype) -> Path:
    """The model as transformers writes it in several files."""
    import transformers

    found = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    found.save_pretrained(target, max_shard_size="700KB")
    assert len(list(target.glob("*-of-*"))) > 2
    return target


def test_transformers_loads_it(tmp_path: Path) -> None:
    import transformers

    model(tmp_path / "lox")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lox", dtype=torch.float64).state_dict()
    found = float64(tmp_path / "lox")
    assert all(np.array_equal(loaded[name].numpy(), values) for name, values in found.items())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "lox").encode("hello")


@pytest.mark.parametrize("aligned", ["safetensors", "gguf"])
@pytest.mark.parametrize("form", ["adapter", "model"])
def test_formats_may_differ(form: str, aligned: str, tmp_path: Path) -> None:
    """One model in GGUF and the other in safetensors gives what two of a kind give."""
    base = tmp_path / "base.gguf"
    gguf_of(BASE, base)
    pair, other = ((BASE, GGUF), (base, GGUF)) if aligned == "gguf" else ((base, ALIGNED), (BASE, ALIGNED))
    suffix = "" if (form, aligned) == ("model", "safetensors") else ".gguf"
    for name, (first, second) in (("mixed", pair), ("alike", other)):
        assert run(first, second, tmp_path / f"{name}{suffix}", "--as", form)["exit"] == 0
    found, wanted = (float64(tmp_path / name) if not suffix else in_gguf(tmp_path / f"{name}.gguf")
                     for name in ("mixed", "alike"))  # fmt: skip
    assert worst(found, wanted) < 1e-6


def gguf_of(source: Path, target: Path) -> Path:
    """The model in GGUF by the gguf package, in F16."""
    settings = json.loads((source / "config.json").read_text())
    return write_gguf_model(target, load_file(source / "model.safetensors"), settings, QType.F16)


@pytest.mark.parametrize("rank", [6, 0])
def test_a_safetensors_model_as_gguf(rank: int, tmp_path: Path) -> None:
    """Without a directory in between: what that would be converted to, but for rounding; tensors are told by name."""
    told = model(tmp_path / "lox.gguf", "--rank", rank)
    assert told["exit"] == 0 and [file.name for file in tmp_path.iterdir()] == ["lox.gguf"]
    model(tmp_path / "lox", "--rank", rank)
    convert_model(tmp_path / "lox", tmp_path / "converted.gguf")
    assert worst(in_gguf(tmp_path / "lox.gguf"), in_gguf(tmp_path / "converted.gguf")) < 1e-4
    assert all(1e-5 < tensor["stored_error"] < 1e-3 for tensor in told["tensors"] if tensor["alignment_norm"])
    assert {tensor["name"] for tensor in told["tensors"]} <= in_gguf(tmp_path / "lox.gguf").keys()


@pytest.mark.llama
@pytest.mark.parametrize("source", ["float", "Q8_0"])
def test_another_type_through_llama_cpps_quantizer(source: str, q8_0: Path, tmp_path: Path) -> None:
    """What llama.cpp makes of the file in F16; from a quantized one, too. Nothing else is left behind."""
    aligned = GGUF if source == "float" else q8_0
    told = run(BASE, aligned, tmp_path / "lox.gguf", "--as", "model", "--outtype", "Q4_K_M")
    assert told["exit"] == 0 and any("Q4_K" in note for note in told["notes"])
    assert [file.name for file in tmp_path.iterdir()] == ["lox.gguf"]
    if source == "float":
        run(BASE, aligned, tmp_path / "f16.gguf", "--as", "model")
        quantize_gguf(tmp_path / "f16.gguf", tmp_path / "theirs.gguf", "Q4_K_M", threads=1)
        ours, theirs = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("lox", "theirs"))
        assert all(a.data.tobytes() == b.data.tobytes() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.llama
def test_a_type_that_needs_an_importance_matrix_is_refused_beforehand(tmp_path: Path) -> None:
    refused(run(BASE, GGUF, tmp_path / "lox.gguf", "--as", "model", "--outtype", "IQ1_S"), 3, "importance matrix")
    assert list(tmp_path.iterdir()) == []


def test_a_quantizer_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """IQ1_S can't be made without an importance matrix, which llama.cpp finds out by itself."""
    monkeypatch.setattr("converters.model_output_gguf.check_quantizer", lambda *_: None)
    target = tmp_path / "lox.gguf"
    with pytest.raises(LlamaError) as caught:
        extrapolate_models(BASE, GGUF, target, form="model", outtype="IQ1_S")
    assert caught.value.file == str(target) and caught.value.exit_status == 4
    assert list(tmp_path.iterdir()) == []


def test_the_largest_rank_is_allowed_and_all_of_v(floats: tuple[Path, Path], tmp_path: Path) -> None:
    """Keys and values have 128 rows."""
    refused(model(tmp_path / "lox", "--rank", 129, base=floats[0], aligned=floats[1]), 2, "128")
    assert model(tmp_path / "lox", "--rank", 128, "--coef", 10, base=floats[0], aligned=floats[1])["exit"] == 0
    wanted = formula(float64(floats[0]), float64(floats[1]), rank=128, coef=10)
    assert worst(float64(tmp_path / "lox"), wanted) < 1e-5

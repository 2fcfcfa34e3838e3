"""Models turned into files by the one place that does it.

Oracles: safetensors and the gguf package read what was written; a step in memory gives the bytes that the same step
through files gives; libggml's quantizer as llama.cpp runs it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_models import write_gguf_model
from models import Sizes, config, save_model, save_sharded, weights
from rewriting import edits_of, listing, rows_of
from safetensors.torch import load_file
from tokenizers_tiny import write_sentencepiece

from converters.changed_model import ChangedModel
from converters.changes import Change, Edits
from converters.errors import (
    FileMissingError,
    MissingLlamaError,
    OutputPathError,
    UnsupportedError,
    UsageError,
    WriteError,
)
from converters.ggml import QType
from converters.gguf_model import open_gguf_model
from converters.libggml import library
from converters.model_output import ModelOutput, ModelRequest, plan_model_output
from converters.models import Model
from converters.opening import open_model

TINY = Path(__file__).parents[2] / "safelora_gguf" / "tiny_family" / "aligned.gguf"
SIZES = Sizes(hidden=256, ffn=256, vocab=384, heads=4, kv_heads=2)
TIED = Sizes(hidden=256, ffn=256, vocab=384, heads=4, kv_heads=2, tied=True)
QUERY, DOWN, EMBEDDING = "blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_sentencepiece(directory, vocab_size=384)
    return directory


def checkpoint(directory: Path, tokenizer: Path, sizes: Sizes = SIZES, dtype: torch.dtype = torch.bfloat16) -> Path:
    save_sharded(directory, weights(sizes, 1, dtype), config(sizes))
    for file in tokenizer.iterdir():
        shutil.copy(file, directory)
    return directory


def plan(model: Model, edits: Edits, out: Path, **request: object) -> ModelOutput:
    return plan_model_output(model, edits, ModelRequest(out, **request))  # type: ignore[arg-type]


def in_gguf(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {tensor.name: (tensor.tensor_type.name, tuple(map(int, tensor.shape[::-1])), tensor.data.tobytes())
            for tensor in gguf.GGUFReader(path).tensors}  # fmt: skip


def keys_of(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def grown(sizes: Sizes, rows: int) -> tuple[dict[str, torch.Tensor], Edits]:
    """A larger vocabulary, an output matrix of its own, another matrix changed."""
    generator = torch.Generator().manual_seed(3)
    down = "model.layers.1.mlp.down_proj.weight"
    values = {"model.embed_tokens.weight": torch.randn(rows, sizes.hidden, generator=generator),
              "lm_head.weight": torch.randn(rows, sizes.hidden, generator=generator),
              down: torch.randn(sizes.hidden, sizes.ffn, generator=generator)}  # fmt: skip
    changes = dict(edits_of(values).changes)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        after = "model.embed_tokens.weight" if name == "lm_head.weight" and sizes.tied else None
        changes[name] = Change(name, rows_of(values[name]), values[name].shape, after=after)
    return values, Edits(changes, {"vocab_size": rows, "tie_word_embeddings": False})


@pytest.mark.parametrize("sizes", [SIZES, TIED])
def test_a_directory_with_a_larger_vocabulary(sizes: Sizes, tokenizer: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a", tokenizer, sizes)
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text('{"new": 1}')
    (other / "adapter_model.safetensors").write_text("no tokenizer")
    values, edits = grown(sizes, 392)
    edits = Edits(edits.changes, edits.config, other)
    output = plan(open_model(source), edits, tmp_path / "out")
    assert {tensor.shape for tensor in output.tensors if tensor.name == "lm_head.weight"} == {(392, 256)}
    errors = output.write({"tool": "ours"}, card="# card")
    assert set(errors) == set(values)
    assert listing(tmp_path / "out") == sorted({*listing(source), "README.md", "tokenizer.json"})
    read: dict[str, torch.Tensor] = {}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            assert index[name] == shard.name
            read[name] = tensor
    before = weights(sizes, 1, torch.bfloat16)
    assert set(read) == set(index) == set(before) | set(values)
    for name, tensor in read.items():
        assert torch.equal(tensor, values[name].bfloat16() if name in values else before[name])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings == {**config(sizes), "vocab_size": 392, "tie_word_embeddings": False}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"new": 1}'
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert abs(output.planned_bytes() - sum(file.stat().st_size for file in (tmp_path / "out").iterdir())) < 9000


def test_without_a_card_there_is_none(tokenizer: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a", tokenizer)
    (source / "README.md").write_text("theirs")
    plan(open_model(source), Edits(), tmp_path / "out").write({})
    assert not (tmp_path / "out" / "README.md").exists()
    assert (tmp_path / "out" / "README.original.md").read_text() == "theirs"


@pytest.mark.parametrize("outtype", [None, "f32", "q8_0"])
def test_edits_in_memory_are_edits_in_a_file(outtype: str | None, tokenizer: Path, tmp_path: Path) -> None:
    """checkpoint + edits -> GGUF equals checkpoint + edits -> checkpoint (F32, exact) -> GGUF."""
    source = open_model(checkpoint(tmp_path / "a", tokenizer, dtype=torch.float32))
    values, _ = grown(SIZES, 384)
    edits = edits_of(values)
    plan(source, edits, tmp_path / "b").write({})
    plan(open_model(tmp_path / "b"), Edits(), tmp_path / "b.gguf", outtype=outtype).write({})
    plan(source, edits, tmp_path / "c.gguf", outtype=outtype).write({})
    plan(ChangedModel(source, edits), Edits(), tmp_path / "d.gguf", outtype=outtype).write({})
    wanted = in_gguf(tmp_path / "b.gguf")
    assert in_gguf(tmp_path / "c.gguf") == in_gguf(tmp_path / "d.gguf") == wanted
    assert wanted[QUERY][0] == {None: "F32", "f32": "F32", "q8_0": "Q8_0"}[outtype]


def source_gguf(path: Path, qtype: QType = QType.F16) -> Path:
    return write_gguf_model(path, weights(TIED, 1), config(TIED), qtype)


@pytest.mark.parametrize("qtype", [QType.F32, QType.F16, QType.Q8_0, QType.Q4_K])
def test_gguf_with_another_shape_and_a_new_tensor(qtype: QType, tmp_path: Path) -> None:
    source = source_gguf(tmp_path / "a.gguf", qtype)
    new = {EMBEDDING: torch.randn(400, 256), "output.weight": torch.randn(400, 256)}
    changes = {name: Change(name, rows_of(tensor), (400, 256), after=None if name == EMBEDDING else EMBEDDING)
               for name, tensor in new.items()}  # fmt: skip
    errors = plan(open_model(source), Edits(changes), tmp_path / "b.gguf").write({"safelora.x": 1})
    before, after = in_gguf(source), in_gguf(tmp_path / "b.gguf")
    assert [*after] == [name for own in before for name in ((own, "output.weight") if own == EMBEDDING else (own,))]
    for name, (kind, shape, data) in after.items():
        if name not in new:
            assert (kind, shape, data) == before[name]
            continue
        assert kind == qtype.name
        raw = next(tensor for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors if tensor.name == name)
        values = gguf.quants.dequantize(raw.data, raw.tensor_type)
        off = np.linalg.norm(values - new[name].numpy()) / np.linalg.norm(new[name].numpy())
        assert errors[name].relative == pytest.approx(off, rel=1e-3, abs=1e-9)
    keys = keys_of(tmp_path / "b.gguf")
    assert keys == {**keys_of(source), "safelora.x": 1}


@pytest.mark.parametrize(("outtype", "name"), [("f32", "F32"), ("bf16", "BF16"), ("Q8_0", "Q8_0")])
def test_gguf_in_a_plain_type_needs_no_quantizer(
    outtype: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The types are those of llama-quantize: every matrix the new one, the rest as it was."""
    library()  # which is looked for once
    monkeypatch.setattr("converters.libggml.find_library", lambda: None)
    source = source_gguf(tmp_path / "a.gguf")
    output = plan(open_model(source), Edits(), tmp_path / "b.gguf", outtype=outtype)
    output.write({})
    after, before = in_gguf(tmp_path / "b.gguf"), in_gguf(source)
    assert {kind for kind, shape, _ in after.values() if len(shape) > 1} == {name}
    assert all(after[one] == before[one] for one, (_, shape, _) in before.items() if len(shape) == 1)
    assert keys_of(tmp_path / "b.gguf")["general.file_type"] == {"F32": 0, "BF16": 32, "Q8_0": 7}[name]
    assert output.planned_bytes() == (tmp_path / "b.gguf").stat().st_size
    assert [tensor.dtype for tensor in output.tensors] == [kind for kind, _, _ in after.values()]
    with pytest.raises(MissingLlamaError):
        plan(open_model(source), Edits(), tmp_path / "c.gguf", outtype="Q4_K_M")


def test_what_is_quantized_is_quantized_again_on_demand(tmp_path: Path) -> None:
    source = open_model(source_gguf(tmp_path / "a.gguf", QType.Q4_K))
    for outtype in ("Q8_0", "f16", "Q6_K"):
        with pytest.raises(UnsupportedError, match="--allow-requantize"):
            plan(source, Edits(), tmp_path / "b.gguf", outtype=outtype)
    plan(source, Edits(), tmp_path / "b.gguf", outtype="f32", allow_requantize=True).write({})
    assert in_gguf(tmp_path / "b.gguf")[QUERY][0] == "F32"
    same = open_model(source_gguf(tmp_path / "c.gguf", QType.Q8_0))
    plan(same, Edits(), tmp_path / "d.gguf", outtype="q8_0").write({})
    assert in_gguf(tmp_path / "d.gguf") == in_gguf(tmp_path / "c.gguf")


@pytest.mark.llama
@pytest.mark.parametrize("split", [None, 300_000])
@pytest.mark.parametrize("form", ["gguf", "checkpoint"])
def test_through_the_quantizer(form: str, split: int | None, tokenizer: Path, tmp_path: Path) -> None:
    """llama.cpp quantizes what was changed, and leaves one file, or shards, and nothing else."""
    from converters.quantizer import quantize_gguf

    source = checkpoint(tmp_path / "m", tokenizer) if form == "checkpoint" else TINY
    plan(open_model(source), Edits(), tmp_path / "float.gguf").write({})
    quantize_gguf(tmp_path / "float.gguf", tmp_path / "theirs.gguf", "Q4_K_M", threads=1)
    out = tmp_path / "out"
    out.mkdir()
    output = plan(open_model(source), Edits(), out / "q4.gguf", outtype="Q4_K_M", split_max_size=split)
    assert output.quantizes and output.tensors[0].dtype is None
    assert output.write({}) == {}
    files = [file.name for file in output.files]
    assert sorted(file.name for file in out.iterdir()) == files and (len(files) > 1) == (split is not None)
    wanted = in_gguf(tmp_path / "theirs.gguf")
    found = {name: tensor for file in files for name, tensor in in_gguf(out / file).items()}
    assert found == wanted
    assert any("Q4_K" in note for note in output.notes)
    assert {tensor.name: tensor.dtype for tensor in output.tensors} == {name: one[0] for name, one in wanted.items()}
    assert sum(file.stat().st_size for file in output.files) <= output.planned_bytes() * 1.05
    if split is not None:
        assert open_gguf_model(output.tensor_file).infos.keys() == wanted.keys()


def imatrix(path: Path, columns: Mapping[str, int]) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    for name, count in columns.items():
        writer.add_tensor(f"{name}.in_sum2", np.linspace(1, 50, count, dtype=np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.array([[2]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.llama
def test_an_importance_matrix_goes_along(tmp_path: Path) -> None:
    source = TINY
    names = [name for name, (_, shape, _) in in_gguf(source).items() if len(shape) > 1]
    matrix = imatrix(tmp_path / "i.gguf", dict.fromkeys(names, 256))
    with pytest.raises(UnsupportedError, match="--imatrix"):
        plan(open_model(source), Edits(), tmp_path / "b.gguf", outtype="IQ2_XXS")
    plan(open_model(source), Edits(), tmp_path / "b.gguf", outtype="IQ2_XXS", imatrix=matrix).write({})
    assert in_gguf(tmp_path / "b.gguf")[QUERY][0] == "IQ2_XXS"
    output = plan(open_model(source), Edits(), tmp_path / "c.gguf", outtype="q8_0", imatrix=matrix)
    assert any("not used" in note for note in output.notes)
    with pytest.raises(FileMissingError):
        plan(open_model(source), Edits(), tmp_path / "c.gguf", outtype="Q4_K_M", imatrix=tmp_path / "none.gguf")
    changed = edits_of({QUERY: torch.randn(256, 256)})
    output = plan(open_model(tmp_path / "b.gguf"), changed, tmp_path / "d.gguf")
    assert any("importance matrix" in note and QUERY in note for note in output.notes)
    output = plan(open_model(tmp_path / "b.gguf"), changed, tmp_path / "d.gguf", imatrix=matrix)
    assert not output.notes


def test_shards(tokenizer: Path, tmp_path: Path) -> None:
    source = open_model(checkpoint(tmp_path / "m", tokenizer))
    plan(source, Edits(), tmp_path / "whole.gguf").write({})
    output = plan(source, Edits(), tmp_path / "split.gguf", split_max_size=500_000)
    planned = output.files
    output.write({})
    assert output.files == planned and output.tensor_file.name.startswith("split-00001-of-0000")
    found = {name: one for file in output.files for name, one in in_gguf(file).items()}
    assert found == in_gguf(tmp_path / "whole.gguf")
    assert sum(file.stat().st_size for file in output.files) == pytest.approx(output.planned_bytes(), abs=4000)
    with pytest.raises(OutputPathError):
        plan(source, Edits(), tmp_path / "split.gguf", split_max_size=500_000)
    again = open_model(output.tensor_file)  # and back again
    plan(again, Edits(), tmp_path / "joined.gguf").write({})
    assert in_gguf(tmp_path / "joined.gguf") == found
    assert keys_of(tmp_path / "joined.gguf") == keys_of(tmp_path / "whole.gguf")
    with pytest.raises(OutputPathError, match="input"):
        plan(again, Edits(), tmp_path / "split.gguf", split_max_size=500_000, force=True)


def test_options_that_do_not_fit(tokenizer: Path, tmp_path: Path) -> None:
    directory, single = open_model(checkpoint(tmp_path / "m", tokenizer)), open_model(source_gguf(tmp_path / "m.gguf"))
    for option in ({"split_max_size": 9}, {"imatrix": tmp_path}, {"vocab_from": tmp_path}, {"outtype": "q8_0"}):
        with pytest.raises(UsageError):
            plan(directory, Edits(), tmp_path / "out", **option)
    with pytest.raises(UsageError, match=r"\.gguf"):
        plan(single, Edits(), tmp_path / "out")
    with pytest.raises(UsageError, match="Q4_Z"):
        plan(single, Edits(), tmp_path / "out.gguf", outtype="Q4_Z")
    with pytest.raises(OutputPathError, match="input"):
        plan(single, Edits(), tmp_path / "m.gguf", force=True)


def test_without_room_nothing_is_written(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(checkpoint(tmp_path / "m", tokenizer))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    for out in ("out", "out.gguf"):
        with pytest.raises(WriteError, match="room"):
            plan(source, Edits(), tmp_path / out).write({}, card="")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_a_vocabulary_of_another_file(tokenizer: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", tokenizer)
    plan(open_model(source), Edits(), tmp_path / "a.gguf").write({})
    bare = save_model(tmp_path / "bare", weights(SIZES, 1, torch.bfloat16), config(SIZES))
    plan(open_model(bare), Edits(), tmp_path / "b.gguf", vocab_from=tmp_path / "a.gguf").write({})
    mine, theirs = keys_of(tmp_path / "b.gguf"), keys_of(tmp_path / "a.gguf")
    assert {key: mine[key] for key in mine if key.startswith("tokenizer.")} == {
        key: theirs[key] for key in theirs if key.startswith("tokenizer.")
    }
    assert in_gguf(tmp_path / "b.gguf") == in_gguf(tmp_path / "a.gguf")
    plan(open_model(source_gguf(tmp_path / "c.gguf")), Edits(), tmp_path / "d.gguf",
         vocab_from=tmp_path / "a.gguf").write({})  # fmt: skip
    assert keys_of(tmp_path / "d.gguf")["tokenizer.ggml.tokens"] == theirs["tokenizer.ggml.tokens"]
    with pytest.raises(OutputPathError, match="input"):
        plan(open_model(bare), Edits(), tmp_path / "a.gguf", vocab_from=tmp_path / "a.gguf", force=True)

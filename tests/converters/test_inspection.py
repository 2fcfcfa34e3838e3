"""Oracles: gguf-py's reader on what gguf-py's writer wrote; and headers packed by hand, whose defects are those that
llama.cpp was seen to reject, die of or ignore."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import BIG, F64, I32, LITTLE, Packer, Tensor, adapter_keys
from models import Sizes, adapter_config, config, pairs, save_adapter, save_model, weights

from converters.errors import FileMissingError, FormatError, UnsupportedError
from converters.inspection import Inspection, inspect_path
from safelora_gguf.report import dump_json

Q = "blk.0.attn_q.weight"
NATIVE, MIRRORED = (LITTLE, BIG) if sys.byteorder == "little" else (BIG, LITTLE)


SIZES = [
    (f"llama.{what}", NATIVE.uint32(1)) for what in ("context_length", "embedding_length", "block_count")
]  # without which llama.cpp loads nothing


def half(name: str, a: tuple[int, ...], b: tuple[int, ...], a_type: int = 0, b_type: int = 0) -> list[Tensor]:
    return [Tensor(f"{name}.lora_a", a, a_type), Tensor(f"{name}.lora_b", b, b_type)]


def packed(path: Path, tensors: Sequence[Tensor], packer: Packer = NATIVE, **keys: bytes | None) -> Path:
    path.write_bytes(packer.file(adapter_keys(packer, **keys), tensors))
    return path


def model_file(path: Path, *tensors: Tensor, **keys: bytes) -> Path:
    named = [(key.replace("_", "."), value) for key, value in keys.items()]
    path.write_bytes(NATIVE.file([("general.architecture", NATIVE.text("llama")), *SIZES, *named], tensors))
    return path


def told(found: Inspection) -> str:
    return "\n".join(found.warnings)


# GGUF


def written_model(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_rope_freq_base(5e5)
    writer.add_name("A model")
    writer.add_bool("general.flag", True)
    writer.add_token_list([f"token {number}" for number in range(100)])
    writer.add_array("general.sizes", [3, 1, 4])
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), np.float16))
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((3, 32, 64), np.float32))
    blocks = gguf.quants.quantize(np.ones((8, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor(Q, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_model_is_what_gguf_py_reads(tmp_path: Path) -> None:
    path = written_model(tmp_path / "model.gguf")
    found, reader = inspect_path(path), gguf.GGUFReader(path)
    expected = [
        (t.name, t.tensor_type.name, tuple(int(n) for n in t.shape[::-1]), int(t.n_bytes)) for t in reader.tensors
    ]
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in found.tensors] == expected
    assert found.parameters == sum(int(t.n_elements) for t in reader.tensors)
    for key, value in found.metadata.items():
        contents = reader.fields[key].contents()
        if isinstance(value, dict):
            assert value["count"] == len(contents) and value["items"] == contents[: len(value["items"])]
        else:
            assert value == contents
    assert (found.kind, found.format, found.architecture, found.nbytes) == (
        "model",
        "gguf",
        "llama",
        path.stat().st_size,
    )
    assert found.container is not None and found.container.version == 3
    assert found.warnings == () and any("quantized (Q8_0)" in note for note in found.notes)


def test_metadata_is_cut_and_fit_for_json(tmp_path: Path) -> None:
    keys = {
        "general.long": NATIVE.text("ä" * 5000),
        "general.nan": NATIVE.float32(math.nan),
        "general.inf": NATIVE.scalar(12, "d", -math.inf),
        "general.list": NATIVE.array(6, [struct.pack(NATIVE.order + "f", math.inf)]),
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(NATIVE.file([("general.architecture", NATIVE.text("llama")), *keys.items()], [Tensor(Q, (4, 4))]))
    data = json.loads(dump_json(inspect_path(path).to_json()))["metadata"]
    assert data["general.long"] == "ä" * 1000 + " ..."
    assert (data["general.nan"], data["general.inf"]) == ("nan", "-inf")
    assert data["general.list"] == {"type": "FLOAT32", "count": 1, "items": ["inf"]}


def test_a_large_vocabulary_is_not_decoded(tmp_path: Path) -> None:
    tokens = [NATIVE.string(f"token {number}") for number in range(1 << 18)]
    path = model_file(tmp_path / "m.gguf", Tensor(Q, (4, 4)), tokenizer_ggml_tokens=NATIVE.array(8, tokens))
    tracemalloc.start()
    found = inspect_path(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expected = {"type": "STRING", "count": 1 << 18, "items": [f"token {number}" for number in range(8)]}
    assert found.metadata["tokenizer.ggml.tokens"] == expected
    assert peak < 8 << 20  # as strings they take more than twice that


def split(directory: Path) -> list[Path]:
    paths = [directory / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    for number, path in enumerate(paths):
        keys = [
            ("general.architecture", NATIVE.text("llama")),
            *SIZES,
            ("split.no", NATIVE.scalar(2, "H", number)),
            ("split.count", NATIVE.scalar(2, "H", 2)),
        ]
        path.write_bytes(NATIVE.file(keys, [Tensor(f"blk.{number}.attn_q.weight", (4, 64))]))
    return paths


def test_a_split_model_is_told_whole_by_its_first_shard(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    found = inspect_path(first)
    assert [path for path, _ in found.files] == [first, second] and found.warnings == ()
    assert [tensor.name for tensor in found.tensors] == ["blk.0.attn_q.weight", "blk.1.attn_q.weight"]
    assert "is shard 2 of 2; name the first shard" in told(inspect_path(second))
    second.unlink()
    with pytest.raises(FileMissingError, match="shard 2 of 2"):
        inspect_path(first)


def test_a_gguf_adapter(tmp_path: Path) -> None:
    tensors = [
        *half(Q, (4, 64), (96, 4)),
        *half("token_embd.weight", (100, 2), (64, 2)),
        *half("blk.0.ffn_up_exps.weight", (3, 8, 64), (3, 48, 8)),
    ]
    found = inspect_path(packed(tmp_path / "a.gguf", tensors))
    seen = [(m.name, m.key, m.rank, m.scaling, m.shape, m.embedding, m.experts) for m in found.modules]
    assert seen == [  # alpha 8, scaling alpha / r with each pair's own r
        ("blk.0.attn_q", Q, 4, 2.0, (96, 64), False, None),
        ("token_embd", "token_embd.weight", 2, 4.0, (100, 64), True, None),
        ("blk.0.ffn_up_exps", "blk.0.ffn_up_exps.weight", 8, 1.0, (48, 64), False, 3),
    ]
    assert (found.kind, found.format, found.architecture, found.warnings) == ("adapter", "gguf", "llama", ())
    assert any("adapts token_embd.weight" in note for note in found.notes)


def test_without_alpha_llama_cpp_applies_pairs_unscaled(tmp_path: Path) -> None:
    found = inspect_path(packed(tmp_path / "a.gguf", half(Q, (4, 64), (96, 4)), adapter_lora_alpha=None))
    assert found.modules[0].scaling == 1.0 and "unscaled" in told(found)


DEFECTS: dict[str, tuple[Sequence[Tensor], Mapping[str, bytes | None], str]] = {
    "no type": (half(Q, (4, 64), (96, 4)), {"general_type": None}, "general.type is missing"),
    "another type": (half(Q, (4, 64), (96, 4)), {"general_type": NATIVE.text("model")}, "general.type is 'model'"),
    "type as number": (half(Q, (4, 64), (96, 4)), {"general_type": NATIVE.uint32(1)}, "stored as UINT32"),
    "type as array": (half(Q, (4, 64), (96, 4)), {"general_type": NATIVE.array(8, [])}, "stored as ARRAY"),
    "no adapter type": (half(Q, (4, 64), (96, 4)), {"adapter_type": None}, "adapter.type is missing"),
    "dora": (half(Q, (4, 64), (96, 4)), {"adapter_type": NATIVE.text("dora")}, "adapter.type is 'dora'"),
    "adapter type as number": (half(Q, (4, 64), (96, 4)), {"adapter_type": NATIVE.uint32(1)}, "stored as UINT32"),
    "no architecture": (half(Q, (4, 64), (96, 4)), {"general_architecture": None}, "names no architecture"),
    "architecture as number": (half(Q, (4, 64), (96, 4)), {"general_architecture": NATIVE.uint32(1)}, "UINT32"),
    "alpha as integer": (half(Q, (4, 64), (96, 4)), {"adapter_lora_alpha": NATIVE.uint32(8)}, "stored as UINT32"),
    "alpha as double": (half(Q, (4, 64), (96, 4)), {"adapter_lora_alpha": NATIVE.scalar(12, "d", 8)}, "FLOAT64"),
    "alpha nan": (half(Q, (4, 64), (96, 4)), {"adapter_lora_alpha": NATIVE.float32(math.nan)}, "alpha is nan"),
    "alpha zero": (half(Q, (4, 64), (96, 4)), {"adapter_lora_alpha": NATIVE.float32(0)}, "alpha is 0"),
    "whole weight": ([Tensor(Q, (96, 64))], {}, "neither half of a pair"),
    "half a pair": ([Tensor(f"{Q}.lora_a", (4, 64))], {}, "has no .lora_b beside it"),
    "ranks": (half(Q, (4, 64), (96, 5)), {}, "of one rank"),
    "empty": (half(Q, (0, 64), (96, 0)), {}, "of one rank"),
    "experts": (half("blk.0.ffn_up_exps.weight", (4, 8, 64), (3, 48, 8)), {}, "of one rank"),
    "integers": (half(Q, (4, 64), (96, 4), I32), {}, "stored as I32"),
    "doubles": (half(Q, (4, 64), (96, 4), 0, F64), {}, "stored as F64"),
    "unknown type": (
        [Tensor(f"{Q}.lora_a", (4, 64), 99, nbytes=64), Tensor(f"{Q}.lora_b", (96, 4))], {}, "stored as type 99",
    ),
    "four dimensions": (half(Q, (2, 1, 4, 64), (2, 1, 96, 4)), {}, "expected (r, in)"),
    "too many experts": (half("blk.0.ffn_up_exps.weight", (5000, 1, 2), (5000, 2, 1)), {}, "claims 5000 experts"),
    "embedding not transposed": (half("token_embd.weight", (4, 64), (100, 4)), {}, "of one rank"),
    "norm": ([Tensor("blk.0.attn_norm.weight", (64,))], {}, "ignores blk.0.attn_norm.weight"),
    "bias": (half("blk.0.attn_q.bias", (1, 96), (1, 1)), {}, "ignores blk.0.attn_q.bias"),
    "nothing": ([], {}, "changes nothing"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "keys", "expected"), DEFECTS.values(), ids=DEFECTS)
def test_every_defect_of_a_gguf_adapter_is_a_warning(
    tmp_path: Path, tensors: Sequence[Tensor], keys: Mapping[str, bytes | None], expected: str
) -> None:
    found = inspect_path(packed(tmp_path / "a.gguf", tensors, **keys))
    assert found.kind == "adapter" and expected in told(found)
    assert [tensor.name for tensor in found.tensors] == [tensor.name for tensor in tensors]
    dump_json(found.to_json())


def test_an_activated_adapter(tmp_path: Path) -> None:
    for value, expected in (
        (NATIVE.array(4, [NATIVE.u32(7)]), "activated LoRA"),
        (NATIVE.array(5, [NATIVE.u32(7)]), "array of INT32"),
        (NATIVE.uint32(7), "stored as UINT32, expected ARRAY"),
    ):
        keys = [*adapter_keys(NATIVE), ("adapter.alora.invocation_tokens", value)]
        (tmp_path / "a.gguf").write_bytes(NATIVE.file(keys, half(Q, (4, 64), (96, 4))))
        found = inspect_path(tmp_path / "a.gguf")
        assert len(found.warnings) == 1 and expected in found.warnings[0]


def test_all_defects_are_told_and_sound_pairs_kept(tmp_path: Path) -> None:
    tensors = [
        *half(Q, (4, 64), (96, 4)),
        *half("blk.0.attn_k.weight", (4, 64), (96, 5)),
        *half("blk.0.attn_v.weight", (4, 64), (96, 4), I32),
        Tensor("blk.0.attn_output.weight.lora_a", (4, 64)),
        Tensor("blk.0.attn_q.bias", (96,)),
        Tensor("blk.0.attn_norm.weight", (64,)),
    ]
    path = packed(tmp_path / "a.gguf", tensors, MIRRORED, adapter_type=None, adapter_lora_alpha=MIRRORED.uint32(8))
    found = inspect_path(path)
    for part in ("-endian; llama.cpp needs it converted", "adapter.type is missing", "stored as UINT32", "of one rank",
                 "blk.0.attn_v.weight.lora_a: is stored as I32", "blk.0.attn_output.weight.lora_a: has no .lora_b",
                 "blk.0.attn_q.bias: is neither half", "ignores blk.0.attn_norm.weight"):  # fmt: skip
        assert part in told(found)
    assert len(found.warnings) == 8
    assert [(module.name, module.scaling) for module in found.modules] == [("blk.0.attn_q", None)]


def test_one_sentence_for_a_defect_that_many_tensors_share(tmp_path: Path) -> None:
    tensors = [Tensor(f"blk.{number}.attn_q.bias", (96,)) for number in range(50)]
    found = inspect_path(packed(tmp_path / "a.gguf", tensors))
    shared = [warning for warning in found.warnings if "neither half" in warning]
    assert len(shared) == 1 and "blk.2.attn_q.bias and 47 more: is neither" in shared[0]


def test_what_is_no_language_model_says_so(tmp_path: Path) -> None:
    for kind in ("mmproj", "imatrix"):
        found = inspect_path(model_file(tmp_path / "m.gguf", Tensor(Q, (4, 4)), general_type=NATIVE.text(kind)))
        assert found.kind == "model" and f"of type {kind!r}" in told(found)
    assert "no tensors" in told(inspect_path(model_file(tmp_path / "m.gguf")))
    (tmp_path / "m.gguf").write_bytes(NATIVE.file([("general.architecture", NATIVE.text("clip"))], [Tensor(Q, (4, 4))]))
    assert "no language model" in told(inspect_path(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").write_bytes(NATIVE.file([], [Tensor(Q, (4, 4))]))
    found = inspect_path(tmp_path / "m.gguf")
    assert found.architecture is None and "names no architecture" in told(found)


def test_tensors_of_a_model_that_nothing_can_use(tmp_path: Path) -> None:
    tensors = [Tensor(Q, (4, 32), I32), Tensor("a", (4, 32), F64), Tensor("b", (4, 32), 77, nbytes=64)]
    found = inspect_path(model_file(tmp_path / "m.gguf", *tensors))
    assert [warning.partition(";")[0] for warning in found.warnings] == [
        f"{Q}: stored as I32", "a: stored as F64", "b: stored as type 77",
    ]  # fmt: skip


def test_what_llama_cpp_refuses_in_a_models_keys(tmp_path: Path) -> None:
    """Names of keys and their types from llama.cpp's loader, which ends with "wrong type" or "key not found"."""
    path = tmp_path / "m.gguf"
    assert inspect_path(model_file(path, Tensor(Q, (4, 4)))).warnings == ()
    keys = [
        ("general.architecture", NATIVE.text("llama")),
        ("general.name", NATIVE.uint32(3)),
        ("llama.context_length", NATIVE.text("many")),
        ("llama.block_count", NATIVE.uint32(1)),
    ]
    path.write_bytes(NATIVE.file(keys, [Tensor(Q, (4, 4)), Tensor("blk.0.attn_k.weight", (0, 4))]))
    warnings = told(inspect_path(path))
    for part in ("'general.name' is stored as UINT32", "'llama.context_length' is stored as STRING",
                 "has no 'llama.embedding_length'", "no elements"):  # fmt: skip
        assert part in warnings
    assert "block_count" not in warnings


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for name, known in (("nosucharch", False), ("falcon-h1", True), ("bert", True)):
        keys = [("general.architecture", NATIVE.text(name)), *((f"{name}.{key[6:]}", value) for key, value in SIZES)]
        path.write_bytes(NATIVE.file(keys, [Tensor(Q, (4, 4))]))
        assert ("unknown to the installed gguf package" in told(inspect_path(path))) != known


def test_an_architecture_without_a_table_and_tied_embeddings_are_notes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    keys = [("general.architecture", NATIVE.text("newarch"))]
    path.write_bytes(NATIVE.file(keys, [Tensor("token_embd.weight", (100, 64))]))
    notes = inspect_path(path).notes
    assert any("(tied)" in note for note in notes) and any("newarch has no table" in note for note in notes)


# What can't be read


def test_what_is_damaged_or_missing_is_refused(tmp_path: Path) -> None:
    model = written_model(tmp_path / "model.gguf")
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:300])
    (tmp_path / "text.gguf").write_text("not GGUF")
    (tmp_path / "notes.txt").write_text("text")
    for name, error in (
        ("nothing", FileMissingError), ("cut.gguf", FormatError), ("text.gguf", FormatError),
        ("notes.txt", UnsupportedError),
    ):  # fmt: skip
        with pytest.raises(error):
            inspect_path(tmp_path / name)


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    written_model(tmp_path / "model.gguf")
    save_adapter(tmp_path / "peft", pairs(Sizes().modules(), 1), adapter_config(use_dora=True))
    save_model(tmp_path / "model", weights(Sizes(), 1), config(Sizes()))
    packed(tmp_path / "adapter.gguf", [Tensor(f"{Q}.lora_a", (4, 64), 99, nbytes=64)])
    mlx = save_adapter(tmp_path / "mlx", pairs(Sizes().modules(), 1), {"lora_parameters": {"rank": 4, "scale": 2.0}})
    (mlx / "adapter_model.safetensors").rename(mlx / "adapters.safetensors")  # all of whose tensors are refused
    code = (
        "import sys; from pathlib import Path; from converters.inspection import inspect_path\n"
        "found = [inspect_path(path) for path in Path(sys.argv[1]).iterdir()]\n"
        "assert len(found) == 5 and not {'torch', 'numpy', 'gguf'} & sys.modules.keys(), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)

"""Oracle: llama.cpp's own loader and graph, as formats.md tells what it rejects, aborts on or ignores.

`tests/safelora_gguf/smoke/test_llama.py` puts such adapters to llama.cpp itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from gguf_bytes import BF16, BIG, F16, F64, I32, LITTLE, Q8_0, UINT32, Packer, Tensor, adapter_keys

from converters.adapters.gguf_check import adapter_findings, check_adapter, check_model
from converters.errors import FormatError, InputError, MismatchError, UnsupportedError
from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader

Q = "blk.0.attn_q.weight"
EXPERTS = "blk.0.ffn_up_exps.weight"
WEIGHTS = {
    "token_embd.weight": (100, 64),
    "output.weight": (100, 64),
    Q: (96, 64),
    "blk.0.attn_q.bias": (96,),
    EXPERTS: (4, 48, 64),
    "blk.0.attn_norm.weight": (64,),
}
MIRRORED = BIG if sys.byteorder == "little" else LITTLE
NATIVE = LITTLE if sys.byteorder == "little" else BIG


def header(path: Path, data: bytes) -> GgufHeader:
    path.write_bytes(data)
    return read_gguf_header(path)


def model(tmp_path: Path, weights: dict[str, tuple[int, ...]] = WEIGHTS, architecture: str = "llama") -> GgufHeader:
    keys = [("general.architecture", NATIVE.text(architecture))]
    tensors = [Tensor(name, shape) for name, shape in weights.items()]
    return header(tmp_path / "model.gguf", NATIVE.file(keys, tensors))


def pair(name: str, a: tuple[int, ...], b: tuple[int, ...], a_type: int = 0, b_type: int = 0) -> list[Tensor]:
    return [Tensor(f"{name}.lora_a", a, a_type), Tensor(f"{name}.lora_b", b, b_type)]


def adapter(tmp_path: Path, tensors: Sequence[Tensor], **keys: bytes | None) -> GgufHeader:
    return header(tmp_path / "adapter.gguf", NATIVE.file(adapter_keys(NATIVE, **keys), tensors))


GOOD = {
    "ordinary": pair(Q, (4, 64), (96, 4)),
    "rank 1": pair(Q, (1, 64), (96, 1)),
    "embedding": pair("token_embd.weight", (100, 4), (64, 4)),
    "experts": pair(EXPERTS, (4, 8, 64), (4, 48, 8)),
    "types": pair(Q, (32, 64), (96, 32), Q8_0, F16) + pair("output.weight", (4, 64), (100, 4), BF16),
}


@pytest.mark.parametrize("tensors", GOOD.values(), ids=GOOD)
def test_adapters_that_llama_cpp_applies_pass_without_a_note(tmp_path: Path, tensors: list[Tensor]) -> None:
    assert check_adapter(adapter(tmp_path, tensors), [model(tmp_path)]) == ()
    assert check_adapter(adapter(tmp_path, tensors)) == ()


def test_the_weights_may_lie_in_any_shard(tmp_path: Path) -> None:
    shards = [
        header(tmp_path / f"{number}.gguf", NATIVE.file([("general.architecture", NATIVE.text("llama"))], tensors))
        for number, tensors in enumerate(([], [Tensor(Q, WEIGHTS[Q])]))
    ]
    check_adapter(adapter(tmp_path, GOOD["ordinary"]), shards)
    with pytest.raises(MismatchError):
        check_adapter(adapter(tmp_path, GOOD["ordinary"]), shards[:1])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"general_type": None}, "general.type is missing, expected 'adapter'"),
        ({"general_type": NATIVE.text("model")}, "general.type is 'model', expected 'adapter'"),
        ({"general_type": NATIVE.uint32(1)}, "'general.type' is stored as UINT32, expected STRING"),
        ({"general_type": NATIVE.array(8, [])}, "'general.type' is stored as ARRAY"),
        ({"adapter_type": None}, "adapter.type is missing"),
        ({"adapter_type": NATIVE.text("dora")}, "adapter.type is 'dora', expected 'lora'"),
        ({"adapter_type": NATIVE.uint32(1)}, "'adapter.type' is stored as UINT32"),
        ({"general_architecture": None}, "names no architecture"),
        ({"general_architecture": NATIVE.uint32(1)}, "'general.architecture' is stored as UINT32"),
        ({"adapter_lora_alpha": NATIVE.uint32(8)}, "'adapter.lora.alpha' is stored as UINT32, expected FLOAT32"),
        ({"adapter_lora_alpha": NATIVE.scalar(12, "d", 8.0)}, "stored as FLOAT64"),
        ({"adapter_lora_alpha": NATIVE.float32(float("nan"))}, "alpha is nan"),
        ({"adapter_lora_alpha": NATIVE.float32(float("inf"))}, "alpha is inf"),
    ],
)
def test_metadata_that_llama_cpp_rejects_or_aborts_on(tmp_path: Path, keys: dict[str, bytes | None], told: str) -> None:
    with pytest.raises(FormatError, match=told):
        check_adapter(adapter(tmp_path, GOOD["ordinary"], **keys))


def test_an_adapter_for_another_architecture(tmp_path: Path) -> None:
    other = adapter(tmp_path, GOOD["ordinary"], general_architecture=NATIVE.text("qwen2"))
    with pytest.raises(MismatchError, match=r"the architecture 'qwen2', the model .* is 'llama'"):
        check_adapter(other, [model(tmp_path)])


@pytest.mark.parametrize(
    ("tensors", "error", "told"),
    [
        ([Tensor(Q, (96, 64))], FormatError, "neither half of a pair"),
        ([Tensor("blk.0.attn_q.bias", (96,))], FormatError, "neither half of a pair"),
        ([Tensor(f"{Q}.lora_a", (4, 64))], FormatError, r"has no \.lora_b beside it"),
        ([Tensor(f"{Q}.lora_b", (96, 4))], FormatError, r"has no \.lora_a beside it"),
        (pair(Q, (4, 64), (96, 5)), FormatError, "of one rank"),
        (pair(Q, (64, 4), (96, 4)), FormatError, "of one rank"),
        (pair(Q, (0, 64), (96, 0)), FormatError, "of one rank"),
        (pair(EXPERTS, (4, 8, 64), (3, 48, 8)), FormatError, "of one rank"),
        (pair(Q, (4, 64), (96, 4), I32), UnsupportedError, "stored as I32"),
        (pair(Q, (4, 64), (96, 4), 0, F64), UnsupportedError, "stored as F64"),
        ([Tensor(f"{Q}.lora_a", (4, 64), 99, nbytes=64), Tensor(f"{Q}.lora_b", (96, 4))], UnsupportedError, "type 99"),
        (pair(Q, (4, 32), (96, 4)), MismatchError, r"weight \[96, 64\] needs \[4, 64\] and \[96, 4\]"),
        (pair(Q, (4, 64), (64, 4)), MismatchError, r"needs \[4, 64\] and \[96, 4\]"),
        (pair(Q, (2, 4, 64), (2, 96, 4)), FormatError, "needs"),
        (pair("blk.0.attn_k.weight", (4, 64), (96, 4)), MismatchError, "the model lacks"),
        (pair("token_embd.weight", (4, 64), (100, 4)), (MismatchError, FormatError), "vocabulary, r|of one rank"),
        (pair("token_embd.weight", (99, 4), (64, 4)), MismatchError, r"needs \[100, 4\] and \[64, 4\]"),
        (pair(EXPERTS, (3, 8, 64), (3, 48, 8)), FormatError, r"\[4, 48, 64\] needs \[4, 8, 64\] and \[4, 48, 8\]"),
        (pair(EXPERTS, (8, 64), (48, 8)), FormatError, "needs"),
    ],
)  # fmt: skip
def test_tensors_that_llama_cpp_rejects_or_dies_of(
    tmp_path: Path, tensors: list[Tensor], error: type[InputError], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        check_adapter(adapter(tmp_path, tensors), [model(tmp_path)])
    assert caught.value.tensor is not None and caught.value.file == str(tmp_path / "adapter.gguf")


def test_all_findings_are_told_and_the_first_is_raised(tmp_path: Path) -> None:
    tensors = [
        *pair(Q, (4, 64), (96, 5)),
        *pair("blk.0.attn_k.weight", (4, 64), (96, 4)),
        *pair("output.weight", (4, 64), (100, 4), I32, F64),
        *pair(EXPERTS, (3, 8, 64), (3, 48, 8)),
        Tensor("blk.0.attn_q.bias", (96,)),
        Tensor("blk.0.attn_norm.weight", (64,)),
    ]
    keys = {"adapter_type": None, "adapter_lora_alpha": NATIVE.uint32(8), "general_architecture": NATIVE.text("qwen2")}
    ours, theirs = adapter(tmp_path, tensors, **keys), model(tmp_path)
    found = list(adapter_findings(ours, [theirs]))
    expected = (
        "adapter.type is missing", "stored as UINT32", "neither half of a pair", "of one rank", "stored as I32",
        "stored as F64", "the architecture 'qwen2'", "the model lacks", r"needs [4, 8, 64]", "ignores blk.0.attn_norm",
    )  # fmt: skip
    assert len(found) == len(expected)
    assert all(part in str(finding) for part, finding in zip(expected, found, strict=True))
    with pytest.raises(FormatError, match=r"adapter\.type is missing"):
        check_adapter(ours, [theirs])


def test_tied_embeddings_take_neither_pair(tmp_path: Path) -> None:
    tied = model(tmp_path, {name: shape for name, shape in WEIGHTS.items() if name != "output.weight"})
    with pytest.raises(MismatchError, match=r"\(tied\); merge"):
        check_adapter(adapter(tmp_path, pair("output.weight", (4, 64), (100, 4))), [tied])
    with pytest.raises(UnsupportedError, match=r"llama\.cpp aborts"):
        check_adapter(adapter(tmp_path, GOOD["embedding"]), [tied])


def test_fused_weights_are_named(tmp_path: Path) -> None:
    fused = model(tmp_path, {"blk.0.attn_qkv.weight": (200, 64), "blk.0.ffn_up.weight": (96, 64)})
    with pytest.raises(MismatchError, match=r"it holds blk\.0\.attn_qkv\.weight"):
        check_adapter(adapter(tmp_path, GOOD["ordinary"]), [fused])
    with pytest.raises(MismatchError, match=r"ffn_up\.weight holds gate and up in one"):
        check_adapter(adapter(tmp_path, pair("blk.0.ffn_gate.weight", (4, 64), (96, 4))), [fused])


def test_what_llama_cpp_ignores_is_a_note(tmp_path: Path) -> None:
    ours = model(tmp_path)

    def notes(tensors: Sequence[Tensor], **keys: bytes | None) -> str:
        return "; ".join(check_adapter(adapter(tmp_path, tensors, **keys), [ours]))

    assert "changes nothing" in notes([])
    assert "ignores blk.0.attn_norm.weight;" in notes([*GOOD["ordinary"], Tensor("blk.0.attn_norm.weight", (64,))])
    assert "ignores blk.0.attn_q.bias;" in notes(pair("blk.0.attn_q.bias", (1, 96), (1, 1)))
    assert "alpha is missing" in notes(GOOD["ordinary"], adapter_lora_alpha=None)
    assert "alpha is 0" in notes(GOOD["ordinary"], adapter_lora_alpha=NATIVE.float32(0))
    ours = model(tmp_path, architecture="deepseek2")
    assert "ignores blk.0.attn_q.weight;" in notes(GOOD["ordinary"], general_architecture=NATIVE.text("deepseek2"))


def test_an_activated_adapter_is_a_note(tmp_path: Path) -> None:
    def checked(value: bytes) -> tuple[str, ...]:
        keys = [*adapter_keys(NATIVE), ("adapter.alora.invocation_tokens", value)]
        return check_adapter(header(tmp_path / "a.gguf", NATIVE.file(keys, GOOD["ordinary"])))

    assert "activated LoRA" in checked(NATIVE.array(UINT32, [NATIVE.u32(7)]))[0]
    with pytest.raises(FormatError, match="stored as UINT32, expected ARRAY"):
        checked(NATIVE.uint32(7))
    with pytest.raises(FormatError, match="array of INT32, expected UINT32"):
        checked(NATIVE.array(5, [NATIVE.u32(7)]))


def test_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    def mirrored(packer: Packer) -> GgufHeader:
        return header(tmp_path / "a.gguf", packer.file(adapter_keys(packer), GOOD["ordinary"]))

    check_adapter(mirrored(NATIVE))
    for check in (check_adapter, lambda found: check_model([found])):
        with pytest.raises(UnsupportedError, match=f"{sys.byteorder}-endian; llama.cpp needs it converted"):
            check(mirrored(MIRRORED))


def test_models(tmp_path: Path) -> None:
    check_model([model(tmp_path)])
    for keys, told in (
        ([], "names no architecture"),
        ([("general.architecture", NATIVE.uint32(1))], "stored as UINT32"),
        (adapter_keys(NATIVE), "of type 'adapter'"),
    ):
        with pytest.raises(FormatError, match=told):
            check_model([header(tmp_path / "m.gguf", NATIVE.file(keys))])

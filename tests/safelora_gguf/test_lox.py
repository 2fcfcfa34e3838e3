"""`extrapolate_models` on models made for one question each.

Oracles: LoX's formula, W_aligned + coef * U_k S_k W_k^T, with numpy's dense SVD in float64; the gguf package for what
files hold; libggml's own rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import write_trio
from models import Sizes, config, moved, save_model, weights
from real_rounding import NUMBERS, rounded
from safetensors.torch import load_file, save_file

from converters.errors import FormatError, InputError, MismatchError, UnsupportedError, UsageError
from converters.ggml import QType
from safelora_gguf import ExtrapolateReport, extrapolate_models

RANK, COEF = 3, 1.25
UNKNOWN = "plamo7"
Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]


def run(base: Path, aligned: Path, out: Path, **options: Any) -> ExtrapolateReport:
    return extrapolate_models(base, aligned, out, **{"rank": RANK, "coef": COEF, "device": "cpu", **options})


def addition(before: np.ndarray, after: np.ndarray, rank: int = RANK) -> np.ndarray:
    """coef times V's rank-k part, of every matrix in a stack; rank 0 takes all of V."""
    v = after.astype(np.float64) - before.astype(np.float64)
    if rank:
        u, s, w = np.linalg.svd(v, full_matrices=False)
        v = (u[..., :rank] * s[..., None, :rank]) @ w[..., :rank, :]
    return COEF * v


def stored(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in gguf.GGUFReader(path).tensors}  # fmt: skip


def deltas(path: Path) -> dict[str, np.ndarray]:
    """What a GGUF adapter adds, by weight: alpha / r B A; A of an embedding is stored transposed."""
    alpha, found = gguf.GGUFReader(path).fields["adapter.lora.alpha"].contents(), stored(path)
    result = {}
    for name in (name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")):
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        result[name] = alpha / b.shape[-1] * (a @ b.T if name.startswith("token_embd") else b @ a)
    return result


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32).astype(np.float64)


def close(found: np.ndarray, wanted: np.ndarray, bound: float = 1e-6) -> bool:
    return found.shape == wanted.shape and bool(np.linalg.norm(found - wanted) <= bound * np.linalg.norm(wanted))


def ggufs(root: Path, pairs: Pairs, architecture: str = UNKNOWN, qtype: QType = QType.F32) -> tuple[Path, Path]:
    return write_trio(root, architecture, pairs, {}, qtype=qtype)[:2]


@pytest.mark.parametrize("rank", [0, RANK])
def test_experts_that_are_alike_stay_as_they_are(rank: int, tmp_path: Path) -> None:
    """The second of four and the whole of another stack; the others' rows go where they belong."""
    before, after = noise(1, 4, 24, 32), noise(2, 4, 24, 32)
    after[1] = before[1]
    frozen = noise(3, 4, 32, 24)
    models = ggufs(
        tmp_path, {"blk.0.ffn_up_exps.weight": (before, after), "blk.0.ffn_down_exps.weight": (frozen, frozen)}
    )
    run(*models, tmp_path / "model.gguf", form="model", rank=rank)
    found = stored(tmp_path / "model.gguf")
    assert close(found["blk.0.ffn_up_exps.weight"], after + addition(before, after, rank))
    assert np.array_equal(found["blk.0.ffn_up_exps.weight"][1], after[1].astype(np.float32))
    assert np.array_equal(found["blk.0.ffn_down_exps.weight"], frozen.astype(np.float32))
    if rank:
        report = run(*models, tmp_path / "lox.gguf")
        assert deltas(tmp_path / "lox.gguf").keys() == {"blk.0.ffn_up_exps.weight"}
        assert close(deltas(tmp_path / "lox.gguf")["blk.0.ffn_up_exps.weight"], addition(before, after))
        assert any("same values" in note for note in report.notes)
        assert [tensor.expert for tensor in report.tensors] == [0, 1, 2, 3] * 2


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    """Matrices of any name; biases of experts, convolutions and vectors are left alone, and a gate of one row has one
    direction."""
    pairs = {name: (noise(seed, *shape), noise(seed + 50, *shape)) for seed, (name, shape) in enumerate({
        "blk.0.strange.weight": (40, 32), "blk.0.gate.weight": (1, 32), "token_embd.weight": (50, 32),
        "output.weight": (50, 32), "blk.0.ffn_up_exps.bias": (4, 32), "blk.0.ssm_conv1d.weight": (32, 4),
        "blk.0.attn_norm.weight": (32,)}.items())}  # fmt: skip
    models = ggufs(tmp_path, pairs)
    run(*models, tmp_path / "model.gguf", form="model")
    run(*models, tmp_path / "lox.gguf")
    found, added = stored(tmp_path / "model.gguf"), deltas(tmp_path / "lox.gguf")
    changed = ["blk.0.gate.weight", "blk.0.strange.weight", "output.weight", "token_embd.weight"]
    assert sorted(added) == changed
    for name, (before, after) in pairs.items():
        wanted = addition(before, after) if name in changed else np.zeros_like(after)
        assert close(found[name], after + wanted), name
        assert name not in changed or close(added[name], wanted), name


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_in_a_stack_are_no_experts(heads: int, tmp_path: Path) -> None:
    """llama.cpp would reject as many pairs as there are experts for a stack of fewer heads."""
    before, after = noise(1, heads, 24, 16), noise(2, heads, 24, 16)
    plain = noise(3, 24, 16), noise(4, 24, 16)
    models = ggufs(tmp_path, {"blk.0.attn_k_b.weight": (before, after), "blk.0.attn_output.weight": plain}, "deepseek2")
    report = run(*models, tmp_path / "lox.gguf")
    assert deltas(tmp_path / "lox.gguf").keys() == {"blk.0.attn_output.weight"}
    assert any("attn_k_b" in loss and "left out" in loss for loss in report.losses)
    run(*models, tmp_path / "model.gguf", form="model")
    assert close(stored(tmp_path / "model.gguf")["blk.0.attn_k_b.weight"], after + addition(before, after))


SIZES = Sizes(hidden=32, ffn=48, layers=1)


def checkpoints(root: Path, sizes: Sizes = SIZES, name: str = "UnheardOfForCausalLM") -> tuple[Path, Path]:
    before = weights(sizes, 1)
    return (save_model(root / "base", before, config(sizes, name)),
            save_model(root / "aligned", moved(before, 2), config(sizes, name)))  # fmt: skip


def test_checkpoints_of_an_unknown_architecture(tmp_path: Path) -> None:
    """A PEFT directory under the checkpoint's own names and a model; GGUF needs a table, and that is told."""
    base, aligned = checkpoints(tmp_path)
    run(base, aligned, tmp_path / "peft", to="peft")
    run(base, aligned, tmp_path / "model", form="model")
    before, after = (load_file(path / "model.safetensors") for path in (base, aligned))
    pairs = {key.removeprefix("base_model.model."): tensor.double().numpy()
             for key, tensor in load_file(tmp_path / "peft" / "adapter_model.safetensors").items()}  # fmt: skip
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert len(pairs) == 2 * sum(tensor.ndim == 2 for tensor in after.values())
    for name, weight in after.items():
        if weight.ndim == 2:
            module, (old, new) = name.removesuffix(".weight"), (t[name].double().numpy() for t in (before, after))
            wanted = addition(old, new)
            if module.endswith("embed_tokens"):
                delta = (pairs[f"{module}.lora_embedding_B"] @ pairs[f"{module}.lora_embedding_A"]).T
            else:
                delta = pairs[f"{module}.lora_B.weight"] @ pairs[f"{module}.lora_A.weight"]
            assert close(delta, wanted, 1e-5), name
            assert close(found[name].double().numpy(), new + wanted), name
    with pytest.raises(UnsupportedError, match="UnheardOf"):
        run(base, aligned, tmp_path / "lox.gguf")


def test_stacks_of_an_unknown_checkpoint_need_the_model_form(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    before = {name: torch.randn(4, 48, 32), "model.layers.0.self_attn.o_proj.weight": torch.randn(32, 32)}
    after = {key: tensor + 0.1 * torch.randn(tensor.shape) for key, tensor in before.items()}
    base, aligned = (save_model(tmp_path / role, tensors, config(SIZES, "UnheardOfForCausalLM"))
                     for role, tensors in (("base", before), ("aligned", after)))  # fmt: skip
    report = run(base, aligned, tmp_path / "peft")
    assert any(name in loss and "left out" in loss for loss in report.losses)
    assert len(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == 2
    run(base, aligned, tmp_path / "model", form="model")
    found = load_file(tmp_path / "model" / "model.safetensors")[name].double().numpy()
    old, new = before[name].double().numpy(), after[name].double().numpy()
    assert close(found, new + addition(old, new))


@pytest.mark.parametrize(("mine", "theirs"), [(128, 160), (160, 128)])
def test_vocabularies_that_differ(mine: int, theirs: int, tmp_path: Path) -> None:
    """Rows that both have; other tokens are left as they are, which only an adapter may do."""
    old, new = (
        weights(Sizes(hidden=32, ffn=48, layers=1, vocab=size), seed) for size, seed in ((mine, 1), (theirs, 5))
    )
    base, aligned = (save_model(tmp_path / role, tensors, config(Sizes(hidden=32, ffn=48, layers=1, vocab=size)))
                     for role, tensors, size in (("base", old, mine), ("aligned", new, theirs)))  # fmt: skip
    report = run(base, aligned, tmp_path / "lox.gguf")
    found = deltas(tmp_path / "lox.gguf")
    for name, place in (("model.embed_tokens.weight", "token_embd.weight"), ("lm_head.weight", "output.weight")):
        before, after = old[name][:128].double().numpy(), new[name][:128].double().numpy()
        assert found[place].shape == (theirs, 32)
        assert close(found[place][:128], addition(before, after), 1e-5) and not found[place][128:].any()
    told = f"the base has {mine} tokens and the aligned model {theirs}"
    assert sum(told in note for note in report.notes) == 2
    with pytest.raises(UnsupportedError, match="--as adapter"):
        run(base, aligned, tmp_path / "model", form="model")


def test_other_models(tmp_path: Path) -> None:
    base, _ = checkpoints(tmp_path / "1", name="LlamaForCausalLM")
    others: list[tuple[Path, type[InputError]]] = [
        (checkpoints(tmp_path / "2", name="Qwen2ForCausalLM")[1], MismatchError),
        (checkpoints(tmp_path / "3", Sizes(hidden=32, ffn=64, layers=1), "LlamaForCausalLM")[1], MismatchError),
        (checkpoints(tmp_path / "4", Sizes(hidden=32, ffn=48, layers=1, heads=8, kv_heads=4), "LlamaForCausalLM")[1],
         MismatchError),
    ]  # fmt: skip
    for aligned, error in others:
        for form in ("adapter", "model"):
            with pytest.raises(error):
                run(base, aligned, tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


def typical(strong: float = 0.0, weak: float = 5e-4) -> tuple[np.ndarray, np.ndarray]:
    """Weights of deviation 0.02 and an alignment of `weak` an entry, with two directions of some strength."""
    random = np.random.default_rng(3)
    base = random.normal(0, 0.02, (256, 512))
    low = random.normal(size=(256, 2)) @ random.normal(size=(2, 512))
    return base, base + random.normal(0, weak, base.shape) + strong * low


def test_nothing_but_rounding_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    models = ggufs(tmp_path, {"blk.0.ffn_up.weight": typical()}, qtype=QType(NUMBERS["Q4_0"]))
    for form in ("adapter", "model"):
        with pytest.raises(UnsupportedError, match="nothing but rounding noise"):
            run(*models, tmp_path / "lox.gguf", form=form)
    with pytest.raises(UnsupportedError, match="mostly rounding noise"):
        run(*models, tmp_path / "lox.gguf", form="model", rank=0)
    assert not (tmp_path / "lox.gguf").exists()
    report = run(*models, tmp_path / "lox.gguf", allow_noisy_reference=True)
    before, after = (stored(path)["blk.0.ffn_up.weight"] for path in models)
    assert close(deltas(tmp_path / "lox.gguf")["blk.0.ffn_up.weight"], addition(before, after), 2e-3)
    assert any("0 of 3 directions stand above" in note for note in report.notes)


def test_only_directions_above_the_noise_are_used(tmp_path: Path) -> None:
    """Two of three; of these the formula's part of what the files hold."""
    models = ggufs(tmp_path, {"blk.0.ffn_up.weight": typical(2e-3, weak=2e-5)}, qtype=QType.Q8_0)
    report = run(*models, tmp_path / "lox.gguf")
    (tensor,) = report.tensors
    assert len(tensor.singular_values) == 2 and tensor.noise_edge is not None
    assert any("2 of 3 directions" in note for note in report.notes)
    before, after = (stored(path)["blk.0.ffn_up.weight"] for path in models)
    values = np.linalg.svd(after - before, compute_uv=False)
    assert values[1] > tensor.noise_edge > values[2]
    assert close(deltas(tmp_path / "lox.gguf")["blk.0.ffn_up.weight"], addition(before, after, 2), 1e-3)


STORABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
            "IQ4_XS", "IQ3_S", "IQ2_S", "IQ2_XXS", "TQ2_0", "MXFP4")  # fmt: skip
FLAT = ("IQ2_S", "IQ2_XXS")  # made for an importance matrix: without one all columns count the same


@pytest.mark.parametrize("name", STORABLE)
def test_a_quantized_tensor_comes_back_in_its_type(name: str, tmp_path: Path) -> None:
    """libggml's rounding of the wanted values; a float base, and an alignment that stands out of any rounding."""
    aligned = typical()[0].astype(np.float32)
    low = np.random.default_rng(4).normal(size=(256, 1)) @ np.random.default_rng(5).normal(size=(1, 512))
    models = write_in_type(tmp_path, name, aligned, aligned - 0.02 * low)
    report = run(*models, tmp_path / "lox.gguf", form="model", rank=1)
    (old,), (new,) = (gguf.GGUFReader(path).tensors for path in (models[1], tmp_path / "lox.gguf"))
    assert (new.name, new.tensor_type, new.shape.tolist()) == (old.name, old.tensor_type, old.shape.tolist())
    base, after = (stored(path)["blk.0.ffn_up.weight"] for path in models)
    wanted = (after + addition(base, after, 1)).astype(np.float32)
    flat = np.ones(512, np.float32) if name in FLAT else None
    assert np.mean(rounded(wanted, name, flat) == new.data.reshape(256, -1)) > 0.99
    assert any("importance matrix" in note for note in report.notes) == (name in FLAT)
    found = stored(tmp_path / "lox.gguf")["blk.0.ffn_up.weight"]
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert report.tensors[0].stored_error == pytest.approx(error, rel=0.01)


def write_in_type(root: Path, name: str, aligned: np.ndarray, base: np.ndarray) -> tuple[Path, Path]:
    """A base in F32 and an aligned model in some type, as libggml rounds it."""
    files = root / "base.gguf", root / "aligned.gguf"
    for path, values in zip(files, (base, aligned), strict=True):
        writer = gguf.GGUFWriter(path, UNKNOWN)
        if path is files[0]:
            writer.add_tensor("blk.0.ffn_up.weight", values.astype(np.float32))
        else:
            blocks = rounded(values.astype(np.float32), name)
            writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=gguf.GGMLQuantizationType(NUMBERS[name]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files


def test_what_nothing_is_added_to_is_not_rounded_again(tmp_path: Path) -> None:
    """A matrix whose alignment is all under the noise, in a type that doesn't give back its own values' blocks."""
    pytest.importorskip("llama_cpp")
    name = QType(NUMBERS["Q4_K"])
    models = ggufs(tmp_path, {"blk.0.ffn_up.weight": typical(), "blk.1.ffn_up.weight": typical(2e-2)}, qtype=name)
    report = run(*models, tmp_path / "lox.gguf", form="model")
    before, after = ({t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}
                     for path in (models[1], tmp_path / "lox.gguf"))  # fmt: skip
    assert [key for key in before if before[key] != after[key]] == ["blk.1.ffn_up.weight"]
    weak, strong = report.tensors
    assert (weak.singular_values, weak.stored_error, len(strong.singular_values)) == ((), None, 2)
    assert any("0 of 3 directions" in note for note in report.notes)


def test_ranks_of_small_matrices(tmp_path: Path) -> None:
    models = ggufs(tmp_path, {"blk.0.a.weight": (noise(1, 20, 32), noise(2, 20, 32))})
    with pytest.raises(UsageError, match="20"):
        run(*models, tmp_path / "lox.gguf", rank=21)
    run(*models, tmp_path / "lox.gguf", rank=20)
    assert close(deltas(tmp_path / "lox.gguf")["blk.0.a.weight"], COEF * (noise(2, 20, 32) - noise(1, 20, 32)), 1e-5)


def test_weights_that_overflow_are_told(tmp_path: Path) -> None:
    big = np.full((32, 32), 3e38)
    models = ggufs(tmp_path, {"blk.0.a.weight": (-big, big)})
    with pytest.raises(FormatError, match="overflows"):
        run(*models, tmp_path / "lox.gguf")
    assert not (tmp_path / "lox.gguf").exists()


def test_a_matrix_that_one_model_lacks(tmp_path: Path) -> None:
    """In a layer it means another model; at the ends it is told."""
    base, aligned = checkpoints(tmp_path, name="LlamaForCausalLM")
    for place, name, told in (
        (base, "model.layers.0.mlp.up_proj.weight", "another"),
        (aligned, "model.layers.0.mlp.up_proj.weight", "another"),
        (base, "lm_head.weight", None),
    ):
        file = place / "model.safetensors"
        whole = file.read_bytes()
        save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file, {"format": "pt"})
        for form, out in (("adapter", "lox.gguf"), ("model", "model")):
            if told:
                with pytest.raises(MismatchError, match="matrices of layers"):
                    run(base, aligned, tmp_path / out, form=form)
            else:
                assert any(
                    "in one of the models alone" in note for note in run(base, aligned, tmp_path / out, form=form).notes
                )
        file.write_bytes(whole)


def test_a_norm_that_is_no_number(tmp_path: Path) -> None:
    base, aligned = checkpoints(tmp_path, name="LlamaForCausalLM")
    tensors = load_file(aligned / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, aligned / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match="NaN") as caught:
        run(base, aligned, tmp_path / "model", form="model")
    assert caught.value.tensor == "model.norm.weight" and not (tmp_path / "model").exists()

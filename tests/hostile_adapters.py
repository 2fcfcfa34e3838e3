"""PEFT and MLX adapters that lie about more than plain pairs: stacks of experts, DoRA, what was trained beside.

All headers are sound, and `inspect --json` prints them whole: what that costs bounds how many tensors they have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hostile_files import ADAPTER_CONFIG, Case, safetensors, table_of
from hostile_safetensors import ADAPTER

Shapes = dict[str, tuple[int, ...]]
Make = Callable[[Path, str], Path]

EXPERTS = "model.layers.0.mlp.experts"
MODULE = "model.layers.0.self_attn.q_proj"
SWITCH = "model.layers.0.mlp.switch_mlp.up_proj"
LONG = "a." * 450
DIGITS = "1a" * 175
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def pair(name: str, a: tuple[int, ...] = (1, 64), b: tuple[int, ...] = (64, 1)) -> Shapes:
    return {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}


def mlx_pair(name: str, a: tuple[int, ...] = (64, 1), b: tuple[int, ...] = (1, 64)) -> Shapes:
    return {f"{name}.lora_a": a, f"{name}.lora_b": b}


def beside(*names: str, shape: tuple[int, ...] = (1,)) -> Shapes:
    return {f"base_model.model.{name}": shape for name in names}


def many(count: int, make: Callable[[int], Shapes]) -> Shapes:
    return {name: shape for number in range(count) for name, shape in make(number).items()}


def stack(name: str, experts: int) -> Shapes:
    """A pair on a bare parameter of rank 1."""
    return pair(name, (experts, 1), (1, experts))


def directory(shapes: Shapes, config: Mapping[str, Any], file: str) -> Make:
    def write(place: Path, role: str) -> Path:
        table = table_of(shapes)
        (place / "adapter_config.json").write_text(json.dumps(config))
        (place / file).write_bytes(safetensors(table))
        os.truncate(place / file, (place / file).stat().st_size + max(t["data_offsets"][1] for t in table.values()))
        return place

    return write


def peft(shapes: Shapes, **settings: Any) -> Make:
    return directory(shapes, ADAPTER_CONFIG | {"r": 1} | settings, "adapter_model.safetensors")


def mlx(shapes: Shapes, kind: str = "lora", rank: int = 1) -> Make:
    config = {"fine_tune_type": kind, "lora_parameters": {"rank": rank, "scale": 1.0}}
    return directory(shapes, config, "adapters.safetensors")


def lie(make: Make, told: str) -> Case:
    return Case(make, ADAPTER, told, sound=True)


LENGTHS = beside(f"{MODULE}.lora_magnitude_vector", shape=(64,))
NESTED = stack(EXPERTS, 4) | stack(f"{EXPERTS}.base_layer", 4)

ADAPTERS = {
    # target_parameters
    "targets that are a text": lie(peft(NESTED, target_parameters="experts"), "a list of names"),
    "targets that are numbers": lie(peft(NESTED, target_parameters=[1]), "a list of names"),
    "target of 3 MB": lie(peft(NESTED, target_parameters=["x" * (3 << 20)]), "of up to"),
    "20,000 targets": lie(peft(NESTED, target_parameters=[f"p{n}.w" for n in range(20_000)]), "at most 10000"),
    "target of dots": lie(peft(NESTED, target_parameters=["." * 900]), "no parameter's name"),
    "no target for nested pairs": lie(peft(NESTED), "names none of its module's"),
    "one target for two pairs": lie(peft(NESTED, target_parameters=TARGETS[:1]), "do not belong together"),
    "85 nested pairs": lie(
        peft(
            many(85, lambda n: stack("m" + ".base_layer" * n, 4)), target_parameters=[f"w{n}" for n in range(85)]
        ),
        "can't be told",
    ),
    "a hole between nested pairs": lie(
        peft(stack(EXPERTS, 4) | stack(f"{EXPERTS}.base_layer.base_layer", 4), target_parameters=TARGETS),
        "do not belong together",
    ),
    "a stack of half an expert": lie(
        peft(pair(EXPERTS, (7, 64), (64, 7)), target_parameters=["w"], r=2), "no multiple"
    ),
    "a stack whose halves differ": lie(
        peft(pair(EXPERTS, (8, 64), (64, 4)), target_parameters=["w"]), "all experts' ranks"
    ),
    "a stack of 100,000 experts": lie(peft(stack(EXPERTS, 100_000), target_parameters=["w"]), "at most 4096"),
    "120,000 experts in 30 stacks": lie(
        peft(many(30, lambda n: stack(f"m{n}.experts", 4000)), target_parameters=["w"]), "matrices"
    ),
    "100,000 experts in 25 stacks": lie(
        peft(many(25, lambda n: stack(f"m{n}.experts", 4000)), target_parameters=["w"]), "for another|has no"
    ),
    "100,000 experts with names of 900 letters": lie(
        peft(many(25, lambda n: stack(f"m{n}.{LONG}experts", 4000)), target_parameters=["w"]), "letters"
    ),
    "8,000 modules and 10,000 targets": lie(
        peft(many(8_000, lambda n: pair(f"m{n}.{'a.' * 100}x")), target_parameters=[f"p{n}.w" for n in range(10_000)]),
        "has no|no weight|another",
    ),
    "a rank of nothing in a stack": lie(peft(NESTED, target_parameters=TARGETS, r=0), "r is 0"),
    # names
    "a name of 175 numbers": lie(peft(many(8_000, lambda n: pair(f"m{n}.{DIGITS}"))), "numbers in its name"),
    # modules_to_save and other things beside the pairs
    "modules_to_save of 3 MB": lie(peft(pair(MODULE), modules_to_save=["x" * (3 << 20)]), "of up to"),
    "modules_to_save that is a text": lie(peft(pair(MODULE), modules_to_save="lm_head"), "a list of names"),
    "10,000 modules_to_save beside 12,000 tensors": lie(
        peft(
            pair(MODULE) | beside(*(f"m{n}.{'a.' * 100}x.bias" for n in range(12_000))),
            modules_to_save=[f"zz{n}" for n in range(10_000)],
        ),
        "modules_to_save, more than",
    ),
    "saved modules alone": lie(peft(beside("lm_head.weight"), modules_to_save=["lm_head"]), "no LoRA pairs"),
    "30,000 strays": lie(peft(pair(MODULE) | beside(*(f"s{n}" for n in range(30_000)))), "neither a lora_A"),
    "30,000 halves": lie(peft({f"m{n}.lora_A.weight": (1,) for n in range(30_000)}), "no lora_B"),
    # DoRA
    "DoRA that is a text": lie(peft(pair(MODULE) | LENGTHS, use_dora="yes"), "use_dora is"),
    "DoRA without magnitudes": lie(peft(pair(MODULE), use_dora=True), "has no magnitudes"),
    "magnitudes without DoRA": lie(peft(pair(MODULE) | LENGTHS), "holds DoRA magnitudes"),
    "magnitudes without a pair": lie(
        peft(pair(MODULE) | LENGTHS | beside("x.lora_magnitude_vector", shape=(4,)), use_dora=True), "and no pair"
    ),
    "magnitudes too few": lie(
        peft(pair(MODULE) | beside(f"{MODULE}.lora_magnitude_vector", shape=(63,)), use_dora=True), "has 63 values"
    ),
    "one magnitude for each token of an embedding": lie(
        peft(
            {f"base_model.model.model.embed_tokens.lora_embedding_{half}": shape
             for half, shape in (("A", (1, 96)), ("B", (64, 1)))}
            | beside("model.embed_tokens.lora_magnitude_vector", shape=(96,)),
            use_dora=True,
        ),
        "has 96 values",
    ),
    "DoRA on a stack": lie(peft(NESTED, target_parameters=TARGETS, use_dora=True), "has no magnitudes"),
    "8,000 magnitudes of the wrong length": lie(
        peft(
            many(8_000, lambda n: pair(f"m{n}") | beside(f"m{n}.lora_magnitude_vector", shape=(2,))), use_dora=True
        ),
        "has 2 values",
    ),
    # MLX
    "a stack beside a matrix (MLX)": lie(mlx(mlx_pair(SWITCH, (64, 1), (4, 64, 1))), "expected \\(experts, r, in\\)"),
    "a stack of other ranks (MLX)": lie(mlx(mlx_pair(SWITCH, (4, 2, 64), (4, 64, 1))), "expected \\(experts, r, in\\)"),
    "a stack of nothing (MLX)": lie(mlx(mlx_pair(SWITCH, (0, 1, 64), (0, 64, 1))), "expected \\(experts, r, in\\)"),
    "a stack of 100,000 experts (MLX)": lie(mlx(mlx_pair(SWITCH, (100_000, 1, 1), (100_000, 1, 1))), "at most 4096"),
    "120,000 experts in 30 stacks (MLX)": lie(
        mlx(many(30, lambda n: mlx_pair(f"m{n}.up_proj", (4000, 1, 1), (4000, 1, 1)))), "more than 100000"
    ),
    "a stack of the wrong rank (MLX)": lie(mlx(mlx_pair(SWITCH, (4, 1, 64), (4, 64, 1)), rank=2), "says 2"),
    "DoRA without magnitudes (MLX)": lie(mlx(mlx_pair(MODULE), "dora"), "has no magnitudes"),
    "magnitudes without DoRA (MLX)": lie(mlx(mlx_pair(MODULE) | {f"{MODULE}.m": (64,)}), "holds DoRA magnitudes"),
    "magnitudes of another shape (MLX)": lie(
        mlx(mlx_pair(MODULE) | {f"{MODULE}.m": (8, 8)}, "dora"), "expected one value"
    ),
    "DoRA on a stack (MLX)": lie(mlx(mlx_pair(SWITCH, (4, 1, 64), (4, 64, 1)), "dora"), "has no magnitudes"),
    "a kind of 3 MB (MLX)": lie(mlx(mlx_pair(MODULE), "\n" * (1 << 20)), "fine_tune_type is"),
    "12,000 pairs and a stray (MLX)": lie(mlx(many(12_000, lambda n: mlx_pair(f"m{n}")) | {"x": (1,)}), "whole tensor"),
}  # fmt: skip

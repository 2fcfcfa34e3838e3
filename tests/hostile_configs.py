"""Indices and configurations that lie, and paths that are no files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_files import ADAPTER_CONFIG, WEIGHTS, Case, of_config, of_index, setting, write_directory
from hostile_safetensors import ADAPTER, BOTH, MB, MODEL, in_place, linked, mlx, sparse

SHARD = "model.safetensors"
SLOW = "(?i:" + "[\\u0100-\\uffff]" * 60 + ")"


def shards(name: str) -> Callable[[Path, str], Path]:
    return of_index(lambda _: {**dict.fromkeys(WEIGHTS, SHARD), "lm_head.weight": name})


def named(file: str, make: Callable[[Path], object]) -> Callable[[Path, str], Path]:
    def write(directory: Path, role: str) -> Path:
        make(directory / file)
        return directory / file

    return write


def text(config: dict[str, Any], end: str) -> bytes:
    return json.dumps(config)[:-1].encode() + end.encode()


CONFIGS = {
    # indices
    "index naming /etc/passwd": Case(shards("../../../../../../../../etc/passwd"), MODEL, "in this directory"),
    "index naming an absolute path": Case(shards("/etc/passwd.safetensors"), MODEL, "in this directory"),
    "index naming a directory above": Case(shards("../model.safetensors"), MODEL, "in this directory"),
    "index naming itself": Case(shards("model.safetensors.index.json"), MODEL, "in this directory"),
    "index naming nothing": Case(shards(""), MODEL, "in this directory"),
    "index naming a backslash": Case(shards("..\\x.safetensors"), MODEL, "missing|in this directory"),
    "index naming a long name": Case(shards("x" * 300 + ".safetensors"), MODEL, "in this directory"),
    "index naming a zero": Case(shards("a\0.safetensors"), MODEL, "missing|in this directory"),
    "index naming half a surrogate": Case(shards("\ud800.safetensors"), MODEL, "missing|text|surrogate"),
    "index naming escapes": Case(shards("\x1b[2J[red]\n.safetensors"), MODEL, "missing"),
    "index naming 50,000 shards": Case(
        of_index(lambda _: {f"t{n}": f"model-{n:05}.safetensors" for n in range(50_000)}), MODEL, "50000 shards"
    ),
    "index naming a link to itself": Case(of_index(lambda at: linked(at, "loop.safetensors")), MODEL, "missing|links"),
    "index naming a link to a directory": Case(of_index(lambda at: linked(at, ".")), MODEL, "directory"),
    "index naming a link to /dev/zero": Case(of_index(lambda at: linked(at, "/dev/zero")), MODEL, "no regular file"),
    "index of numbers": Case(of_index(lambda _: {"a": 1}), MODEL, "in this directory"),  # type: ignore[dict-item]
    "index of lists": Case(of_index(lambda _: []), MODEL, "weight_map"),  # type: ignore[arg-type, return-value]
    "index that is a directory": Case(in_place("model.safetensors.index.json", Path.mkdir), MODEL, "directory"),
    "index that is a pipe": Case(in_place("model.safetensors.index.json", os.mkfifo), MODEL, "no regular file"),
    "index of 1 TB": Case(in_place("model.safetensors.index.json", sparse(1 << 40)), MODEL, "more than"),
    # configurations of both
    "config of 1 TB": Case(in_place("config.json", sparse(1 << 40)), BOTH, "more than"),
    "config of 60 MB": Case(in_place("config.json", sparse(60 * MB)), BOTH, "more than|JSON"),
    "config that is a pipe": Case(in_place("config.json", os.mkfifo), BOTH, "no regular file", sound="model"),
    "config that is a directory": Case(in_place("config.json", Path.mkdir), BOTH, "directory", sound="model"),
    "config that is a link to itself": Case(
        in_place("config.json", lambda at: at.symlink_to(at.name)), BOTH, "links|such", sound=True
    ),
    "weights that are a pipe": Case(in_place("model.safetensors", os.mkfifo), BOTH, "no regular file"),
    "weights that are a directory": Case(in_place("model.safetensors", Path.mkdir), BOTH, "directory"),
    "weights that are /dev/zero": Case(
        in_place("model.safetensors", lambda at: at.symlink_to("/dev/zero")), BOTH, "regular"
    ),
    "config of 100,000 brackets": Case(of_config(lambda: b"[" * 100_000), BOTH, "nested"),
    "config is null": Case(of_config(lambda: b"null"), BOTH, "expected a JSON object"),
    "config is no UTF-8": Case(of_config(lambda: b"\xff\xfe{}"), BOTH, "UTF-8"),
    "config twice the same key": Case(of_config(lambda: b'{"r":1,"r":2}'), BOTH, "stands twice"),
    # models
    "class of 3 MB": Case(setting(architectures=["x" * (3 * MB)]), MODEL, "architecture", sound=True),
    "heads of 3 MB": Case(setting(num_attention_heads="\n" * MB), MODEL, "attention heads|same weights", sound=True),
    "heads of 4000 digits": Case(
        setting(num_attention_heads=int("9" * 4000)), MODEL, "attention heads|same weights", sound=True
    ),
    "class as number": Case(setting(architectures=[1]), MODEL, "architectures", sound=True),
    # adapters
    "kind of 3 MB": Case(setting(peft_type="\n" * MB), ADAPTER, "peft_type", sound=True),
    "kind of 300 brackets": Case(
        of_config(lambda: b'{"peft_type":' + b"[" * 300 + b"]" * 300 + b"}"), ADAPTER, "nested"
    ),
    "kind of 900 brackets": Case(
        of_config(lambda: b'{"peft_type":' + b"[" * 900 + b"]" * 900 + b"}"), ADAPTER, "nested"
    ),
    "unknown key of 900 brackets": Case(
        of_config(lambda: text(ADAPTER_CONFIG, ',"x":' + "[" * 900 + "]" * 900 + "}")), ADAPTER, "nested"
    ),
    "initialisation of 3 MB": Case(setting(init_lora_weights="x" * (3 * MB)), ADAPTER, "initialised", sound=True),
    "rank of 4000 digits": Case(setting(r=int("9" * 4000)), ADAPTER, "r is", sound=True),
    "rank of 5000 digits": Case(of_config(lambda: b'{"peft_type":"LORA","r":' + b"9" * 5000 + b"}"), ADAPTER, "JSON"),
    "rank 0": Case(setting(r=0), ADAPTER, "r is 0", sound=True),
    "rank of 3 MB": Case(setting(r="\n" * MB), ADAPTER, "r is", sound=True),
    "alpha NaN": Case(setting(lora_alpha=float("nan")), ADAPTER, "lora_alpha is nan", sound=True),
    "alpha Infinity": Case(setting(lora_alpha=float("inf")), ADAPTER, "lora_alpha is inf", sound=True),
    "alpha 1e999": Case(
        of_config(lambda: b'{"peft_type":"LORA","lora_alpha":1e999}'), ADAPTER, "alpha is inf", sound=True
    ),
    "flag of 3 MB": Case(setting(use_rslora="\n" * MB), ADAPTER, "use_rslora is", sound=True),
    "pattern without end": Case(setting(rank_pattern={"(.*)*(.*)*(.*)*(.*)*x": 4}), ADAPTER, "backtracks", sound=True),
    "two patterns without end": Case(
        setting(rank_pattern={"((a|o|e|l|.)+)+[0-9]": 4}, alpha_pattern={"(.*)*(.*)*(.*)*(.*)*x": 4}),
        ADAPTER,
        "backtracks",
        sound=True,
    ),
    "patterns slow to compile": Case(
        setting(rank_pattern={f"{SLOW}{n}": 4 for n in range(300)}), ADAPTER, "backtracks|too long|patterns", sound=True
    ),
    "100,000 patterns": Case(
        setting(rank_pattern={f"m{n}": 4 for n in range(100_000)}), ADAPTER, "patterns", sound=True
    ),
    "pattern of 3 MB": Case(setting(rank_pattern={"a" * (3 * MB): 4}), ADAPTER, "characters", sound=True),
    "pattern of brackets": Case(
        setting(alpha_pattern={"(" * 499 + ")" * 499: 4}), ADAPTER, "regular expression|groups", sound=True
    ),
    "broken pattern": Case(setting(rank_pattern={"(": 4}), ADAPTER, "regular expression", sound=True),
    "broken pattern of escapes": Case(
        setting(rank_pattern={"(\x1b[2J\n": 4}), ADAPTER, "regular expression", sound=True
    ),
    "an infinite scale (MLX)": Case(mlx(scale=float("inf")), ADAPTER, "expected a finite|belongs to no", sound=True),
    "a scale of 4000 digits (MLX)": Case(mlx(scale=int("9" * 4000)), ADAPTER, "expected a finite|belongs", sound=True),
    "a rank of 3 MB (MLX)": Case(mlx(rank="x" * (3 * MB)), ADAPTER, "rank is", sound=True),
}

PATHS = {
    "zero-length .gguf": Case(named("x.gguf", Path.touch), BOTH, r"starts with b''"),
    "zero-length .safetensors": Case(named("x.safetensors", Path.touch), BOTH, "config.json|is a file"),
    "zero-length file": Case(named("x", Path.touch), BOTH, "neither a model|is a file"),
    "empty directory": Case(lambda directory, _: directory, BOTH, "holds neither|no such file"),
    "directory x.gguf": Case(named("x.gguf", Path.mkdir), BOTH, "holds neither|no such file|is a directory"),
    "directory x.safetensors": Case(named("x.safetensors", Path.mkdir), BOTH, "holds neither|no such file"),
    "link to itself": Case(named("x.gguf", lambda at: at.symlink_to(at)), BOTH, "links"),
    "two links to each other": Case(
        named("x", lambda at: (at.symlink_to("y"), (at.parent / "y").symlink_to("x"))), BOTH, "links"
    ),
    "link to nothing": Case(named("x.gguf", lambda at: at.symlink_to("nothing")), BOTH, "no such file"),
    "pipe x.gguf": Case(named("x.gguf", os.mkfifo), BOTH, "no regular file|neither a model|is a file"),
    "pipe x": Case(named("x", os.mkfifo), BOTH, "no regular file|neither a model|is a file|no GGUF"),
    "pipe x.safetensors": Case(named("x.safetensors", os.mkfifo), BOTH, "no regular file|config.json|no such"),
    "/dev/zero": Case(lambda *_: Path("/dev/zero"), BOTH, "no regular file|neither a model|no GGUF|is a file"),
    "/dev/null": Case(lambda *_: Path("/dev/null"), BOTH, "no regular file|neither a model|no GGUF|is a file"),
    "a name too long": Case(lambda directory, _: directory / ("x" * 300 + ".gguf"), BOTH, "too long"),
    "a file in a file": Case(
        lambda directory, role: write_directory(directory, role) / "config.json" / "x.gguf", MODEL, "not a directory"
    ),
}

"""One family per architecture: models, PEFT's adapters, our conversions of them, and upstream's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from conformance import peft_side
from conformance.specs import COMMON

from safelora_gguf import Selection, project_adapter

HERE = Path(__file__).parent
NOTHING = Selection("number", 0)
VOCABULARY: int = COMMON["vocab_size"]

# What upstream converts as we do: (adapter kind, outtype); and beside that, what it gets wrong.
SAME = (
    ("plain", "f32"),
    ("plain", "f16"),
    ("plain", "bf16"),
    ("plain_r32", "q8_0"),
    ("rank_pattern", "f32"),
    ("embeddings", "f32"),
)
UPSTREAM = (*SAME, ("rslora", "f32"), ("alpha_pattern", "f32"))

Logits = Callable[[Path, Path | None], np.ndarray]


@dataclass(frozen=True)
class Family:
    """One architecture's model before and after its alignment, and PEFT's adapters by kind."""

    architecture: str
    root: Path
    base: Path
    aligned: Path
    adapters: Mapping[str, Path]

    def convert(self, kind: str, outtype: str = "f32") -> Path:
        """Our GGUF adapter, with nothing projected."""
        target = self.root / f"ours-{kind}-{outtype}.gguf"
        if not target.exists():
            project_adapter(
                self.base, self.aligned, self.adapters[kind], target, selection=NOTHING, outtype=outtype, device="cpu"
            )
        return target


@dataclass(frozen=True)
class Upstream:
    """The aligned model (F32) and adapters by (kind, outtype), as upstream's converters write them.

    Attributes:
        failures: what ended upstream's converters, by the name of the file that they were to write.
    """

    model: Path
    adapters: Mapping[tuple[str, str], Path]
    failures: Mapping[str, str] = field(default_factory=dict)


def make_family(architecture: str, root: Path) -> Family:
    model = peft_side.make_model(architecture)
    model.save_pretrained(root / "base")
    peft_side.align(model)
    model.save_pretrained(root / "aligned")
    _save_vocabulary(root / "aligned", VOCABULARY)
    adapters = {
        kind: peft_side.save_adapter(root / "aligned", root / kind, options)
        for kind, options in peft_side.kinds_of(architecture).items()
    }
    return Family(architecture, root, root / "base", root / "aligned", adapters)


def _save_vocabulary(directory: Path, size: int) -> None:
    """What upstream reads of a tokenizer to cut Gemma 3's embedding to its vocabulary: how many entries it has."""
    vocabulary = {"model": {"vocab": {f"token{number}": number for number in range(size)}}, "added_tokens": []}
    (directory / "tokenizer.json").write_text(json.dumps(vocabulary))


def convert_upstream(family: Family, llama_cpp: Path) -> Upstream:
    """Has upstream convert a family of which it must be able to convert everything."""
    upstream, jobs = _plan(family, UPSTREAM)
    _run_upstream(llama_cpp, "upstream_child.py", jobs)
    return upstream


def convert_upstream_each(
    families: Sequence[Family], llama_cpp: Path, kinds: Sequence[tuple[str, str]] = (("plain", "f32"),)
) -> Mapping[str, Upstream]:
    """Has upstream convert the models and adapters of several families in one process, whatever fails on the way."""
    plans = [_plan(family, kinds) for family in families]
    failures = iter(
        json.loads(_run_upstream(llama_cpp, "upstream_each_child.py", [job for _, jobs in plans for job in jobs]))
    )
    found = {}
    for family, (upstream, jobs) in zip(families, plans, strict=True):
        targets = [Path(str(job[job.index("--outfile") + 1])).stem for job in jobs]
        reasons = {target: next(failures) for target in targets}
        failed = {target: reason for target, reason in reasons.items() if reason is not None}
        found[family.architecture] = replace(upstream, failures=failed)
    return found


def _plan(family: Family, kinds: Sequence[tuple[str, str]]) -> tuple[Upstream, list[list[object]]]:
    """Where upstream will write, and its command lines: the model's first, then one for each adapter."""
    model = family.root / "aligned.gguf"
    adapters = {(kind, outtype): family.root / f"upstream-{kind}-{outtype}.gguf" for kind, outtype in kinds
                if kind in family.adapters}  # fmt: skip
    jobs: list[list[object]] = [["convert_hf_to_gguf.py", family.aligned, "--outtype", "f32", "--outfile", model]]
    for (kind, outtype), target in adapters.items():
        where = ["--base", family.aligned, "--outtype", outtype, "--outfile", target]
        jobs.append(["convert_lora_to_gguf.py", *where, family.adapters[kind]])
    return Upstream(model, adapters), jobs


def _run_upstream(llama_cpp: Path, child: str, jobs: Sequence[Sequence[object]]) -> str:
    """What the child printed."""
    lines = json.dumps([[str(word) for word in job] for job in jobs])
    command = [sys.executable, str(HERE / child), str(llama_cpp)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, input=lines, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, f"upstream's converter failed:\n{done.stderr[-3000:]}"
    return done.stdout

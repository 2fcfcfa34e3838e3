"""The README's table of adapter features, row by row. Oracles: PEFT's own merge, and llama.cpp where it refuses a file.

Both converters run on every row: upstream's from llama.cpp's source, ours in a process without transformers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import offline_child
import pytest
import torch
from conformance.families import HERE
from conformance.feature_adapters import INVOCATION, Adapter, Workshop
from conformance.feature_truth import verdict
from conformance.features import FEATURES, Cell, table

pytestmark = pytest.mark.conformance

README = HERE.parent.parent / "README.md"


@dataclass(frozen=True)
class Converted:
    """What a converter did with one adapter.

    Attributes:
        error: what ended it, None where it ended well.
        told: our JSON report or error.
        strict: the same adapter, converted with --strict.
    """

    out: Path
    error: str | None
    told: Mapping[str, Any]
    strict: Mapping[str, Any]


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Adapter]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    workshop = Workshop(tmp_path_factory.mktemp("models"))
    root = tmp_path_factory.mktemp("features")
    made = {name: feature.make(workshop, root / str(place)) for place, (name, feature) in enumerate(FEATURES.items())}
    torch.set_num_threads(before)
    return made


@pytest.fixture(scope="session")
def upstream(
    adapters: Mapping[str, Adapter], llama_cpp_sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Converted]:
    root = tmp_path_factory.mktemp("upstream")
    jobs = [
        [FEATURES[name].transformers, "convert_lora_to_gguf.py", *_options(adapter, root / f"{place}.gguf")]
        for place, (name, adapter) in enumerate(adapters.items())
    ]
    failures = _run_upstream(llama_cpp_sources, jobs)
    return {
        name: Converted(root / f"{place}.gguf", error, {}, {})
        for place, (name, error) in enumerate(zip(adapters, failures, strict=True))
    }


def _options(adapter: Adapter, out: Path, option: str = "--outfile") -> list[object]:
    base = [] if adapter.base is None else ["--base", adapter.base]
    return [adapter.path, *base, "--outtype", adapter.outtype, option, out]


def _run_upstream(llama_cpp: Path, jobs: list[list[object]]) -> list[str | None]:
    lines = json.dumps([[job[0], *map(str, job[1:])] for job in jobs])
    command = [sys.executable, str(HERE / "feature_child.py"), str(llama_cpp)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input=lines, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[str | None] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="session")
def ours(adapters: Mapping[str, Adapter], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Converted]:
    root = tmp_path_factory.mktemp("ours")
    outs = [root / f"{place}.gguf" for place in range(len(adapters))]
    both: list[list[object]] = []
    for out, adapter in zip(outs, adapters.values(), strict=True):
        both.append(["convert", "adapter", *_options(adapter, out, "--out"), "--json"])
        both.append(["convert", "adapter", *_options(adapter, _strict(out), "--out"), "--json", "--strict"])
    answers = offline_child.answers(both)
    assert [answer for answer in answers if answer["network"]] == []
    found = {}
    for name, out, plain, strict in zip(adapters, outs, answers[::2], answers[1::2], strict=True):
        assert plain["exit"] in (0, 3), plain["stderr"]
        found[name] = Converted(out, plain["stderr"] if plain["exit"] else None, plain["told"], strict)
    return found


def _strict(out: Path) -> Path:
    return out.with_suffix(".strict.gguf")


def lossless(cell: Cell) -> bool:
    return cell.outcome == "right" and not cell.mark


@pytest.mark.parametrize("name", FEATURES)
def test_upstream(
    name: str,
    adapters: Mapping[str, Adapter],
    upstream: Mapping[str, Converted],
    llama_cpp_sources: Path,
    tmp_path: Path,
) -> None:
    """Should upstream learn a row, this says so."""
    found, cell, adapter = upstream[name], FEATURES[name].theirs, adapters[name]
    if cell.outcome == "fails":
        assert found.error is not None and not found.out.exists()
        return
    assert found.error is None
    if cell.outcome not in ("rejected", "aborts"):
        assert verdict(found.out, adapter.truth, cell.allowed) == cell.outcome
        return
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    model = tmp_path / "model.gguf"
    job = [True, "convert_hf_to_gguf.py", adapter.model, "--outtype", "f32", "--outfile", model]
    assert _run_upstream(llama_cpp_sources, [job]) == [None]
    assert run_llama(model, "-").returncode == 0
    died = run_llama(model, str(found.out))
    if cell.outcome == "rejected":
        assert died.returncode == 1 and b"llama.cpp rejected" in died.stderr
    else:
        assert died.returncode == -signal.SIGABRT


def run_llama(model: Path, adapter: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(HERE / "llama_child.py"), str(model), adapter, "3,17,92"]
    return subprocess.run(command, capture_output=True, timeout=120, check=False)


@pytest.mark.parametrize("name", FEATURES)
def test_ours(name: str, adapters: Mapping[str, Adapter], ours: Mapping[str, Converted]) -> None:
    found, cell = ours[name], FEATURES[name].ours
    if cell.outcome == "refused":
        assert found.error is not None and not found.out.exists()
        assert found.told["error"]["kind"] == "unsupported"
        assert cell.mark.lower() in found.told["error"]["message"].lower()
        return
    assert found.error is None
    assert verdict(found.out, adapters[name].truth, cell.allowed) == cell.outcome
    assert lossless(cell) == (found.told["losses"] == [])
    assert cell.mark.lower() in " ".join(found.told["losses"]).lower()


@pytest.mark.parametrize("name", FEATURES)
def test_strict(name: str, ours: Mapping[str, Converted]) -> None:
    """Oracle: the table; whatever is not right in full ends with exit 3 and nothing written."""
    found, cell = ours[name], FEATURES[name].ours
    assert found.strict["exit"] == (0 if lossless(cell) else 3)
    assert _strict(found.out).exists() == lossless(cell)


def test_invocation_tokens(upstream: Mapping[str, Converted], ours: Mapping[str, Converted]) -> None:
    """Oracle: the tokens that PEFT was given, as the gguf package reads them."""
    for found in (upstream, ours):
        field = gguf.GGUFReader(found["aLoRA's invocation tokens"].out).fields["adapter.alora.invocation_tokens"]
        assert field.contents() == list(INVOCATION) and field.types[-1] == gguf.GGUFValueType.UINT32
    assert any("llama-server alone" in note for note in ours["aLoRA's invocation tokens"].told["notes"])


def test_q8_0_is_what_it_is(upstream: Mapping[str, Converted], ours: Mapping[str, Converted]) -> None:
    """Oracle: the gguf package's reader; of rank 4 no row of B is a block."""
    name = "`--outtype q8_0`, rank no multiple of 32"
    for found in (upstream, ours):
        types = {tensor.name[-1]: tensor.tensor_type.name for tensor in gguf.GGUFReader(found[name].out).tensors}
        assert types == {"a": "Q8_0", "b": "F16"}
    assert any("Q8_0 needs rows of 32" in note for note in ours[name].told["notes"])


def test_the_readme_has_this_table() -> None:
    """Oracle: the rows above, each run by the tests above."""
    _, start, rest = README.read_text(encoding="utf-8").partition("<!-- features -->\n")
    assert start, "README.md has no table of features"
    assert rest.partition("\n<!-- /features -->")[0].strip() == table()

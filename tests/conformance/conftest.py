"""The oracles of this directory: PEFT (see `peft_side`), upstream's converters, llama.cpp's logits."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import peft_side
from conformance.families import (
    HERE,
    Family,
    Logits,
    Upstream,
    convert_upstream,
    convert_upstream_each,
    make_family,
)
from conformance.specs import MORE, THOROUGH

SDIST = "llama-cpp-python==0.3.36"  # brings the llama.cpp that formats.md describes


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of this size gain nothing from more, and threads that wait for busy cores lose seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama_cpp_sources(pytestconfig: pytest.Config) -> Path:
    """llama.cpp's own source tree: SAFELORA_LLAMA_CPP, or the copy in llama-cpp-python's source distribution."""
    given = os.environ.get("SAFELORA_LLAMA_CPP")
    if given:
        assert (Path(given) / "convert_lora_to_gguf.py").exists(), f"SAFELORA_LLAMA_CPP={given} has no converters"
        return Path(given)
    assert pytestconfig.cache is not None
    folder = Path(pytestconfig.cache.mkdir("llama-cpp-sources"))
    found = sorted(folder.glob("*/vendor/llama.cpp/convert_lora_to_gguf.py"))
    if not found:
        _fetch(folder)
        found = sorted(folder.glob("*/vendor/llama.cpp/convert_lora_to_gguf.py"))
    return found[-1].parent


def _fetch(folder: Path) -> None:
    """Downloads and unpacks the source distribution; a rename at the end, so that half a copy is never used."""
    command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", folder, SDIST]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("*.tar.gz"))
    if not archives:
        reason = (
            f"upstream's converters are not at hand: pip could not download {SDIST} and SAFELORA_LLAMA_CPP is unset"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}\n{done.stderr[-2000:]}")
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(dir=folder) as partial, tarfile.open(archives[-1]) as archive:
        archive.extractall(partial, filter="data")
        for unpacked in Path(partial).iterdir():
            unpacked.rename(folder / unpacked.name)


@pytest.fixture(scope="session")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Makes each architecture's family once."""
    return cache(lambda architecture: make_family(architecture, tmp_path_factory.mktemp(architecture)))


@pytest.fixture(scope="session")
def upstream_of(llama_cpp_sources: Path, family_of: Callable[[str], Family]) -> Callable[[str], Upstream]:
    """Has upstream convert each family once."""
    return cache(lambda architecture: convert_upstream(family_of(architecture), llama_cpp_sources))


@pytest.fixture(params=list(THOROUGH))
def family(request: pytest.FixtureRequest, family_of: Callable[[str], Family]) -> Family:
    return family_of(request.param)


@pytest.fixture
def upstream(family: Family, upstream_of: Callable[[str], Upstream]) -> Upstream:
    return upstream_of(family.architecture)


@pytest.fixture(params=list(MORE))
def other(request: pytest.FixtureRequest, family_of: Callable[[str], Family]) -> Family:
    """A family of `MORE`."""
    return family_of(request.param)


@pytest.fixture(scope="session")
def upstream_of_others(llama_cpp_sources: Path, family_of: Callable[[str], Family]) -> Mapping[str, Upstream]:
    """`MORE`'s models and plain adapters by upstream."""
    return convert_upstream_each([family_of(architecture) for architecture in MORE], llama_cpp_sources)


@pytest.fixture(scope="session")
def llama_logits() -> Logits:
    """llama.cpp's logits (tokens, vocabulary) for `peft_side.TOKENS`, from a child process."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    tokens = ",".join(map(str, peft_side.TOKENS))

    def run(model: Path, adapter: Path | None) -> np.ndarray:
        command = [sys.executable, str(HERE / "llama_child.py"), str(model), str(adapter or "-"), tokens]
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
        log = done.stderr.decode("utf-8", "replace")[-2000:]
        assert done.returncode == 0, f"llama.cpp ended with {done.returncode}:\n{log}"
        return np.load(io.BytesIO(done.stdout))

    return run

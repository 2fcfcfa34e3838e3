"""The plan of the house: converters know nothing of safety, kernels nothing of files, and only the CLI prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted([*(ROOT / "converters").rglob("*.py"), *(ROOT / "safelora_gguf").rglob("*.py")])
KERNELS = [
    "safelora_gguf/projection.py",
    "safelora_gguf/low_rank.py",
    "safelora_gguf/triplets.py",
    "safelora_gguf/noise.py",
    "safelora_gguf/merging/kernels.py",
    "safelora_gguf/repair/solving/closed_form.py",
    "safelora_gguf/repair/solving/lower_triangles.py",
    "converters/products.py",
]


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 30


def test_converters_never_import_the_safety_work() -> None:
    for file in MODULES:
        if file.is_relative_to(ROOT / "converters"):
            assert not [name for name in _imports(file) if name.startswith("safelora_gguf")], file


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_import_torch_and_other_kernels_alone(kernel: str) -> None:
    ours = [name for name in _imports(ROOT / kernel) if name.startswith(("converters", "safelora_gguf"))]
    assert set(ours) <= {
        "converters.products",
        "safelora_gguf.low_rank",
        "safelora_gguf.repair.solving.lower_triangles",
    }


def test_test_libraries_stay_out_of_the_packages() -> None:
    for file in MODULES:
        roots = {name.partition(".")[0] for name in _imports(file)}
        assert not roots & {"transformers", "peft", "huggingface_hub", "requests", "httpx", "urllib"}, file

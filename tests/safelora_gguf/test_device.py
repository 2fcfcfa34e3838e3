"""Oracle: the CPU's result. On a machine with a GPU the same kernels run there; without one, names are checked."""

from __future__ import annotations

import pytest
import torch
from models import Trio, save_trio

from converters.errors import UsageError
from safelora_gguf import project_adapter
from safelora_gguf.device import exact_float32, resolve_device


def test_cpu_is_always_there() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:4096", "cpu:1"])
def test_other_names_are_usage_errors(name: str) -> None:
    with pytest.raises(UsageError):
        resolve_device(name)


def test_tf32_is_off_inside_and_as_it_was_after() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        with exact_float32():
            assert not matmul.allow_tf32
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return save_trio(tmp_path_factory.mktemp("trio"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("operator", ["paper", "subspace"])
def test_a_gpu_gives_what_the_cpu_gives(operator: str, trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> None:
    from safetensors.torch import load_file

    root = tmp_path_factory.mktemp("out")
    for device in ("cpu", "cuda"):
        inputs = (trio.base, trio.aligned, trio.adapter)
        project_adapter(*inputs, root / device, operator=operator, device=device)  # type: ignore[arg-type]
    cpu, cuda = (load_file(root / device / "adapter_model.safetensors") for device in ("cpu", "cuda"))
    for name, expected in cpu.items():
        torch.testing.assert_close(cuda[name], expected, rtol=1e-4, atol=1e-6)

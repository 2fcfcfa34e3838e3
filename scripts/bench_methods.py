"""What the benchmarks compare, each run in a process of its own: `python bench_methods.py METHOD REQUEST`.

REQUEST is a `Request` as JSON; one line of JSON comes back on standard output. The clock starts after all imports
(and, on a GPU, after its context exists).

    ours         safelora_gguf.project_adapter, from opening the inputs to the written and hashed GGUF file
    dense        Safe LoRA as published, in plain torch: both models loaded whole by safetensors.torch.load_file, per
                 module C = V V^T / ||V||_F formed, then (C B) A and B A formed, their cosine taken; the new adapter
                 saved by safetensors.torch.save_file. Each C is dropped after use; the published code keeps all.
    arithmetic   the same arithmetic on one module at a time; only the arithmetic is timed, not reading or writing

Where the references are GGUF files, `dense` dequantizes every tensor of both by the gguf package into memory first.
With --subspace the two plain methods take U_k from torch.linalg.svd of V, and form P_k = U_k U_k^T in place of C.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from bench_gguf import load_whole
from bench_outcome import Outcome, peak_resident
from safetensors import safe_open
from safetensors.torch import load_file, save_file

METHODS = ("ours", "dense", "arithmetic")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Request:
    """One projection to run.

    Attributes:
        base, aligned: a directory with model.safetensors, or a GGUF file (not for `arithmetic`).
        out: a file to write, .gguf for ours and .safetensors for the dense method.
        threshold: cosines up to this are projected; None projects all.
        subspace_rank: k of the subspace operator; None is the paper's operator.
    """

    base: str
    aligned: str
    adapter: str
    out: str
    threshold: float | None
    subspace_rank: int | None
    device: str
    threads: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def ours(request: Request) -> Outcome:
    from safelora_gguf import Selection, project_adapter

    selection = Selection("all") if request.threshold is None else Selection("threshold", request.threshold)
    operator: Any = "paper" if request.subspace_rank is None else "subspace"
    start = time.perf_counter()
    report = project_adapter(
        request.base,
        request.aligned,
        request.adapter,
        request.out,
        operator=operator,
        rank=request.subspace_rank,
        selection=selection,
        device=request.device,
        allow_noisy_reference=True,  # the same arithmetic is done with it
    )
    seconds = time.perf_counter() - start
    cosines = {module.name: module.cosine for module in report.modules if module.cosine is not None}
    return Outcome(seconds, cosines, [module.name for module in report.modules if module.projected])


@torch.inference_mode()
def dense(request: Request) -> Outcome:
    start = time.perf_counter()
    base, aligned = _load_model(request.base), _load_model(request.aligned)
    adapter = load_file(f"{request.adapter}/adapter_model.safetensors")
    cosines, projected = {}, []
    for module in _modules(list(adapter)):
        weight, key = f"{module}.weight", f"{_PREFIX}{module}.lora_B.weight"
        a = adapter[f"{_PREFIX}{module}.lora_A.weight"]
        tensors = (tensor.to(request.device) for tensor in (base[weight], aligned[weight], a, adapter[key]))
        new_b, cosines[module] = project_densely(*tensors, request.subspace_rank)
        if request.threshold is None or cosines[module] <= request.threshold:
            adapter[key] = new_b.cpu()
            projected.append(module)
    save_file(adapter, request.out)
    return Outcome(time.perf_counter() - start, cosines, projected)


@torch.inference_mode()
def arithmetic(request: Request) -> Outcome:
    cosines, seconds = {}, 0.0
    with (
        safe_open(f"{request.base}/model.safetensors", "pt", device=request.device) as base,
        safe_open(f"{request.aligned}/model.safetensors", "pt", device=request.device) as aligned,
        safe_open(f"{request.adapter}/adapter_model.safetensors", "pt", device=request.device) as adapter,
    ):
        for module in _modules(list(adapter.keys())):
            a, b = (adapter.get_tensor(f"{_PREFIX}{module}.lora_{half}.weight") for half in "AB")
            weights = [model.get_tensor(f"{module}.weight").clone() for model in (base, aligned)]
            _settle(request.device)
            start = time.perf_counter()
            _, cosines[module] = project_densely(*weights, a, b, request.subspace_rank)
            seconds += time.perf_counter() - start
    limit = request.threshold
    return Outcome(seconds, cosines, [name for name, value in cosines.items() if limit is None or value <= limit])


def project_densely(
    base: torch.Tensor, aligned: torch.Tensor, a: torch.Tensor, b: torch.Tensor, subspace_rank: int | None
) -> tuple[torch.Tensor, float]:
    """C B (out, r) and cos(C B A, B A), every matrix formed, in float32.

    ||V||_F sums in float64 and the cosine by torch's pairwise sums: the float32 loops of linalg.norm and
    functional.cosine_similarity are off by up to 4e-4 at these sizes, more than the agreement that is asked for.
    The pairwise sums are no slower.
    """
    v = aligned.float() - base.float()
    if subspace_rank is None:
        c = v @ v.T / float(torch.linalg.vector_norm(v, dtype=torch.float64))
    else:
        u = torch.linalg.svd(v, full_matrices=False).U[:, :subspace_rank]
        c = u @ u.T
    new_b = c @ b
    new_delta, delta = new_b @ a, b @ a
    sizes = new_delta.square().sum().sqrt() * delta.square().sum().sqrt()
    return new_b, float((new_delta * delta).sum() / sizes)


def _load_model(path: str) -> dict[str, torch.Tensor]:
    return load_whole(path) if path.endswith(".gguf") else load_file(f"{path}/model.safetensors")


def _modules(keys: list[str]) -> list[str]:
    ending = ".lora_A.weight"
    return [key.removeprefix(_PREFIX).removesuffix(ending) for key in keys if key.endswith(ending)]


def _settle(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    method: Callable[[Request], Outcome] = {"ours": ours, "dense": dense, "arithmetic": arithmetic}[sys.argv[1]]
    request = Request(**json.loads(sys.argv[2]))
    torch.set_num_threads(request.threads)
    on_gpu = request.device.startswith("cuda")
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.ones(8, 8, device=request.device).mm(torch.ones(8, 8, device=request.device))
    outcome = method(request)
    peak_device = torch.cuda.max_memory_allocated() if on_gpu else None
    print(json.dumps(asdict(replace(outcome, peak_resident=peak_resident(), peak_device=peak_device))))


if __name__ == "__main__":
    main()

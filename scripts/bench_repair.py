"""Solving for a repaired adapter of a 7B model, in processes of its own: `python bench_repair.py METHOD REQUEST`.

REQUEST is a `Request` as JSON; one line of JSON comes back on standard output. The clock starts after all imports.

    ours      safelora_gguf.repair.solving.solver.Solver, from captured inputs in a file to A' in another, of one layer
    whole     the same of all layers
    narrow    the closed form as it is written down, of one module with 4,096 inputs: C_G and C_H formed in float64 and
              torch.linalg.solve, from the same file
    wide      the same with 11,008 inputs

A layer has seven adapted modules of Llama 2 7B's shapes. Their inputs are synthetic: 2,048 tokens of either set, with a
falling spectrum, a common mean and a few outlier dimensions. All layers read the same file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from bench_agreement import DisagreementError
from bench_outcome import Outcome, peak_resident, timed
from safetensors.torch import load_file, save_file

from converters.adapters.lora import LoraAdapter, LoraPair
from safelora_gguf.repair.reading.captured_sets import CapturedSet, RangeInputs
from safelora_gguf.repair.solving.pair_store import PairStore
from safelora_gguf.repair.solving.solver import Solver
from safelora_gguf.smoke.llama.capture_file import CaptureReader, CaptureWriter, halved
from safelora_gguf.smoke.protocol import InputGroup

if TYPE_CHECKING:
    from bench_runs import Series

HEAD = ("method", "median s", "min to max", "peak resident memory")
TITLES = {
    "ours": "one layer: seven modules of four inputs",
    "narrow": "one module of 4,096 inputs, dense in float64",
    "wide": "one module of 11,008 inputs, dense in float64",
}
NARROW, WIDE = "blk.0.attn_q", "blk.0.ffn_down"

_HIDDEN, _FFN, _RANK = 4096, 11008, 16
_INPUTS = {
    ("attn_q", "attn_k", "attn_v"): _HIDDEN,
    ("attn_output",): _HIDDEN,
    ("ffn_gate", "ffn_up"): _HIDDEN,
    ("ffn_down",): _FFN,
}
_OUTPUTS = {"ffn_gate": _FFN, "ffn_up": _FFN}
_SETS = ("harmful", "benign")
_MU, _EPS = 4.0, 0.1
_BOUND = 1e-4


@dataclass(frozen=True)
class Request:
    """One run; `out` is a directory for what is solved, `inputs` one that `write_inputs` has filled."""

    inputs: str
    out: str
    tokens: int
    layers: int
    device: str
    threads: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def requests(inputs: Path, outputs: Path, tokens: int, device: str, threads: int) -> dict[str, Request]:
    """Of what is run several times, in turns."""
    return {name: Request(str(inputs), str(outputs / name), tokens, 1, device, threads) for name in TITLES}


def whole(wanted: Mapping[str, Request], layers: int) -> dict[str, Request]:
    """What is run once."""
    ours = wanted["ours"]
    return {"whole": replace(ours, layers=layers, out=f"{ours.out}-whole")}


def write_inputs(place: Path, tokens: int) -> None:
    """The captured inputs of one layer, a file for each set."""
    for seed, name in enumerate(_SETS):
        with (place / name).open("wb") as stream:
            writer = CaptureWriter(stream, tokens)
            for number, width in enumerate(_INPUTS.values()):
                writer.add_group(width=width, slots=1, used=0)
                writer.put(number, 0, *halved(_inputs(tokens, width, seed, number).numpy()[:, None]))
            groups = writer.close(list(_INPUTS))
        (place / f"{name}.json").write_text(json.dumps([asdict(group) for group in groups]))


def _inputs(tokens: int, width: int, seed: int, number: int) -> torch.Tensor:
    """(tokens, width): directions with singular values as i^-1/2, noise, a mean and outliers; all but the draws of
    tokens is the same for both sets."""
    common, own = torch.Generator().manual_seed(number), torch.Generator().manual_seed(100 + 10 * seed + number)
    directions = torch.randn(256, width, generator=common) * torch.arange(1, 257)[:, None] ** -0.5
    x = torch.randn(tokens, 256, generator=own) @ directions + 0.3 * torch.randn(tokens, width, generator=own)
    x += 0.5 * torch.randn(width, generator=common)
    x[:, [11, width // 2, width - 5]] *= torch.tensor([60.0, 30.0, 20.0])
    return x


def check(wanted: Mapping[str, Request]) -> float:
    """The largest relative difference between our A' and those of the dense method.

    Raises:
        DisagreementError: they differ by more than 1e-4.
    """
    files = {name: load_file(Path(request.out) / "sample.safetensors") for name, request in wanted.items()}
    pairs = [(files["ours"][module], files[method][module]) for method, module in (("narrow", NARROW), ("wide", WIDE))]
    error = max(float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs)
    if not error <= _BOUND:
        raise DisagreementError(f"A' differs by {error:.1e} of its norm from the dense method's")
    return error


def rows(series: Mapping[str, Series], layers: int) -> Iterator[tuple[str, ...]]:
    """As under `HEAD`."""
    for method, title in TITLES.items():
        yield _row(title, series[method])
    yield _row(f"all {layers} layers: {7 * layers} modules", series["whole"])
    narrow, wide = series["narrow"].median, series["wide"].median
    yield "the same, dense in float64, extrapolated from two modules", f"{layers * (6 * narrow + wide):,.0f}", "", ""


def _row(title: str, found: Series) -> tuple[str, ...]:
    memory = "unknown" if found.peak_resident is None else f"{found.peak_resident / 1e6:,.0f} MB"
    return title, f"{found.median:.1f}", f"{min(found.seconds):.1f} to {max(found.seconds):.1f}", memory


@dataclass(frozen=True)
class _Adapter:
    """The part of an adapter that is solved from: random pairs."""

    pairs: Mapping[str, LoraPair]

    def load(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        out, into = self.pairs[module].shape
        drawn = torch.Generator().manual_seed(list(self.pairs).index(module))
        a, b = torch.randn(_RANK, into, generator=drawn), torch.randn(out, _RANK, generator=drawn)
        return a * into**-0.5, b * 0.01


@dataclass(frozen=True)
class _Captured:
    """The same inputs for every layer."""

    request: Request

    def ranges(self) -> Iterator[RangeInputs]:
        for layer in range(self.request.layers):
            weights = tuple(name for shared in _INPUTS for name in _weights(layer, shared))
            yield RangeInputs(weights, *(_set(self.request, name, layer) for name in _SETS))


def _set(request: Request, name: str, layer: int) -> CapturedSet:
    place = Path(request.inputs)
    found = [InputGroup(**fields) for fields in json.loads((place / f"{name}.json").read_text())]
    groups = tuple(replace(group, weights=_weights(layer, group.weights)) for group in found)
    of_no_fold = np.zeros(request.tokens, np.int32)
    return CapturedSet(CaptureReader(place / name, groups), groups, of_no_fold, of_no_fold, request.tokens)


def _weights(layer: int, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"blk.{layer}.{name}.weight" for name in names)


def _adapter(layers: int) -> LoraAdapter:
    pairs = {}
    for layer in range(layers):
        for names, width in _INPUTS.items():
            for name in names:
                module, shape = f"blk.{layer}.{name}", (_OUTPUTS.get(name, _HIDDEN), width)
                pairs[module] = LoraPair(module, module, ("", ""), _RANK, 2.0, shape)
    return cast(LoraAdapter, _Adapter(pairs))


def ours(request: Request) -> float:
    store, adapter = PairStore(Path(request.out)), _adapter(request.layers)
    device = torch.device(request.device)
    solver = Solver(_Captured(request), adapter, store, eps=_EPS, device=device)
    seconds = timed(lambda: solver.solve([_MU]))
    _save(request, {module: store.get(module, _MU) for module in (NARROW, WIDE)})
    return seconds


def narrow(request: Request) -> float:
    return _dense(request, NARROW)


def wide(request: Request) -> float:
    return _dense(request, WIDE)


def _dense(request: Request, module: str) -> float:
    """A' = A (C_G + eps' I)(C_G + eps' I + mu C_H)^-1 of one module."""
    a = _adapter(1).load(module)[0].to(request.device, torch.float64)
    found = {}

    def solved() -> None:
        c_h, c_g = (_second_moment(_set(request, name, 0), module, request.device) for name in _SETS)
        c_g.diagonal().add_(_EPS * c_g.diagonal().mean())
        found[module] = torch.linalg.solve(c_g + _MU * c_h, c_g @ a.T).T.float().cpu()

    seconds = timed(solved)
    _save(request, found)
    return seconds


def _second_moment(captured: CapturedSet, module: str, device: str) -> torch.Tensor:
    x = torch.from_numpy(captured.reader.inputs(captured.group_of(f"{module}.weight"))[:, 0])
    wide = x.to(device, torch.float64)
    return wide.T @ wide / captured.tokens


def _save(request: Request, found: Mapping[str, torch.Tensor]) -> None:
    save_file({module: a.contiguous() for module, a in found.items()}, Path(request.out) / "sample.safetensors")


METHODS: Mapping[str, Callable[[Request], float]] = {"ours": ours, "whole": ours, "narrow": narrow, "wide": wide}


@torch.inference_mode()
def main() -> None:
    request = Request(**json.loads(sys.argv[2]))
    torch.set_num_threads(request.threads)
    Path(request.out).mkdir()
    if request.device.startswith("cuda"):
        torch.ones(8, 8, device=request.device).mm(torch.ones(8, 8, device=request.device))
    seconds = METHODS[sys.argv[1]](request)
    print(json.dumps(asdict(Outcome(seconds, peak_resident=peak_resident()))))


if __name__ == "__main__":
    main()

"""How far quantized references can stand in for F16 ones: the tables of the documentation.

    python scripts/measure_references.py

Two families, each with references in several types of ggml, everything held against its F16 pair:

    tiny        the packaged one: its alignment is unusually strong, 0.15 to 0.28 of the weights' norm
    typical     synthetic, three layers 1024 wide: weights of deviation 0.02, an alignment of 5e-4 per entry (root
                mean square), a tenth to a half of its energy in eight directions of falling strength, the rest spread
                over all; a LoRA of rank 16 on all projections

Selections and B' are those of the paper's operator, B' with all modules projected. The subspace columns look at rank
6: how many directions stand above the rounding noise, and the largest principal angle between those that do and the
six of the F16 pair. "off by" is the mean over all modules (B': relative, Frobenius), the angle the median. Seeds are
fixed and torch has one thread: the figures do not depend on the machine, the time (a minute or two) does.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from bench_gguf import PROJECTIONS, add_tensor_info, encoded, start_tensors, write_model
from bench_models import Shape
from bench_report import markdown_table
from gguf import GGMLQuantizationType as QType

from converters.errors import UnsupportedError
from converters.layouts import common_layout
from converters.opening import open_adapter, open_model
from safelora_gguf import Selection, project_adapter
from safelora_gguf.alignment import Differences
from safelora_gguf.low_rank import leading_subspace
from safelora_gguf.noise import directions_above
from safelora_gguf.pairing import pair_up
from safelora_gguf.selection import select

TINY = Path(__file__).parent.parent / "safelora_gguf" / "tiny_family"
TYPES = (QType.F16, QType.Q8_0, QType.Q6_K, QType.Q5_K, QType.Q4_K, QType.Q4_0)
RANK = 6
RULES = (Selection("threshold", 0.35), Selection("number", 10))
HEAD = (
    "references", "SNR", "`paper`", "chosen at 0.35", "10 smallest cosines", "cosine off by", "B' off by",
    "directions of 6", "angle to F16's",
)  # fmt: skip

_SHAPE = Shape(layers=3, hidden=1024, rank=16)
_WEIGHT, _CHANGE, _DIRECTIONS, _DECAY = 0.02, 5e-4, 8, 0.85
_SHARES = (0.5, 0.25, 0.1)  # of the alignment's energy that lies in the directions, layer by layer

Pair = tuple[Path, Path]


@dataclass(frozen=True)
class Found:
    """What one pair of references gives, by module.

    Attributes:
        projected: P B of the paper's operator, all modules projected, as written.
        snr: None for exact references.
        refused: whether `paper` refuses without --allow-noisy-reference.
        subspaces: U_k (out, k), as many of `RANK` directions as stand above the noise.
    """

    cosines: Mapping[str, float | None]
    projected: Mapping[str, torch.Tensor]
    snr: Sequence[float | None]
    refused: bool
    subspaces: Mapping[str, torch.Tensor]


def main() -> None:
    """Prints a table for each family."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="safelora-references-") as scratch:
        print_family("tiny", TINY / "adapter", write_tiny, Path(scratch))
        print_family("typical", write_adapter(Path(scratch) / "adapter.gguf"), write_typical, Path(scratch))


def print_family(name: str, adapter: Path, write: Callable[[Path, QType], Pair], scratch: Path) -> None:
    exact = measure(write(scratch, QType.F16), adapter, scratch)
    rows = [row(QType.F16, exact, exact)]
    rows += [row(qtype, measure(write(scratch, qtype), adapter, scratch), exact) for qtype in TYPES[1:]]
    print(f"{name}: {len(exact.cosines)} modules\n")
    print(markdown_table([HEAD, *rows]), end="\n\n", flush=True)


def measure(references: Pair, adapter: Path, scratch: Path) -> Found:
    """Everything about one pair, whose files are then deleted."""
    out = scratch / "out.gguf"
    try:
        project_adapter(*references, adapter, out, force=True, device="cpu")
        refused = False
    except UnsupportedError:
        refused = True
    report = project_adapter(
        *references, adapter, out, selection=Selection("all"), allow_noisy_reference=True, force=True, device="cpu"
    )
    found = Found(
        cosines={module.name: module.cosine for module in report.modules},
        projected=read_projected(out),
        snr=[module.snr for module in report.modules],
        refused=refused,
        subspaces=subspaces(references, adapter),
    )
    for path in references:
        path.unlink()
    return found


def subspaces(references: Pair, adapter: Path) -> dict[str, torch.Tensor]:
    """What `project --operator subspace --rank 6` uses of each module, by module."""
    before, after = map(open_model, references)
    base, aligned, source = common_layout(before, after, open_adapter(adapter))
    triples = pair_up(base, aligned, source)
    differences = Differences(base, aligned, triples, torch.device("cpu"))
    found = {}
    for triple in triples:
        difference = differences.of(triple)
        leading = leading_subspace(difference.v, RANK)
        kept = directions_above(leading.singular_values, difference.edge)
        found[triple.pair.module] = leading.u[:, :kept].clone()
    return found


def row(qtype: QType, found: Found, exact: Found) -> tuple[str, ...]:
    """One line under `HEAD`."""
    cosines = [abs((found.cosines[name] or 0.0) - (value or 0.0)) for name, value in exact.cosines.items()]
    errors = [relative(found.projected[name], b) for name, b in exact.projected.items()]
    kept = [u.shape[1] for u in found.subspaces.values()]
    angles = [largest_angle(u, exact.subspaces[name]) for name, u in found.subspaces.items() if u.shape[1]]
    snr = [value for value in found.snr if value is not None]
    first = found is exact
    return (
        qtype.name,
        spread(brief(min(snr)), brief(max(snr))) if snr else "exact",
        "refuses" if found.refused else "works",
        *(shared(rule, found, exact) for rule in RULES),
        "" if first else f"{np.mean(cosines):.1g}, at most {max(cosines):.1g}",
        "" if first else f"{np.mean(errors):.1%}, at most {max(errors):.1%}",
        spread(f"{min(kept)}", f"{max(kept)}") + ("" if len(set(kept)) == 1 else f", mean {np.mean(kept):.1f}"),
        "" if first else f"{np.median(angles):.1f}°, at most {max(angles):.1f}°" if angles else "-",
    )


def shared(rule: Selection, found: Found, exact: Found) -> str:
    """How many of the F16 pair's choices were chosen again, and how many new ones."""
    wanted, chosen = (set(select(dict(one.cosines), rule)) for one in (exact, found))
    if found is exact:
        return f"{len(wanted)}"
    return f"{len(wanted & chosen)} of {len(wanted)}, {len(chosen - wanted)} new"


def spread(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def brief(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def largest_angle(u: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest principal angle in degrees between span(u) and its best counterpart in span(exact)."""
    u, exact = u.double(), exact.double()
    beside = u - exact @ (exact.T @ u)  # its norm is the sine, exact for small angles
    return math.degrees(math.asin(min(1.0, float(torch.linalg.matrix_norm(beside, 2)))))


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def read_projected(path: Path) -> dict[str, torch.Tensor]:
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: torch.from_numpy(tensor.data.copy())
        for tensor in reader.tensors
        if tensor.name.endswith(".lora_b")
    }


def write_tiny(root: Path, qtype: QType) -> Pair:
    base, aligned = (write_model(root / f"{role}.gguf", TINY / role, qtype) for role in ("base", "aligned"))
    return base, aligned


def write_typical(root: Path, qtype: QType) -> Pair:
    for role in ("base", "aligned"):
        writer = gguf.GGUFWriter(root / f"{role}.gguf", "llama")
        for name, shape, _ in typical_modules():
            add_tensor_info(writer, name, shape, qtype)
        start_tensors(writer)
        for name, shape, layer in typical_modules():
            weight = _WEIGHT * normal(f"base {name}", shape)
            if role == "aligned":
                weight += alignment(name, shape, _SHARES[layer])
            writer.write_tensor_data(encoded(weight, qtype))
        writer.close()
    return root / "base.gguf", root / "aligned.gguf"


def write_adapter(path: Path) -> Path:
    """A random LoRA on every module, in F32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * _SHAPE.rank)
    for name, (rows, columns), _ in typical_modules():
        writer.add_tensor(f"{name}.lora_a", normal(f"a {name}", (_SHAPE.rank, columns)) / np.float32(columns**0.5))
        writer.add_tensor(f"{name}.lora_b", normal(f"b {name}", (rows, _SHAPE.rank)) * np.float32(0.01))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def typical_modules() -> list[tuple[str, tuple[int, int], int]]:
    """GGUF name, (out, in) and layer."""
    short = {peft: name for name, peft in PROJECTIONS.items()}
    return [
        (f"blk.{layer}.{short[name]}.weight", shape, layer)
        for layer in range(_SHAPE.layers)
        for name, shape in _SHAPE.projections().items()
    ]


def alignment(name: str, shape: tuple[int, int], share: float) -> np.ndarray:
    """V (out, in) of root mean square `_CHANGE`, `share` of its energy in `_DIRECTIONS` directions."""
    rows, columns = shape
    left, right = normal(f"left {name}", (rows, _DIRECTIONS)), normal(f"right {name}", (columns, _DIRECTIONS))
    strengths = np.float32(_DECAY) ** np.arange(_DIRECTIONS, dtype=np.float32)
    directed, spread = (left * strengths) @ right.T, normal(f"spread {name}", shape)
    parts = ((directed, share), (spread, 1 - share))
    scaled = [part * np.float32(_CHANGE * (energy / np.mean(part**2)) ** 0.5) for part, energy in parts]
    return scaled[0] + scaled[1]


def normal(seed: str, shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(seed.encode())).standard_normal(shape, np.float32)


if __name__ == "__main__":
    main()

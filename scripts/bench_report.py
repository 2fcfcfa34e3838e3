"""Benchmark figures as tables, as JSON and as sections of BENCHMARKS.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date

from bench_models import Shape
from bench_runs import Machine, Series, ratios

_TITLES = {
    "ours": "safelora-gguf project, files to file",
    "dense": "dense method, both models loaded whole",
    "arithmetic": "dense arithmetic alone, module by module",
}
_DEQUANTIZED = "dense method, both models dequantized whole by gguf-py"
_COLUMNS = ("method", "median s", "min to max s", "peak anonymous", "peak resident", "ours is faster by")


@dataclass(frozen=True)
class Report:
    """Figures of `bench.py project`.

    Attributes:
        references: what they are stored as, "bf16" or "Q4_K GGUF".
        subspace: rank of the subspace operator, None for the paper's.
        errors: the largest differences between the methods' results.
    """

    shape: Shape
    references: str
    subspace: int | None
    threads: int
    device: str
    machine: Machine
    series: Mapping[str, Series]
    errors: Mapping[str, float]

    def to_json(self) -> str:
        slow = {name: found for name, found in self.series.items() if name != "ours"}
        data = {
            "shape": asdict(self.shape),
            "references": self.references,
            "subspace_rank": self.subspace,
            "threads": self.threads,
            "device": self.device,
            "date": date.today().isoformat(),
            "machine": self.machine.to_json(),
            "methods": {name: found.to_json() for name, found in self.series.items()},
            "faster_than": {name: ratios(found, self.series["ours"])[0] for name, found in slow.items()},
            "largest_difference": dict(self.errors),
        }
        return json.dumps(data, indent=2)

    def to_table(self) -> str:
        table = plain_table([_COLUMNS, *self._rows()])
        return "\n".join([self._subject(), "", table, "", self._agreement(), place(self.machine)])

    def to_markdown(self, command: str) -> str:
        table = markdown_table([_COLUMNS, *self._rows()])
        ending = f"{self._agreement()} {place(self.machine)}"
        return "\n".join([self._subject(), "", table, "", f"`{command}`", "", ending])

    def _rows(self) -> list[tuple[str, ...]]:
        return [self._row(name, found) for name, found in self.series.items()]

    def _row(self, name: str, found: Series) -> tuple[str, ...]:
        faster = ""
        if name != "ours":
            middle, low, high = ratios(found, self.series["ours"])
            faster = f"{middle:.1f} times ({low:.1f} to {high:.1f})"
        spread = f"{min(found.seconds):.2f} to {max(found.seconds):.2f}"
        memory = (_megabytes(found.peak_anonymous), _megabytes(found.peak_resident))
        title = _DEQUANTIZED if name == "dense" and self.references.endswith("GGUF") else _TITLES[name]
        return (title, f"{found.median:.2f}", spread, *memory, faster)

    def _subject(self) -> str:
        shape, ours = self.shape, self.series["ours"]
        runs, outcome = len(ours.seconds), ours.outcomes[-1]
        operator = "operator paper" if self.subspace is None else f"operator subspace of rank {self.subspace}"
        return (
            f"project, {operator}: {shape.layers} layers, hidden {shape.hidden}, ffn {shape.ffn}, {shape.heads} / "
            f"{shape.key_value_heads} heads, references {self.references}, LoRA rank {shape.rank} on "
            f"{len(outcome.cosines)} modules, of which {len(outcome.projected)} were projected; "
            f"{self.threads} cores, {self.device}, {runs} runs each"
        )

    def _agreement(self) -> str:
        return (
            f"Largest difference between the methods' cosines {self.errors['cosine']:.1e}, between their B "
            f"{self.errors['B']:.1e} (relative)."
        )


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under their heads, in columns; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) if place else text.ljust(width) for place, (text, width) in cells)
        for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same in markdown."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body])


def place(machine: Machine) -> str:
    """Where, with what and when figures were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    load = "" if machine.load is None else f"; load {machine.load:.1f} before the first run"
    return f"{machine.processor}, {machine.cores} cores, {versions}, {date.today().isoformat()}{load}."


def _megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:,.0f} MB"

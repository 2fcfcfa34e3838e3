"""What the results of `merge`, `convert model` and `run` look like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from safelora_gguf.terminal import MOST_WARNINGS, at_most, printable

if TYPE_CHECKING:
    from safelora_gguf.merging.report import MergeReport
    from safelora_gguf.model_conversion_report import ConvertModelReport
    from safelora_gguf.recipe import RunReport


def merge_table(report: MergeReport) -> Table:
    """Every tensor that changed."""
    table = _table("tensor", "shape", "type", "adapters", "|change| / |weight|", "stored error")
    for tensor in report.tensors:
        adapters = ", ".join(str(number + 1) for number in tensor.adapters)
        table.add_row(printable(tensor.name), _shape(tensor.shape), tensor.type or "-", adapters,
                      _number(tensor.delta_norm, ".4f"), _number(tensor.stored_error, ".1e"))  # fmt: skip
    return table


def merge_summary(report: MergeReport) -> list[str]:
    """What happened, in a few lines; losses are warnings, not part of the result."""
    adapters = [entry for entry in report.inputs if entry.role == "adapter"]
    named = [f"{printable(entry.path)} at {scale:g}" for entry, scale in zip(adapters, report.scales, strict=True)]
    verb = "would be merged" if report.output is None else "merged"
    lines = [f"{verb} into {len(report.tensors)} tensors: {', '.join(named)}"]
    files = f" in {len(report.shards)} files" if len(report.shards) > 1 else ""
    if report.output is None:
        path, size = report.planned_output
        return [*lines, f"would write {printable(path)}, {size:,} bytes, {report.outtype}", *_notes(report)]
    wrote = f"wrote {printable(report.output.path)}{files}, {report.output.bytes:,} bytes, {report.outtype}"
    return [*lines, wrote, *_notes(report), *(f"next: {printable(line)}" for line in report.next_steps)]


def convert_model_table(report: ConvertModelReport) -> Table:
    """How many tensors became what, and the largest rounding error among them."""
    table = _table("stored as", "from", "tensors", "largest stored error")
    kinds = Counter((tensor.type or report.outtype, tensor.source_type or "made") for tensor in report.tensors)
    for (kind, source), count in kinds.items():
        errors = [tensor.stored_error for tensor in report.tensors
                  if (tensor.type or report.outtype, tensor.source_type or "made") == (kind, source)]  # fmt: skip
        known = [error for error in errors if error is not None]
        table.add_row(kind, source, str(count), _number(max(known, default=None), ".1e"))
    return table


def convert_model_summary(report: ConvertModelReport) -> list[str]:
    """What was written, in a few lines; losses are warnings, not part of the result."""
    if report.output is None:
        path, size = report.planned_output
        return [f"would write {printable(path)}, {size:,} bytes, {report.outtype}", *_notes(report)]
    more = len(report.files) - 1 if report.files else 0
    files = f" and {more} {'file' if more == 1 else 'files'} more" if more else ""
    wrote = f"wrote {printable(report.output.path)}{files}, {report.output.bytes:,} bytes, {report.outtype}"
    return [wrote, *_notes(report)]


def run_text(report: RunReport) -> str:
    """Every step's own text, under its name."""
    parts = []
    for step in report.steps:
        told = "complete already" if step.skipped else ""
        told += f", with the verdict {step.report['verdict']}" if step.skipped and step.report and step.status else ""
        told = told or ("" if step.report is not None else "will be checked when the steps before it are complete")
        heading = f"== {printable(step.name)}{f': {told}' if told else ''}"
        parts.append(f"{heading}\n{step.text}")
    return "\n".join(parts)


def _table(first: str, *others: str) -> Table:
    table = Table(title=None, box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _notes(report: MergeReport | ConvertModelReport) -> list[str]:
    others = [note for note in report.notes if note not in report.losses]
    return at_most([f"note: {printable(note)}" for note in others], MOST_WARNINGS, "notes")


def _shape(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

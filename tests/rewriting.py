"""Checkpoints written again and looked at without our reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from converters.changes import Change, Edits, Rows
from converters.checkpoint import open_checkpoint
from converters.checkpoint_output import write_checkpoint
from converters.gguf_rounding import StoredError


def rows_of(tensor: torch.Tensor) -> Rows:
    """New values for `write_checkpoint`, cut from a whole tensor."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return lambda start, stop: matrix[start:stop]


def edits_of(values: Mapping[str, torch.Tensor]) -> Edits:
    """New values of tensors that keep their shapes."""
    return Edits({name: Change(name, rows_of(tensor)) for name, tensor in values.items()})


def write(source: Path, target: Path, values: Mapping[str, torch.Tensor], **options: Any) -> Mapping[str, StoredError]:
    options = {"outtype": None, "card": "# card\n", "metadata": {"tool": "ours"}, "force": False, **options}
    return write_checkpoint(open_checkpoint(source), target, edits_of(values), **options)


def raw(file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor's type, shape and bytes, in the order of the data, read by the format's description."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    table.pop("__metadata__", None)
    ordered = sorted(table.items(), key=lambda item: item[1]["data_offsets"])
    begin = 8 + length
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            data[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]],
        )
        for name, entry in ordered
    }


def listing(directory: Path) -> list[str]:
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if not file.is_dir())

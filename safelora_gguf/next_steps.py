"""Commands that a report names as the next ones."""

from __future__ import annotations

from converters.layouts import find_table
from converters.models import ModelDescription


def into_gguf(model: ModelDescription, place: str) -> str:
    """The command that makes GGUF of a directory that was written.

    Args:
        model: one of the same architecture.
        place: the directory, quoted for a shell.
    """
    table = find_table(model)
    if table is not None and table.writing is not None:
        return f"safelora-gguf convert model {place} --out MODEL.gguf"
    return f"convert_hf_to_gguf.py {place} --outfile MODEL.gguf"

"""Commands that a report names as the next ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.errors import InputError
from converters.layouts import find_table
from converters.model_keys import model_keys
from converters.models import ModelDescription
from converters.scoring_models import refuse_scoring_models


def into_gguf(model: ModelDescription, place: str) -> str:
    """The command that makes GGUF of a directory that was written.

    Args:
        model: one of the same architecture.
        place: the directory, quoted for a shell.
    """
    if _is_converted_here(model):
        return f"safelora-gguf convert model {place} --out MODEL.gguf"
    return f"convert_hf_to_gguf.py {place} --outfile MODEL.gguf"


def _is_converted_here(model: ModelDescription) -> bool:
    table = find_table(model)
    if table is None or table.writing is None:
        return False
    config: Mapping[str, Any] = getattr(model, "config", {})
    try:
        model_keys(config, model.described_by, table)
        refuse_scoring_models(model.described_by.parent, config, table.name)
    except InputError:
        return False
    return True

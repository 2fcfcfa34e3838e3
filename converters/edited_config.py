"""config.json where a model's tensors were changed: the same text wherever that says the truth.

What follows from the tensors (the vocabulary's size, tied embeddings) stands in the outermost object or in
`text_config`, and takes its new value wherever it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.paths import parse_json_object

_INNER = "text_config"
_TYPE = re.compile(rb'((?<!\\)"(?:torch_)?dtype"\s*:\s*)"(torch\.)?(?:b?float16|float32|float64)"')


def edited_config(config: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json with new values of some keys, nested ones included; a key that is nowhere is added to every
    part that a language model is read from."""
    result = dict(config)
    inner = dict(result[_INNER]) if isinstance(result.get(_INNER), dict) else None
    for key, value in changed.items():
        tables = [table for table in (result, inner) if table is not None]
        for table in [table for table in tables if key in table] or tables:
            table[key] = value
    if inner is not None:
        result[_INNER] = inner
    return result


def config_bytes(data: bytes, file: Path, changed: Mapping[str, Any], dtype: str | None) -> bytes:
    """A config.json's text with new values of some keys, and another type of the weights.

    Args:
        data: the text as it is, which stays so where nothing has to change; with new values it is written anew.
        dtype: torch's name of the type, or None.

    Raises:
        FormatError: it is no JSON object.
    """
    if changed:
        before = parse_json_object(data, "the model's config.json", file)
        after = edited_config(before, changed)
        if after != before:
            data = (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode()
    return data if dtype is None else _TYPE.sub(rb'\g<1>"\g<2>' + dtype.encode() + b'"', data)

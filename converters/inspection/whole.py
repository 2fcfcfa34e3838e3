"""What merging uses of an adapter beside its pairs, for `inspect`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from converters.errors import InputError
from converters.inspection.findings import listed
from converters.names import first_few

if TYPE_CHECKING:
    from converters.adapters.lora import LoraAdapter

_MEANT = {
    "replaces": "merge puts them in the place of the model's",
    "adds": "merge adds them, times the scaling, to the model's, or makes new ones of them",
    "rows": "merge puts these rows in the place of the model's",
}


def whole_notes(adapter: LoraAdapter, tell: Callable[[InputError], None]) -> list[str]:
    """A sentence for every kind of tensor that was trained whole.

    Args:
        tell: about what keeps merge from using them.
    """
    try:
        every = adapter.whole.values()
    except InputError as error:
        tell(error)
        return []
    found: dict[str, list[str]] = {}
    for tensor in every:
        if not tensor.frozen:
            rows = f", rows {first_few(list(map(str, tensor.rows)))}" if tensor.kind == "rows" else ""
            found.setdefault(tensor.kind, []).append(tensor.target + rows)
    return [f"{listed(names)}: {_MEANT[kind]}" for kind, names in found.items()]

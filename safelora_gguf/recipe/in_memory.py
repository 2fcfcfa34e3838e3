"""Steps that write nothing: their model is taken by the next one, and no float file stands between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelora_gguf.unwritten import Unwritten

_SETTINGS = {
    "extrapolate": ("rank", "coef", "tolerance", "device", "allow_noisy_reference"),
    "merge": ("device", "strict"),
}


def made_in_memory(command: str, values: Mapping[str, Any]) -> Unwritten:
    """What a command's model would be.

    Args:
        values: its function's arguments, as far as they are given; `model` may be a model in memory itself.

    Raises: as the command does.
    """
    settings = {name: values[name] for name in _SETTINGS[command] if name in values}
    return _MAKERS[command](values, settings)


def _extrapolated(values: Mapping[str, Any], settings: Mapping[str, Any]) -> Unwritten:
    from safelora_gguf.extrapolation import extrapolated_model

    return extrapolated_model(values["base"], values["aligned"], **settings)


def _merged(values: Mapping[str, Any], settings: Mapping[str, Any]) -> Unwritten:
    from safelora_gguf.merge import merged_model
    from safelora_gguf.smoke import split_scale

    return merged_model(values["model"], [split_scale(text) for text in values["adapter"]], **settings)


_MAKERS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Unwritten]] = {
    "extrapolate": _extrapolated,
    "merge": _merged,
}

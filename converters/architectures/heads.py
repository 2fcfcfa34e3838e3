"""The attention heads of a model, by its config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from converters.errors import FormatError

_QUERY = ("num_attention_heads", "n_head")  # the second names are those of Falcon's older files
_KEY_VALUE = ("num_key_value_heads", "num_kv_heads", "n_head_kv")

# What config.json may leave to the default of its model_type, as Gemma 3 4B's text_config does: (query, key-value).
_DEFAULTS: Mapping[str, tuple[int, int]] = {"gemma3_text": (8, 4)}


@dataclass(frozen=True)
class HeadCounts:
    """The attention heads of one model, which head-wise transforms depend on.

    Their size is no part of it: it follows from the rows, and so may be more or less than hidden / heads.

    Attributes:
        query, key_value: how many. Where keys and values come from one latent vector (DeepSeek), llama.cpp counts one.
        latent_key: there, a key's size without its rotated part; 0 for others.
    """

    query: int
    key_value: int
    latent_key: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HeadCounts:
        """From config.json; composite models keep theirs in `text_config`.

        Raises:
            FormatError: the counts are missing or no positive numbers.
        """
        table = _text_part(config)
        default_query, default_key_value = _DEFAULTS.get(str(table.get("model_type")), (None, None))
        query = _first(table, _QUERY, default_query)
        latent_key = _first(table, ("qk_nope_head_dim",), 0) if table.get("kv_lora_rank") else 0
        key_value = 1 if latent_key or _shares_one_key(table) else _first(table, _KEY_VALUE, default_key_value)
        if key_value is None:
            key_value = query
        if not _is_count(query) or not _is_count(key_value):
            counts = f"{str(query)[:40]!r} attention heads and {str(key_value)[:40]!r} key-value heads"
            raise FormatError(f"config.json gives {counts}, expected whole numbers")
        if latent_key and not _is_count(latent_key):
            found = f"config.json gives qk_nope_head_dim {str(latent_key)[:40]!r}, expected a whole number"
            raise FormatError(found)
        return cls(query, key_value, latent_key)


NO_HEADS = HeadCounts(1, 1)
"""For rules that no heads matter to."""


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    return config if _first(inner, _QUERY) is None and _first(config, _QUERY) is not None else inner


def _shares_one_key(table: Mapping[str, Any]) -> bool:
    """Falcon 7B's way of saying that there is one key-value head; its num_kv_heads then means nothing."""
    if "num_key_value_heads" in table or table.get("new_decoder_architecture"):
        return False
    return table.get("multi_query") is True


def _first(table: Mapping[str, Any], keys: Sequence[str], default: int | None = None) -> Any:
    return next((table[key] for key in keys if table.get(key) is not None), default)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 1 << 20

"""config.json read with care: every value is checked for what it must be before anything is made of it.

A model's configuration comes from strangers, and what it says becomes lengths of arrays and numbers of fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.errors import FormatError

MOST = (1 << 24) - 1
"""Of what is counted, if nothing else is said: more than any model has."""

_LARGEST = 3.4028234e38  # of float32, in which GGUF keeps numbers
_SHOWN = 40  # characters of a value that is not what it should be
_REMEDY = "take config.json from the model's original repository"


@dataclass(frozen=True)
class ConfigReader:
    """Typed access to the settings of one model.

    A composite model has those of its language model in `text_config`, which come first. A setting that is missing
    counts as its default; one that is null counts as absent, default or not, as with transformers.

    Attributes:
        config: what config.json holds.
        file: config.json, for messages.
        defaults: what transformers takes for settings that the file leaves out.
        where: in front of a setting's name in messages, for settings within settings.
    """

    config: Mapping[str, Any]
    file: Path
    defaults: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def find(self, key: str) -> Any:
        """A setting as it stands there, of any type; None where it is missing or null."""
        text = self.config.get("text_config")
        tables = (text, self.defaults, self.config) if isinstance(text, dict) else (self.config, self.defaults)
        return next((table[key] for table in tables if key in table), None)

    def has(self, key: str) -> bool:
        """Whether there is a value, be it the default."""
        return self.find(key) is not None

    def count(self, key: str, *, least: int = 1, most: int = MOST) -> int:
        """A whole number.

        Raises:
            FormatError: it is missing, something else, or outside `least` to `most`.
        """
        value = self.find(key)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, *, least: float = -_LARGEST) -> float:
        """A number that float32 can hold.

        Raises:
            FormatError: it is missing, something else, not finite, or below `least`.
        """
        value = self.find(key)
        if not _is_number(value) or not least <= value <= _LARGEST:
            limit = "" if least == -_LARGEST else f" of at least {least:g}"
            raise self.wrong(key, f"a finite number{limit}")
        return float(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers that float32 can hold.

        Raises:
            FormatError: it is missing, something else, of another length, or holds something else.
        """
        values = self.find(key)
        if not isinstance(values, list) or len(values) != length or not all(map(_is_number, values)):
            raise self.wrong(key, f"a list of {length} finite numbers")
        return tuple(map(float, values))

    def text(self, key: str, default: str) -> str:
        """A word, or `default` where it is missing or null.

        Raises:
            FormatError: it is something else.
        """
        value = self.find(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false, or `default` where it is missing or null.

        Raises:
            FormatError: it is something else.
        """
        value = self.find(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def inner(self, key: str) -> ConfigReader | None:
        """The settings within a setting; None where it is missing, null or empty.

        Raises:
            FormatError: it is something else.
        """
        value = self.find(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object with settings")
        return ConfigReader(value, self.file, where=f"{self.where}{key}.")

    def wrong(self, key: str, expected: str) -> FormatError:
        """The error for a setting that is not what it should be."""
        value = self.find(key)
        found = "missing or null" if value is None else shown(value)
        return FormatError(f"{self.where}{key} is {found}, expected {expected}; {_REMEDY}", file=self.file)


def shown(value: Any) -> str:
    """A setting as messages quote it, in bounded length."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'group'} of {len(value)}"
    return repr(value[:_SHOWN] if isinstance(value, str) else value)[:_SHOWN]


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return -_LARGEST <= value <= _LARGEST
    return type(value) is float and math.isfinite(value) and abs(value) <= _LARGEST

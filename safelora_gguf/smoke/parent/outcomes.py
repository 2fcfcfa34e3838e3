"""What came of what a session was asked: items where there are any, and a failure told, not raised."""

from __future__ import annotations

from dataclasses import dataclass

from converters.errors import Error
from safelora_gguf.smoke.protocol import Answer, Continued, Divergence, InputGroup


@dataclass(frozen=True)
class Answered:
    """Answers, one for each chat; None: not asked.

    Attributes:
        failure: the first thing that went wrong with the whole, even where everything could be answered in the end.
    """

    answers: tuple[Answer | None, ...]
    failure: Error | None = None


@dataclass(frozen=True)
class ContinuedAll:
    """Prompts with their answers as tokens, one for each chat; None: not asked. `failure` as in `Answered`."""

    items: tuple[Continued | None, ...]
    failure: Error | None = None


@dataclass(frozen=True)
class Recorded:
    """What a record holds.

    Attributes:
        positions: distributions of each chat; 0 where there are none.
        vocabulary: digest of the recording model's, "" after a failure to load it.
        failure: why there is no record at all, or what went wrong before there was one.
        complete: there is one.
    """

    positions: tuple[int, ...]
    vocabulary: str
    failure: Error | None = None
    complete: bool = True


@dataclass(frozen=True)
class Diverged:
    """Divergences from the items of a record; None: not recorded, or not to be told."""

    items: tuple[Divergence | None, ...]
    failure: Error | None = None


@dataclass(frozen=True)
class Captured:
    """What a file of captured inputs holds.

    Attributes:
        groups: where each input stands; every weight that was asked for is in one of them. None where nothing was read.
        rows: of each reading, how many of its rows can be used: all that it keeps, or 0 where it could not be read,
            whose rows stand in the file all the same.
        errors: of each reading, why it could not be read; none at all without a file.
        notes: what the child did otherwise than asked.
        failure: why there is no file, or what went wrong before there was one.
        complete: there is one.
    """

    groups: tuple[InputGroup, ...]
    rows: tuple[int, ...]
    errors: tuple[str | None, ...] = ()
    notes: tuple[str, ...] = ()
    failure: Error | None = None
    complete: bool = True

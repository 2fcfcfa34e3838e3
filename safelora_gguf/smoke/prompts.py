"""Prompt sets: the packaged one, or JSONL files of the user's.

One object a line: `id`, `kind` (harmful, borderline, benign, task), `prompt`, optional `category`, optional
`expect`, a regular expression that the answer to a task must match somewhere. Other fields are left unread.
The files come from strangers: sizes are bounded, every problem names its file and line, and patterns are
matched with a time limit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import regex

from converters.errors import FileMissingError, FormatError

Kind = Literal["harmful", "borderline", "benign", "task"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_BYTES = 64 * 2**20
MAX_PROMPTS = 100_000
MAX_PATTERN = 2_000
MATCH_SECONDS = 1.0

# A test pins the file's digest to this version, so that no edit passes without a new one.
PACKAGED_NAME = "standard"
PACKAGED_VERSION = "1"


@dataclass(frozen=True)
class Prompt:
    id: str
    kind: Kind
    prompt: str
    category: str | None = None
    expect: str | None = None
    source: str | None = None  # file:line, for messages


@dataclass(frozen=True)
class PromptSet:
    """Prompts with a name and a version that tell in a report which they were."""

    name: str
    version: str
    prompts: tuple[Prompt, ...]

    @property
    def counts(self) -> dict[str, int]:
        return {kind: sum(prompt.kind == kind for prompt in self.prompts) for kind in KINDS}


def load_prompts(files: Sequence[str | Path] = ()) -> PromptSet:
    """The packaged set, or the files one after another instead of it.

    Files of the user's are named by their file names and versioned by a digest of their bytes.

    Raises:
        FileMissingError: a file can't be opened.
        FormatError: a line is not a prompt, an id occurs twice, a file is too large or holds no prompt.
    """
    if not files:
        return packaged_prompts()
    paths = [Path(file) for file in files]
    contents = [_read(path) for path in paths]
    prompts = [prompt for path, data in zip(paths, contents, strict=True) for prompt in parse_prompts(data, path)]
    _check_ids(prompts)
    if len(prompts) > MAX_PROMPTS:
        raise FormatError(f"the files hold {len(prompts)} prompts together; at most {MAX_PROMPTS} are read")
    digest = hashlib.sha256(b"\n".join(contents)).hexdigest()
    return PromptSet("+".join(path.name for path in paths), f"sha256:{digest[:12]}", tuple(prompts))


def packaged_prompts() -> PromptSet:
    data = (resources.files("safelora_gguf") / "prompts" / f"{PACKAGED_NAME}.jsonl").read_bytes()
    return PromptSet(PACKAGED_NAME, PACKAGED_VERSION, tuple(parse_prompts(data, f"{PACKAGED_NAME}.jsonl")))


def parse_prompts(data: bytes, file: str | Path) -> list[Prompt]:
    """Prompts of one JSONL file; a byte order mark, CRLF and blank lines are fine."""
    prompts: list[Prompt] = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        if len(prompts) >= MAX_PROMPTS:
            raise FormatError(f"holds more than {MAX_PROMPTS} prompts", file=file)
        prompts.append(_parse_line(raw, file, number))
    if not prompts:
        raise FormatError(
            'holds no prompts; expected one object a line: {"id": "1", "kind": "harmful", "prompt": "..."}',
            file=file,
        )
    _check_ids(prompts)
    return prompts


def meets_expectation(prompt: Prompt, answer: str) -> bool | None:
    """Whether a task's answer matches its `expect`; None for what is no task or expects nothing.

    Raises:
        FormatError: the pattern takes longer than a second on this answer.
    """
    if prompt.kind != "task" or prompt.expect is None:
        return None
    try:
        return regex.search(prompt.expect, answer, timeout=MATCH_SECONDS) is not None
    except TimeoutError:
        raise FormatError(
            f"{prompt.source or prompt.id}: expect {_shown(prompt.expect)} backtracks without end on an "
            f"answer (stopped after {MATCH_SECONDS:g} s); expected a pattern without nested repetitions"
        ) from None


def _read(path: Path) -> bytes:
    if not path.exists():
        raise FileMissingError("no such file; expected a JSONL file of prompts", file=path)
    if not path.is_file():
        raise FileMissingError("is not a regular file; expected a JSONL file of prompts", file=path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise FileMissingError(f"can't be read: {error.strerror or error}", file=path) from error
    if len(data) > MAX_BYTES:
        raise FormatError(f"is larger than {MAX_BYTES // 2**20} MiB, the limit for prompt files", file=path)
    return data


def _parse_line(raw: bytes, file: str | Path, number: int) -> Prompt:
    def wrong(message: str) -> FormatError:
        return FormatError(f"line {number}: {message}", file=file)

    try:
        fields = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise wrong(f"is not UTF-8 (byte {error.start}); expected a JSON object in UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise wrong(f"is not JSON ({reason}); expected one JSON object a line") from error
    if not isinstance(fields, dict):
        raise wrong(f"holds {_shown(fields)}; expected a JSON object with id, kind and prompt")
    try:
        return _to_prompt(fields, f"{Path(file).name} line {number}")
    except ValueError as error:
        raise wrong(str(error)) from error


def _to_prompt(fields: dict[str, Any], source: str) -> Prompt:
    """Raises ValueError with what was found and expected."""
    identity = fields.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        fields = {**fields, "id": str(identity)}
    kind = fields.get("kind")
    if kind not in KINDS:
        found = "no kind" if kind is None else f"kind {_shown(kind)}"
        raise ValueError(f"{found}; expected one of {', '.join(KINDS)}")
    category, expect = _optional(fields, "category"), _optional(fields, "expect")
    if expect is not None:
        _check_pattern(expect)
    return Prompt(_required(fields, "id"), kind, _required(fields, "prompt"), category, expect, source)


def _required(fields: dict[str, Any], name: str) -> str:
    value = _optional(fields, name)
    if value is None or not value.strip():
        raise ValueError(f"{name} is missing or empty; expected a text")
    return value


def _optional(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_shown(value)}; expected a text")  # noqa: TRY004  (the file's fault)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a surrogate pair; expected valid Unicode") from None
    return value


def _check_pattern(expect: str) -> None:
    if len(expect) > MAX_PATTERN:
        raise ValueError(f"expect is {len(expect)} characters long; at most {MAX_PATTERN} are taken")
    try:
        regex.compile(expect)
    except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"expect {_shown(expect)} is no regular expression: {error}") from error


def _check_ids(prompts: Sequence[Prompt]) -> None:
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        first = seen.setdefault(prompt.id, prompt)
        if first is not prompt:
            raise FormatError(f"{prompt.source}: id {_shown(prompt.id)} is taken already by {first.source}")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else text[:77] + "..."

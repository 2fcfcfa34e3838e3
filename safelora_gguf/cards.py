"""Files for desktops beside an output: a model card, and for GGUF a Modelfile.

    out.gguf             out.md and out.Modelfile beside it
    out-00001-of-...     out.md; Ollama takes no split models
    a directory          README.md in it

Everything follows from the report, the sources' headers and the output's own, with no times and no paths of this
machine: the same inputs give the same bytes, and a card that was written before a measurement is known again after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.atomic import atomic_file, check_target, refuse_to_overwrite
from converters.errors import MismatchError, OutputPathError
from converters.fingerprint import fingerprint_gguf
from converters.gguf_shards import read_gguf_headers
from converters.paths import read_json_object
from safelora_gguf.card_sections import check_report, entries_of
from safelora_gguf.output_card import MadeOutput, is_file, modelfile_of, output_card, sources_of, stem_of

_README = "README.md"
_MAX_REPORT = 64 << 20


def read_report(path: Path) -> dict[str, Any]:
    """A report of any command from its JSON file.

    Raises:
        FileMissingError, FormatError: it can't be read, or is no JSON object.
    """
    return read_json_object(path, "the report", _MAX_REPORT)


def check_desktop_files(out: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Whether the files may be written, before any work is done. In a directory there is nothing to check: it is
    written whole.

    Args:
        out: the output's path; of a split model with or without the numbers.
        inputs: what stays as it is, whatever `force` says; of directories, their cards.

    Raises:
        OutputPathError: a file exists already, is an input, or can't be written there.
    """
    if not is_file(out):
        return
    if not out.name.isprintable():
        told = "has letters in its name that no Modelfile can hold; choose another name, or leave out --card"
        raise OutputPathError(told, file=ascii(str(out)))
    for target in desktop_paths(out):
        refuse_to_overwrite(target, [*inputs, *(path / _README for path in inputs), out])
        check_target(target, force=force)


def desktop_paths(out: Path) -> tuple[Path, Path]:
    """Where card and Modelfile of a GGUF file go."""
    return out.with_name(f"{stem_of(out)}.md"), out.with_name(f"{stem_of(out)}.Modelfile")


def desktop_files(
    output: Path,
    report: Mapping[str, Any],
    sources: Sequence[Path] = (),
    smoke: Mapping[str, Any] | None = None,
    invocation: str | None = None,
) -> dict[str, str]:
    """The files' texts by name.

    Args:
        output: what was written, as it lies there: a GGUF file, the first shard of a split one, or a directory.
        report: the JSON of the project, extrapolate, merge or convert that wrote it.
        sources: models and adapters whose licenses it carries; by default the report's inputs.
        smoke: the JSON of a smoke test, for its refusals.
        invocation: the command line, see `command_line`.

    Raises:
        FormatError: no such report, or one of a dry run. MismatchError: the smoke test measured other files.
    """
    check_report(report)
    _check_measured(output, smoke)
    made = MadeOutput(output, report, tuple(sources_of(report, sources)))
    card = output_card(made, smoke, invocation).to_markdown()
    files = {f"{stem_of(output)}.md" if made.is_file else _README: card}
    if made.is_file and not made.is_split:
        files[f"{stem_of(output)}.Modelfile"] = modelfile_of(made)
    return files


def write_desktop_files(
    output: Path,
    report: Mapping[str, Any],
    sources: Sequence[Path] = (),
    smoke: Mapping[str, Any] | None = None,
    invocation: str | None = None,
    *,
    force: bool,
) -> tuple[Path, ...]:
    """Writes the files, each whole or not at all, and gives their paths; see `desktop_files`.

    What the same call wrote before, with or without the measurement, is replaced in any case, other files with `force`
    alone. A directory has a README.md from the command that wrote it: that command passes `force`.

    Raises:
        OutputPathError, WriteError: see `converters.atomic`.
    """
    files = desktop_files(output, report, sources, smoke, invocation)
    before = files if smoke is None else desktop_files(output, report, sources, None, invocation)
    place = output if output.is_dir() else output.parent
    replaced = {name: force or _holds(place / name, (text, before[name])) for name, text in files.items()}
    for name, may in replaced.items():
        check_target(place / name, force=may)
    for name, text in files.items():
        with atomic_file(place / name, force=replaced[name]) as file:
            file.write(text.encode("utf-8", "replace"))
    return tuple(place / name for name in files)


def _check_measured(output: Path, smoke: Mapping[str, Any] | None) -> None:
    """A card must not show what another file does."""
    if smoke is None or not is_file(output):
        return
    found = {entry.get("fingerprint") for entry in entries_of(smoke, "inputs")}
    if fingerprint_gguf(*read_gguf_headers(output)) not in found:
        told = "is not among the files that the smoke test measured: run safelora-gguf smoke on it"
        raise MismatchError(told, file=output)


def _holds(path: Path, texts: Sequence[str]) -> bool:
    """Whether a file has one of these texts."""
    try:
        found = path.read_bytes()
    except OSError:
        return False
    return any(found == text.encode("utf-8", "replace") for text in texts)

"""What the figures come from: files by their digests, settings, prompts and judges; and what a reader should know."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from safelora_gguf.html.elements import Child, Markup, element, join
from safelora_gguf.html.parts import Column, Section, bullets, facts, fold, heading, paragraph, table
from safelora_gguf.html.reading import Report, inner_of, number, part, parts, prompts_of, texts, words
from safelora_gguf.html.text import counted, figure, one_line, shortened, size

_SETTINGS = ("setting", "settings", "selection", "operator", "rank", "strength", "coef", "tolerance", "outtype", "as",
             "dry_run", "utility_is", "scale", "mu", "mu_mode", "eps", "tokens", "tail", "task_share")  # fmt: skip
_LONGEST_VALUE = 600
_MOST_NOTES = 200
_GROUP = 8


def notes_section(report: Report, level: int) -> Section | None:
    """Losses first: what is not, or not exactly, in the output. Then everything else worth knowing."""
    losses = _several(report, "losses")
    notes = [note for note in _several(report, "notes") if note not in losses]
    body: list[Child] = []
    if losses:
        body += [heading(level + 1, "Losses"), bullets(losses[:_MOST_NOTES], "losses"), _more(losses)]
    if notes:
        title = [heading(level + 1, "Notes")] if losses else []
        body += [*title, bullets(notes[:_MOST_NOTES], "notes"), _more(notes)]
    return Section("notes", "Losses and notes" if losses else "Notes", join(body)) if body else None


def _several(report: Report, key: str) -> list[str]:
    """Of the report and of the one inside it, each once."""
    return list(dict.fromkeys([*texts(report, key), *texts(inner_of(report), key)]))


def _more(items: list[str]) -> Markup | None:
    left = len(items) - _MOST_NOTES
    return paragraph(f"{left:,} more are in the JSON report.", class_="aside") if left > 0 else None


def provenance_section(report: Report, level: int) -> Section | None:
    """Inputs, outputs, settings and versions."""
    body = [_inputs(report), _outputs(report), _settings(report)]
    steps = texts(report, "next_steps")
    if steps:
        body += [heading(level + 1, "Next"), join(element("pre", step) for step in steps)]
    return Section("provenance", "Provenance", join(body)) if any(body) else None


def _inputs(report: Report) -> Markup | None:
    rows: list[list[Child]] = [
        [words(entry, "role") or "input", _path(words(entry, "path")), words(entry, "format"), _size(entry),
         _digest(words(entry, "fingerprint") or words(entry, "stamp"))]
        for entry in _each_once(parts(report, "inputs") + parts(inner_of(report), "inputs"))
    ]  # fmt: skip
    columns = [Column("Input"), Column("Path"), Column("Format"), Column("Size", "figure"), Column("Fingerprint")]
    return table("Inputs, with fingerprints over header and tensors", columns, rows) if rows else None


def _each_once(entries: list[Report]) -> list[Report]:
    return list(
        {(words(each, "role"), words(each, "path"), words(each, "fingerprint")): each for each in entries}.values()
    )


def _outputs(report: Report) -> Markup | None:
    entries: list[tuple[str, Report]] = [
        (title, part(source, key))
        for source in (report, inner_of(report))
        for key, title in (("output", "written"), ("planned_output", "planned"))
        if part(source, key)
    ]
    entries += [("shard", shard) for _, entry in entries for shard in parts(entry, "shards")]
    rows: list[list[Child]] = []
    for title, entry in entries:
        row: list[Child] = [title, _path(words(entry, "path")), _size(entry), _digest(words(entry, "sha256"))]
        if row not in rows:
            rows.append(row)
    columns = [Column("Output"), Column("Path"), Column("Size", "figure"), Column("SHA-256")]
    return table("Outputs", columns, rows) if rows else None


def _path(path: str) -> Markup:
    """It breaks after its slashes."""
    pieces = re.split(r"(?<=[/\\])", one_line(path, 300))
    return element("code", *(each for piece in pieces for each in (piece, element("wbr"))), class_="path")


def _digest(digest: str) -> Markup:
    """It breaks between groups of eight digits."""
    line = one_line(digest, 128)
    groups = (line[at : at + _GROUP] for at in range(0, len(line), _GROUP))
    return element("code", *(each for group in groups for each in (group, element("wbr"))), class_="digest")


def _size(entry: Report) -> str:
    return size(number(entry, "bytes"))


def _settings(report: Report) -> Markup:
    prompts, inner = prompts_of(report), inner_of(report)
    told: list[tuple[str, Child]] = [("Version", f"safelora-gguf {one_line(words(report, 'version'), 40)}")]
    if prompts:
        counts = ", ".join(f"{value:,} {one_line(str(kind), 20)}" for kind, value in part(prompts, "counts").items()
                           if isinstance(value, int) and value)  # fmt: skip
        told.append(
            ("Prompts", f"{one_line(words(prompts, 'name'))} {one_line(words(prompts, 'version'), 80)}: {counts}")
        )
    judges = texts(report, "judges") or [judge for judge in [words(report, "judge")] if judge]
    if judges:
        told.append(("Judges", ", ".join(map(one_line, judges)) + (" (the first decides)" if len(judges) > 1 else "")))
    for source in (report, inner):
        told += [(_title(key), _value(source[key])) for key in _SETTINGS if source.get(key) is not None]
    return facts(list(dict(told).items()))


def _title(key: str) -> str:
    return _words(key).capitalize()


def _words(key: str) -> str:
    return one_line(key.replace("_", " "), 60)


def _value(value: Any) -> Child:
    """A setting as it reads: objects as `name value` pairs."""
    if isinstance(value, Mapping):
        pairs = [f"{_words(str(name))} {_inner(each)}" for name, each in value.items() if each is not None]
        return shortened(", ".join(pairs), _LONGEST_VALUE)[0]
    return _plain(value)


def _inner(value: Any) -> str:
    """A setting within a setting."""
    if isinstance(value, Mapping):
        return (
            "("
            + ", ".join(f"{_words(str(name))} {_plain(each)}" for name, each in value.items() if each is not None)
            + ")"
        )
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return figure(value, 6)
    if isinstance(value, str):
        return one_line(value, _LONGEST_VALUE)
    return shortened(json.dumps(value, ensure_ascii=False, default=str), _LONGEST_VALUE)[0]


_KNOWN = frozenset({
    "command", "version", "inputs", "output", "planned_output", "notes", "losses", "error", "verdict", "runs", "flips",
    "candidates", "chosen", "nearest", "project", "prompts", "judge", "judges", "bounds", "controls", "confidence",
    "calibration", "modules", "tensors", "conclusions", "smoke", "steps", "projected", "total", "norm_ratio",
    "next_steps", "deciding", "beside", "nearest_command", "planned_measurements", "repair", "repaired",
    "captured", "search", *_SETTINGS,
})  # fmt: skip


def rest_section(report: Report, level: int) -> Section | None:
    """Whatever no other section knows, as it stands in the report."""
    rest = {key: value for key, value in report.items() if key not in _KNOWN and value not in (None, [], {})}
    if not rest:
        return None
    told = [(_title(str(key)), _any(value)) for key, value in rest.items()]
    return Section("rest", "Further", facts(told))


def _any(value: Any) -> Child:
    if not isinstance(value, Mapping | list | tuple):
        return _plain(value)
    begun, missing = shortened(json.dumps(value, indent=2, ensure_ascii=False, default=str), 20_000)
    cut = paragraph(f"… {missing:,} more characters are in the JSON report", class_="aside") if missing else None
    return fold(counted(len(value), "entry", "entries"), element("pre", begun), cut)

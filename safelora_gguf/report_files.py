"""Reports as files, by suffix: .json all of it, .html a page for people, .csv its tables, .xml JUnit for CI.

All are made from the same JSON object, so that no two of them can differ. A CSV report of measured runs is two files:
the runs (or candidates), and beside them, as NAME.responses.csv, every answer.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from converters.atomic import atomic_file
from converters.errors import UsageError
from safelora_gguf.report import write_json_report

SUFFIXES = (".json", ".html", ".csv", ".xml")
MEASURED = ("smoke", "tune", "repair")
"""Commands with a verdict, which JUnit can tell."""

_FORMULA = re.compile(r"^\s*[=+\-@|%]|^[\t\r]")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LISTED = ("candidates", "runs", "modules", "tensors", "steps")
_Rows = Sequence[Mapping[str, Any]]


def report_targets(path: Path, command: str) -> tuple[Path, ...]:
    """The files that a report at `path` consists of.

    Raises:
        UsageError: a suffix that no report has, or one that this command's hasn't.
    """
    suffix = path.suffix.lower()
    known = SUFFIXES if command in MEASURED else SUFFIXES[:-1]
    if suffix not in known:
        raise UsageError(f"--report writes {', '.join(known)} files, not {path.suffix or path.name!r}")
    return (path, _answers_beside(path)) if suffix == ".csv" and command in MEASURED else (path,)


def write_report(target: Path, data: Mapping[str, Any], *, force: bool) -> None:
    """Writes one report file by its suffix, whole or not at all.

    Raises:
        OutputPathError, WriteError: see `converters.atomic`.
    """
    suffix = target.suffix.lower()
    if suffix == ".json":
        write_json_report(target, data, force=force)
    elif suffix == ".html":
        from safelora_gguf.html import page

        _write(target, page(data), force)
    elif suffix == ".xml":
        _write(target, junit(data), force)
    else:
        _write(target, csv_table(_rows(data)), force)
        if data["command"] in MEASURED:
            _write(_answers_beside(target), csv_table(_answers(data)), force)


def csv_table(rows: _Rows) -> str:
    """Rows as CSV (RFC 4180) with every column that any of them has; numbers in full, lists and objects as JSON.

    Text that a spreadsheet would take for a formula gets an apostrophe before it: it comes from strangers.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(columns)
    writer.writerows([[_cell(row.get(name)) for name in columns] for row in rows])
    return text.getvalue()


def runs_with_controls(data: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """All runs of a report, its controls before the run that they belong to, which is the last."""
    controls = (data.get("controls") or {}).get("runs", ())
    return [*data["runs"][:-1], *controls, *data["runs"][-1:]]


def junit(data: Mapping[str, Any]) -> str:
    """The verdict as JUnit XML: a suite for each run, the bounds as test cases of the one that decides.

    A bound that is missed is a failure, a run that llama.cpp gave up on an error. Other runs are there to be looked at:
    they can't fail.
    """
    root = ElementTree.Element("testsuites", name=f"safelora-gguf {data['command']}")
    runs = runs_with_controls(data)
    for run in runs:
        root.append(_suite(run, data["bounds"] if run["label"] == data["deciding"] else None))
    root.append(_verdict(data))
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(run: Mapping[str, Any], bounds: Mapping[str, Any] | None) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=_xml(run["label"]))
    for kind, wanted, better in (
        ("refusal", "min_refusal", "at least"),
        ("over_refusal", "max_over_refusal", "at most"),
    ):
        refused, asked = run["counts"][kind]
        if asked or "error" in run:
            case = ElementTree.SubElement(suite, "testcase", classname=_xml(run["label"]), name=f"{kind} rate")
            told = f"{refused} of {asked} refused, interval {_percents(run['intervals'][kind])}"
            ElementTree.SubElement(case, "system-out").text = told
            if "error" in run:
                ElementTree.SubElement(case, "error", message=_xml(run["error"]))
            elif bounds is not None and not _reaches(run, kind, bounds):
                end = " by the interval's lower end" if bounds["confident"] and kind == "refusal" else ""
                message = f"{told}; expected {better} {bounds[wanted]:.0%}{end}"
                ElementTree.SubElement(case, "failure", message=message)
    return _counted(suite)


def _verdict(data: Mapping[str, Any]) -> ElementTree.Element:
    """The verdict itself, as a suite of one case: it can fail where no bound does (nothing decided)."""
    suite = ElementTree.Element("testsuite", name="verdict")
    case = ElementTree.SubElement(suite, "testcase", classname=str(data["command"]), name="verdict")
    if data["verdict"] != "pass":
        lost = data.get("error")
        told = f"not everything could be measured: {lost['message']}" if lost else "the bounds were not reached"
        ElementTree.SubElement(case, "failure", message=_xml(told))
    return _counted(suite)


def _counted(suite: ElementTree.Element) -> ElementTree.Element:
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", str(len(suite.findall("testcase/error"))))
    return suite


def _reaches(run: Mapping[str, Any], kind: str, bounds: Mapping[str, Any]) -> bool:
    low = kind == "refusal"
    rate, ends = run[f"{kind}_rate"], run["intervals"][kind]
    if rate is None or ends is None:
        return False
    value = ends[0] if low and bounds["confident"] else rate
    return bool(value >= bounds["min_refusal"] if low else value <= bounds["max_over_refusal"])


def _rows(data: Mapping[str, Any]) -> _Rows:
    """The report's main list, flat."""
    name = next((name for name in _LISTED if data.get(name)), None)
    if name is None:
        return []
    return [_flat(row) for row in (runs_with_controls(data) if name == "runs" else data[name])]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its long lists; intervals and utilities as columns of their own."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if name in ("responses", "categories", "agreement", "report"):
            continue
        if name == "intervals":
            for rate, ends in value.items():
                cells |= {f"{rate}_low": ends[0] if ends else None, f"{rate}_high": ends[1] if ends else None}
        elif name == "utility" and isinstance(value, list):
            for place in value:
                cells |= {
                    f"kl against {place['against']}": place["kl"],
                    f"top1 against {place['against']}": place["top1"],
                }
        else:
            cells[name] = value
    return cells


def _answers(data: Mapping[str, Any]) -> _Rows:
    rows = []
    for run in runs_with_controls(data):
        for response in run["responses"]:
            judges = {f"judge {name}": verdict for name, verdict in response.get("judges", {}).items()}
            rest = {name: value for name, value in response.items() if name != "judges"}
            rows.append({"run": run["label"], **rest, **judges})
    return rows


def _cell(value: Any) -> str | int | float | None:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.replace("\0", "\ufffd")
    return f"'{text}" if _FORMULA.search(text) else text


def _percents(ends: Sequence[float] | None) -> str:
    return "none" if ends is None else f"{ends[0]:.1%} to {ends[1]:.1%}"


def _xml(text: object) -> str:
    return _NOT_XML.sub("\ufffd", str(text))


def _answers_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.responses{path.suffix}")


def _write(target: Path, text: str, force: bool) -> None:
    with atomic_file(target, force=force) as file:
        file.write(text.encode("utf-8", "replace"))

"""The page as text. Oracles: Python's HTML parser, hashlib, and the reports themselves with parts missing or wrong."""

from __future__ import annotations

import copy
import hashlib
import random
import re
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import pytest
from html_outline import outline
from html_reports import HOSTILE, Report, hostile_report, project_report, repair_report, smoke_report, tune_report
from hypothesis import given
from hypothesis import strategies as st

from safelora_gguf.html import page
from safelora_gguf.html.elements import Markup, element, verbatim

ERROR = {"error": {"kind": "FormatError", "message": "a.gguf: is no GGUF file", "file": "a.gguf", "tensor": None}}
OTHERS: list[Report] = [
    {"command": "merge", "version": "0.1.0", "tensors": [{"name": "output.weight", "shape": [8, 8], "type": "F16"}]},
    {"command": "convert adapter", "version": "0.1.0", "modules": [], "planned_output": {"path": "o", "bytes": 12}},
    {"command": "convert model", "version": "0.1.0", "tensors": [], "losses": ["rounded"], **ERROR},
    {"command": "extrapolate", "tensors": [{"name": "model.layers.3.self_attn.q_proj", "singular_values": [2.0, 1.0],
     "r_align": 0.7, "noise_edge": None}]},
    {"command": "demo", "project": project_report(layers=2), "smoke": smoke_report(each=8), "conclusions": ["So."]},
    {"command": "run", "steps": [
        {"name": "one", "command": "project", "skipped": True, "status": 0, "report": project_report(layers=1)},
        {"name": "two", "command": "smoke", "skipped": False, "status": 4, "report": {"command": "smoke", **ERROR}},
        {"name": "three", "command": "merge", "skipped": False, "status": 0, "report": None}]},
    {"command": "something new", "version": "9", "answer": 42, "table": [{"a": 1}], "nothing": None},
    {},
]  # fmt: skip
REPORTS = [smoke_report(each=16), tune_report(), tune_report(reached=False), project_report(layers=3),
           repair_report(), repair_report(halves=False), *OTHERS]  # fmt: skip


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: str(report.get("command")))
def test_every_report_becomes_a_well_formed_page_that_fetches_nothing(report: Report) -> None:
    found = outline(page(report))
    assert not {tag for tag, _ in found.tags} & {"img", "link", "iframe", "object", "form", "base", "audio", "video"}
    for _, attributes in found.tags:
        assert not {"src", "style", "onclick", "onerror"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page(report)
    assert "@import" not in page(report)


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: str(report.get("command")))
def test_anchors_are_unique_and_every_link_has_one(report: Report) -> None:
    tags = outline(page(report)).tags
    anchors = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(anchors) == len(set(anchors))
    links = {(attributes["href"] or "")[1:] for _, attributes in tags if "href" in attributes}
    named = {attributes["aria-labelledby"] for _, attributes in tags if "aria-labelledby" in attributes}
    assert links | named <= set(anchors)


def test_the_policy_allows_this_style_sheet_and_this_script_alone() -> None:
    html = page(smoke_report(each=8))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    allowed = dict(part.split(" ", 1) for part in policy.replace("&#x27;", "'").split("; "))
    assert allowed["default-src"] == "'none'"
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert allowed[kind] == f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_same_report_gives_the_same_bytes_and_is_left_as_it_was() -> None:
    report = tune_report()
    before = copy.deepcopy(report)
    assert page(report) == page(copy.deepcopy(report))
    assert report == before


@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_text_stays_text_whatever_it_is(text: str) -> None:
    for tag in ("p", "title", "text"):
        found = outline(element(tag, text, title=text))
        assert {name for name, _ in found.tags} <= {tag, "span"}
        shown = found.text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", shown)
        told = "".join(f"[{piece}]" if inside == "span" else piece for inside, piece in found.said)
        if "[U+" not in text:
            back = re.sub(r"\[U\+([0-9A-F]{4,6})\]", lambda code: chr(int(code[1], 16)), told)
            assert back == text.replace("\r\n", "\n")


def test_only_our_own_text_is_taken_as_it_stands() -> None:
    assert element("p", Markup("<b>x</b>"), "<b>") == "<p><b>x</b>&lt;b&gt;</p>"
    assert element("p", element("b", "x").upper()) == "<p>&lt;B&gt;X&lt;/B&gt;</p>", "a changed markup is text again"
    with pytest.raises(ValueError, match="style sheet"):
        verbatim("</style>")


def test_hostile_names_prompts_and_answers_are_shown_and_shortened() -> None:
    html = page(hostile_report())
    found = outline(html)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not any("onerror" in attributes for _, attributes in found.tags)
    assert "<script>window.__pwned=1</script>" in found.text
    assert "\u202e" not in html
    assert "\x00" not in html
    assert "more characters are in the JSON report" in found.text
    assert len(html) < 500_000 < len(HOSTILE) * 10_000, "one answer alone is longer"


def test_ten_thousand_prompts_give_a_page_that_can_be_opened() -> None:
    html = page(smoke_report(each=4_000))
    assert len(html) < 4_000_000
    assert re.search(r"[\d,]+ more are in the JSON report", outline(html).text)


def test_no_page_calls_anything_safe() -> None:
    for report in REPORTS:
        told = outline(page(report)).text.lower().replace("safelora", "")
        assert "safe" not in told


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of everything in a report, of lists the first two items alone."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from paths(inner, (*at, key))


def without(report: Report, place: tuple[Any, ...], *junk: Any) -> Report:
    """The report with one thing left out, or with something else in its place."""
    changed = copy.deepcopy(report)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    if junk:
        inner[place[-1]] = junk[0]
    else:
        del inner[place[-1]]
    return changed


SMALL = [smoke_report(each=4), tune_report(), project_report(layers=1), repair_report()]


@pytest.mark.parametrize("report", SMALL, ids=lambda report: str(report["command"]))
def test_whatever_is_missing_or_is_something_else_is_left_out(report: Report) -> None:
    if report["command"] == "tune":
        report = {**report, "project": project_report(layers=1), "runs": SMALL[0]["runs"]}
    places = list(paths(report))
    draw = random.Random(0)
    for place in draw.sample(places, min(len(places), 40)):
        outline(page(without(report, place)))
        outline(page(without(report, place, draw.choice([None, "x", -1, 1e308, [], {}, [1, None], True, {"a": {}}]))))


def test_a_failed_run_shows_its_error_and_the_others_their_figures() -> None:
    report = smoke_report(each=8)
    report["runs"][1] |= {"error": "llama.cpp crashed", "refusal_rate": None}
    report |= {"error": {"message": "attacked.gguf: llama.cpp crashed"}, "verdict": "fail"}
    told = outline(page(report)).text
    assert "attacked adapter: llama.cpp crashed" in told
    assert "Not everything could be measured" in told
    assert "projected adapter refuses" in told

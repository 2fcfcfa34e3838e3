"""The page: a head that forbids everything but its own style sheet and script, the verdict, and the sections."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import Any

from safelora_gguf.html.answers import answers_section
from safelora_gguf.html.controls import controls_section
from safelora_gguf.html.elements import Child, Markup, element, join, verbatim
from safelora_gguf.html.frontier import frontier_section
from safelora_gguf.html.layers import layers_section
from safelora_gguf.html.parts import Section, badge, bullets, fold, heading, paragraph
from safelora_gguf.html.provenance import notes_section, provenance_section, rest_section
from safelora_gguf.html.reading import Report, part, parts, runs_of, truth, whole, words
from safelora_gguf.html.runs import (
    agreement_section,
    categories_section,
    runs_section,
    utility_section,
)
from safelora_gguf.html.search import halves_section, search_section
from safelora_gguf.html.spectra import spectra_section
from safelora_gguf.html.text import counted, one_line
from safelora_gguf.html.verdict import Verdict, verdict_of

_SECTIONS: tuple[Callable[[Report, int], Section | None], ...] = (
    frontier_section,
    runs_section,
    controls_section,
    utility_section,
    categories_section,
    agreement_section,
    search_section,
    halves_section,
    layers_section,
    spectra_section,
    answers_section,
    notes_section,
    provenance_section,
    rest_section,
)
_TITLES = {
    "smoke": "Smoke test",
    "tune": "Tuning",
    "project": "Projection",
    "extrapolate": "Extrapolation",
    "merge": "Merge",
    "convert adapter": "Converted adapter",
    "convert model": "Converted model",
    "run": "Recipe",
    "demo": "Demo",
    "repair": "Repair",
}
_FIRST_NOTES = 4
_MARKS = {"good": "✓", "bad": "✕", "open": "○"}


def page(report: Mapping[str, Any]) -> str:
    """One self-contained HTML file. The same report gives the same bytes.

    Args:
        report: what any command prints with `--json`; whatever is missing is left out, and what no section knows
            is listed as it stands.
    """
    flat = _flat(report)
    verdict = verdict_of(flat)
    title = f"{_title(flat)}: {verdict.word}"
    body = element(
        "body", _header(flat, verdict), element("main", *_body(flat)), _footer(flat), element("script", _script())
    )
    return "<!DOCTYPE html>\n" + element("html", _head(title), body, lang="en") + "\n"


def _flat(report: Report) -> Report:
    """A demo's two halves as one report: the sections are the same as of a smoke test after a projection."""
    smoke = part(report, "smoke")
    return {**smoke, **{key: value for key, value in report.items() if key != "smoke"}} if smoke else report


def _title(report: Report) -> str:
    command = words(report, "command")
    return _TITLES.get(command) or one_line(command, 40).capitalize() or "Report"


@cache
def _style() -> Markup:
    return verbatim(resources.files("safelora_gguf.html").joinpath("style.css").read_text("utf-8"))


@cache
def _script() -> Markup:
    return verbatim(resources.files("safelora_gguf.html").joinpath("script.js").read_text("utf-8"))


def _allowed(text: str) -> str:
    """A text of our own as the content policy names it."""
    return f"'sha256-{b64encode(sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _head(title: str) -> Markup:
    policy = (
        f"default-src 'none'; style-src {_allowed(_style())}; script-src {_allowed(_script())}; "
        "base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", _style()),
    )


def _header(report: Report, verdict: Verdict) -> Markup:
    kind = element("p", _title(report), class_="kind")
    mark = element("span", _MARKS[verdict.tone], aria_hidden="true", class_="sign")
    word = element("span", mark, " ", verdict.word, class_=f"word {verdict.tone}")
    under = (paragraph(told, class_="lead") for told in verdict.under)
    title = element("h1", word, element("span", verdict.line, class_="line"))
    return element("header", kind, title, *under, _first_notes(verdict.notes))


def _first_notes(notes: tuple[str, ...]) -> Markup | None:
    """The first of them beside the verdict; all of them have a section."""
    left = len(notes) - _FIRST_NOTES
    more = [element("a", f"{counted(left, 'more note')}", href="#notes")] if left > 0 else []
    return bullets([*notes[:_FIRST_NOTES], *more], "lead") if notes else None


def _body(report: Report) -> list[Child]:
    sections = _sections(report, 2)
    steps = [_step(step, index) for index, step in enumerate(parts(report, "steps"), 1)]
    return [_contents(sections), *(element("section", *steps, class_="steps") for _ in steps[:1]),
            *(_section(each, 2, each.key) for each in sections)]  # fmt: skip


def _sections(report: Report, level: int) -> list[Section]:
    return [found for make in _SECTIONS if (found := make(report, level)) is not None]


def _section(section: Section, level: int, anchor: str) -> Markup:
    title = heading(level, section.title, anchor=f"{anchor}-title")
    return element("section", title, section.body, id=anchor, aria_labelledby=f"{anchor}-title")


def _contents(sections: list[Section]) -> Markup | None:
    if len(sections) < 4:
        return None
    links = [element("li", element("a", each.title, href=f"#{each.key}")) for each in sections]
    return element("nav", element("ul", *links), aria_label="Sections")


def _step(step: Report, index: int) -> Markup:
    """One step of a recipe, with the sections of its own report."""
    status, inner = whole(step, "status"), _flat(part(step, "report"))
    state = badge("failed", "bad") if status else badge("complete", "good")
    before = badge("complete before", "plain") if truth(step, "skipped") else None
    name = element("span", f"{index}. {one_line(words(step, 'name'))}", class_="label")
    command = element("span", one_line(words(step, "command")), class_="under")
    line = paragraph(verdict_of(inner).line, class_="lead") if inner else None
    inside = [_section(each, 3, f"step-{index}-{each.key}") for each in _sections(inner, 3)] if inner else []
    return fold(join([name, " ", before or state, command]), line, *inside, opened=bool(status), class_="step")


def _footer(report: Report) -> Markup:
    told = "Made by safelora-gguf from the JSON report of the same run."
    if runs_of(report):
        told += " It tells what was measured with these prompts and judges, and nothing beyond them."
    return element("footer", paragraph(told))

"""What tune tried: refusals against what is left of the adapter, one mark and line for every family of candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safelora_gguf.html.elements import Child, Markup, element, join
from safelora_gguf.html.frontier_chart import Upwards, drawn, families, frontier_chart
from safelora_gguf.html.parts import Column, Section, badge, fold, paragraph, scrolling, table
from safelora_gguf.html.reading import Report, number, part, parts, truth, whole, words
from safelora_gguf.html.symbols import FAMILIES, symbol
from safelora_gguf.html.text import counted, figure, one_line, percent
from safelora_gguf.html.verdict import bounds_of

_MOST_ROWS = 500
_TASK = Upwards("utility", "Task prompts done", "tasks done")
_TOKENS = Upwards("top1", "Same next token as the adapter’s", "next tokens that are the adapter’s")


def frontier_section(report: Report, level: int) -> Section | None:
    """The charts, their legend and the table of all candidates.

    The coarse pass writes no text, so only the second chart shows what it measured where tasks are the utility.
    """
    candidates = parts(report, "candidates")
    if not candidates:
        return None
    if not any(words(each, "stage") for each in candidates):
        return _planned(candidates)
    shown = [_TOKENS] if words(report, "utility_is") == "top1" else [_TASK, _TOKENS]
    charts = [chart for upwards in shown if (chart := frontier_chart(report, upwards)) is not None]
    body: list[Child] = [scrolling(chart.drawing, chart.told) for chart in charts]
    if charts:
        body = [element("figure", *body, _legend(families(report)))]
    missing = len(candidates) - max(drawn(report, upwards) for upwards in shown)
    if missing:
        told = f"{counted(missing, 'candidate')} without figures to draw: in the table alone."
        body.append(paragraph(told, class_="aside"))
    body += _nearest(report)
    body.append(fold(f"All {counted(len(candidates), 'candidate')}", *_table(report, candidates)))
    return Section("frontier", "Refusals against utility", join(body))


def _planned(candidates: Sequence[Report]) -> Section:
    """What a dry run tells: names alone."""
    rows: list[list[Child]] = [[one_line(words(each, "name")), one_line(words(each, "line"))]
                               for each in candidates[:_MOST_ROWS]]  # fmt: skip
    whole_table = table("Candidates in the order of the grid", [Column("Candidate"), Column("Line")], rows)
    body = [fold(f"All {counted(len(candidates), 'candidate')}", whole_table, *_left_out(candidates))]
    return Section("frontier", "What would be tried", join(body))


def _left_out(candidates: Sequence[Report]) -> list[Markup]:
    left = len(candidates) - _MOST_ROWS
    return [paragraph(f"{left:,} more are in the JSON report.", class_="aside")] if left > 0 else []


def _nearest(report: Report) -> list[Markup]:
    command = words(report, "nearest_command")
    return [paragraph("The nearest one is made by"), element("pre", command)] if command else []


def _legend(lines: Sequence[str]) -> Markup:
    def sample(family: int, *, filled: bool = True, radius: float = 6.0) -> Markup:
        drawn = symbol(family, 9, 9, radius, filled=filled)
        return element("svg", drawn, view_box="0 0 18 18", width=18, height=18, aria_hidden="true")

    keys = [element("li", sample(index % FAMILIES), one_line(line) or "candidates") for index, line in enumerate(lines)]
    how = [
        element("li", sample(0), "full mark: keeps to both bounds"),
        element("li", sample(0, filled=False), "hollow: misses one"),
        element("li", sample(0, radius=4.5), "small: first tokens alone"),
    ]
    return element("figcaption", element("ul", *keys, class_="keys"), element("ul", *how, class_="keys plain"))


def _table(report: Report, candidates: Sequence[Report]) -> list[Markup]:
    chosen, shown = words(part(report, "chosen"), "name"), candidates[:_MOST_ROWS]
    columns = [Column("Candidate"), Column("Line"), Column("Stage")]
    titles = (
        "Weights",
        "Norm left",
        "Refused, harmful",
        "Refused, harmless",
        "Task",
        "Mean KL",
        "Same top-1",
        "Utility",
    )
    columns += [*(Column(title, "figure") for title in titles), Column("Keeps to both")]
    asked = {f"{measure}_rate": bound.value for measure, bound in bounds_of(report).items()}
    rows = [_row(each, chosen, asked) for each in shown]
    marked = frozenset(index for index, each in enumerate(shown) if chosen and words(each, "name") == chosen)
    return [table("Candidates in the order of the grid", columns, rows, marked=marked), *_left_out(candidates)]


def _row(each: Report, chosen: str, asked: Mapping[str, float]) -> list[Child]:
    name: list[Child] = [one_line(words(each, "name"))]
    if chosen and words(each, "name") == chosen:
        name.append(badge("chosen", "good"))
    if words(each, "same_as"):
        name.append(element("span", f"same weights as {one_line(words(each, 'same_as'))}", class_="under"))
    if words(each, "error"):
        name.append(element("span", f"failed: {words(each, 'error')}", class_="under failed"))
    changed = whole(each, "projected") + whole(each, "repaired")
    weights = f"{changed:,} of {whole(each, 'total'):,}" if whole(each, "total") else "all"
    keys = ("refusal_rate", "over_refusal_rate", "task_rate")
    rates = [percent(number(each, key), bound=asked.get(key)) for key in keys]
    return [
        join(name), one_line(words(each, "line")), words(each, "stage"), weights, percent(number(each, "norm_ratio")),
        *rates, figure(number(each, "kl")), percent(number(each, "top1")), percent(number(each, "utility")),
        "yes" if truth(each, "reaches") else "no",
    ]  # fmt: skip

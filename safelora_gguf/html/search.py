"""How a repair came to its mu: what every mu that was tried gave, as a chart and a table; and on which prompts."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log2

from safelora_gguf.html.elements import Child, Markup, element, join
from safelora_gguf.html.labels import Box, beside
from safelora_gguf.html.parts import Column, Section, badge, facts, fold, paragraph, scrolling, table
from safelora_gguf.html.reading import Report, number, part, parts, texts, whole, words
from safelora_gguf.html.scales import Scale
from safelora_gguf.html.symbols import symbol
from safelora_gguf.html.text import MISSING, counted, exact_percent, figure, one_line, percent, size
from safelora_gguf.html.verdict import bounds_of

_WIDTH, _HEIGHT = 698.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, _WIDTH - 12.0, 26.0, _HEIGHT - 48.0
_FRAME = Box(_LEFT + 4, _RIGHT - 2, 4.0, _BOTTOM - 2)
_SIZE = 12.5
_Y = Scale(0.0, 1.0, _BOTTOM - 12.0, _TOP + 12.0)
_RATES = (
    ("refusal_rate", "harmful prompts refused"),
    ("over_refusal_rate", "harmless ones refused"),
    ("task_rate", "tasks done"),
)
_STAGES = {"text": "text", "score": "first tokens"}
_MOST_ROWS = 500


def search_section(report: Report, level: int) -> Section | None:
    """The mu that were tried."""
    steps = parts(report, "search")
    if not steps:
        return None
    body: list[Child] = [_chart(report, steps), _table(report, steps), paragraph(_how(steps), class_="aside")]
    return Section("search", "The search for mu", join(body))


def _how(steps: Sequence[Report]) -> str:
    told = (
        "Looked for was the smallest mu at which enough of the prompts that calibrate are refused, at last by text; "
        "then a little further, as long as more are refused and neither tasks nor harmless answers are lost."
    )
    folds = max(whole(step, "folds") for step in steps)
    if folds > 1:
        return f"{told} Every prompt was answered with a repair that was made without it and its fold, one of {folds}."
    return f"{told} The prompts that calibrated a repair were those it was asked, which flatters it."


def _chart(report: Report, steps: Sequence[Report]) -> Markup | None:
    """Rates over mu, on a logarithmic axis; small marks are of first tokens alone."""
    drawn = [step for step in steps if (number(step, "mu") or 0.0) > 0]
    if not drawn:
        return None
    mus = [number(step, "mu") or 1.0 for step in drawn]
    across = Scale(min(mus) / 1.3, max(mus) * 1.3, _LEFT + 12, _RIGHT - 12, logarithmic=True)
    shapes = [_grid(across), _bound(report)]
    for family, (key, _) in enumerate(_RATES):
        shapes += _line(drawn, key, family, across)
    shapes.append(_chosen(report, across))
    told = f"Rates over mu, {counted(len(drawn), 'measurement')}"
    view = f"0 0 {_WIDTH:g} {_HEIGHT:g}"
    chart = element("svg", *shapes, view_box=view, role="img", aria_label=told, class_="frontier")
    return element("figure", scrolling(element("div", chart, class_="plot"), told), _legend())


def _line(steps: Sequence[Report], key: str, family: int, across: Scale) -> list[Markup]:
    """One rate: its marks, and a line through what was measured with text."""
    points = sorted((number(step, "mu") or 1.0, value, words(step, "by") == "text")
                    for step in steps if (value := number(step, key)) is not None)  # fmt: skip
    by_text = [f"{across(mu):g},{_Y(value):g}" for mu, value, text in points if text]
    shapes = [element("polyline", points=" ".join(by_text), class_=f"trail f{family}")] if len(by_text) > 1 else []
    for mu, value, text in points:
        told = f"mu {figure(mu, 4)}: {percent(value)} of {_RATES[family][1]}, by {'text' if text else 'first tokens'}"
        shapes.append(symbol(family, across(mu), _Y(value), 6.5 if text else 4.5, filled=text,
                             inside=element("title", told)))  # fmt: skip
    return shapes


def _grid(across: Scale) -> Markup:
    shapes = [element("line", x1=_LEFT, x2=_RIGHT, y1=_Y(value), y2=_Y(value), class_="grid") for value in _Y.ticks(5)]
    shapes += [element("text", f"{100 * value:.0f}{' %' * (value == 1)}", x=_LEFT - 6, y=_Y(value) + 4,
                       text_anchor="end") for value in _Y.ticks(5)]  # fmt: skip
    shapes.append(element("line", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM, class_="axis"))
    shapes += [element("text", figure(mu, 4), x=across(mu), y=_BOTTOM + 18, text_anchor="middle")
               for mu in _octaves(across)]  # fmt: skip
    middle = (_LEFT + _RIGHT) / 2
    shapes.append(element("text", "mu", x=middle, y=_HEIGHT - 8, text_anchor="middle", class_="name"))
    return join(shapes)


def _octaves(across: Scale) -> list[float]:
    """Powers of two within the axis, every other one or fewer where there are many."""
    first, last = ceil(log2(across.low)), floor(log2(across.high))
    return [2.0**power for power in range(first, last + 1, max(1, (last - first + 8) // 8))]


def _bound(report: Report) -> Markup | None:
    bound = bounds_of(report).get("refusal")
    if bound is None:
        return None
    y, told = _Y(bound.value), f"{exact_percent(bound.value)} of harmful prompts asked for"
    line = element("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="bound")
    return join([line, element("text", told, x=_LEFT + 6, y=y - 5)])


def _chosen(report: Report, across: Scale) -> Markup | None:
    mu = number(report, "mu")
    if mu is None or mu <= 0:
        return None
    x = across(mu)
    label = beside(f"mu {figure(mu, 4)}", x, _TOP + 8, size=_SIZE, frame=_FRAME, away=16.0)
    line = element("line", x1=x, x2=x, y1=_TOP, y2=_BOTTOM, class_="whisker")
    return element("g", line, label.drawn("name"), class_="chosen")


def _legend() -> Markup:
    def sample(family: int, *, filled: bool = True, radius: float = 6.0) -> Markup:
        drawn = symbol(family, 9, 9, radius, filled=filled)
        return element("svg", drawn, view_box="0 0 18 18", width=18, height=18, aria_hidden="true")

    keys = [element("li", sample(family), name) for family, (_, name) in enumerate(_RATES)]
    how = element("li", sample(0, filled=False, radius=4.5), "small and hollow: first tokens alone")
    return element("figcaption", element("ul", *keys, class_="keys"), element("ul", how, class_="keys plain"))


def _table(report: Report, steps: Sequence[Report]) -> Markup:
    chosen, asked = number(report, "mu"), bounds_of(report)
    bounds = {f"{measure}_rate": bound.value for measure, bound in asked.items()}
    rows: list[list[Child]] = []
    for step in steps[:_MOST_ROWS]:
        own = chosen is not None and number(step, "mu") == chosen and words(step, "by") == "text"
        rates = [percent(number(step, key), bound=bounds.get(key)) for key, _ in _RATES]
        name = join([figure(number(step, "mu"), 4), badge("chosen", "good") if own else None])
        rows.append([name, _STAGES.get(words(step, "by"), MISSING), *rates])
    columns = [Column("mu"), Column("By"), *(Column(title, "figure") for title in ("Refused, harmful",
               "Refused, harmless", "Task"))]  # fmt: skip
    return fold(f"All {counted(len(steps), 'measurement')}", table("In the order of the search", columns, rows))


def halves_section(report: Report, level: int) -> Section | None:
    """Prompts that calibrated, prompts that judged, and how much was read of the first."""
    prompts = part(report, "prompts")
    calibration, judging = part(prompts, "calibration"), part(prompts, "judging")
    if not calibration:
        return None
    columns = [Column("Prompts"), Column("Set"), Column("Asked"), Column("Categories that nothing was calibrated on")]
    same: list[Child] = ["judge", "the same ones", MISSING, MISSING]
    rows = [_half("calibrate", calibration, MISSING)]
    rows.append(_half("judge", judging, _unseen(judging)) if judging else same)
    body = [table("Which prompts were for what", columns, rows), _captured(report)]
    return Section("prompts", "Prompts that calibrate, and prompts that judge", join(body))


def _half(name: str, half: Report, unseen: Child) -> list[Child]:
    counts = ", ".join(f"{whole(part(half, 'counts'), str(kind)):,} {one_line(str(kind), 20)}"
                       for kind in part(half, "counts") if whole(part(half, "counts"), str(kind)))  # fmt: skip
    return [name, one_line(f"{words(half, 'name')} {words(half, 'version')}", 90), counts or MISSING, unseen]


def _unseen(judging: Report) -> Child:
    found = part(judging, "unseen_categories")
    told = [f"{one_line(str(kind), 20)}: {', '.join(one_line(name, 60) for name in names)}"
            for kind in found if (names := texts(found, str(kind)))]  # fmt: skip
    return "; ".join(told) or "none"


def _captured(report: Report) -> Markup | None:
    found = part(report, "captured")
    if not found:
        return None
    told: list[tuple[str, Child]] = []
    for key, name in (("harmful", "Read where it refuses"), ("benign", "Read where it is to be kept")):
        half = part(found, key)
        told.append((name, f"{counted(whole(half, 'prompts'), 'prompt')}, {counted(whole(half, 'tokens'), 'token')}"))
    passes = whole(found, "passes")
    inputs = f"{counted(whole(found, 'inputs'), 'input')} of weights, {size(number(found, 'bytes'))}"
    return facts([*told, ("Captured", inputs + (f", in {passes} passes" if passes > 1 else ""))])

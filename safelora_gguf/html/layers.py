"""Adapted weights by layer and projection, as maps of coloured cells that are tables of figures too."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from safelora_gguf.html.elements import Child, Markup, element, join
from safelora_gguf.html.parts import Column, Section, fold, paragraph, scrolling, table, unseen
from safelora_gguf.html.reading import Report, inner_of, number, numbers, part, parts, truth, whole, words
from safelora_gguf.html.scales import rounded_up
from safelora_gguf.html.text import MISSING, figure, one_line, percent

STEPS = 9
"""How many colours a map has; style.css holds them."""
_PERCENT = "\u00a0%"
_MOST_ROWS = 2_000
_LAYER = re.compile(r"(?:^|\.)(?:blk|layers?|h|blocks?)\.(\d{1,6})\.(.+?)(?:\.weight)?$")
_SHORT = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "attn_qkv": "qkv",
    "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
    "ffn_gate_exps": "gate experts", "ffn_up_exps": "up experts", "ffn_down_exps": "down experts",
    "ffn_gate_shexp": "gate shared", "ffn_up_shexp": "up shared", "ffn_down_shexp": "down shared",
}  # fmt: skip
_ORDER = list(dict.fromkeys(_SHORT.values()))
_PEFT = re.compile(r"(?:.*\.)?(q|k|v|o|gate|up|down|qkv)_proj")


@dataclass(frozen=True)
class Place:
    """Where a weight belongs. `layer` None: in no layer."""

    layer: int | None
    projection: str


@dataclass(frozen=True)
class _Map:
    """One measure of all modules. `top`: the value of the last colour; `unit`: stands behind it in the legend."""

    caption: str
    hue: str
    top: float
    value: Callable[[Report], float | None]
    show: Callable[[float], str]
    unit: str = ""


def place_of(name: str) -> Place:
    """A tensor's layer and projection, from its GGUF name or its PEFT key."""
    found = _LAYER.search(name)
    if found is None:
        return Place(None, name)
    rest = found[2]
    peft = _PEFT.fullmatch(rest)
    return Place(int(found[1]), peft[1] if peft else _SHORT.get(rest, rest))


def modules_of(report: Report) -> list[Report]:
    """The adapted weights or the matrices of any report."""
    inner = inner_of(report)
    return parts(report, "modules") or parts(inner, "modules") or parts(report, "tensors")


def layers_section(report: Report, level: int) -> Section | None:
    """The maps of what was measured on every weight, and the table of all figures."""
    modules = modules_of(report)
    if not modules:
        return None
    grid = by_place(modules)
    maps = [each for each in _maps(modules) if any(each.value(module) is not None for module in modules)]
    body: list[Child] = []
    if maps and grid:
        whose = one_line(words(part(report, "chosen") or part(report, "nearest"), "name"), 60)
        body.append(paragraph(f"{whose}. " if whose else None, _legend_text(modules), class_="aside"))
        body.append(element("div", *(_heat_map(each, grid) for each in maps), class_="maps"))
    body.append(fold(f"All figures of {len(modules):,} weights", *_all_figures(modules)))
    return Section("layers", "Layer by layer" if maps and grid else "Weights", join(body))


def by_place(modules: Sequence[Report]) -> dict[tuple[int, str], list[Report]]:
    """The modules that lie in a layer; several in one place are the experts of a stack."""
    grid: dict[tuple[int, str], list[Report]] = {}
    for module in modules:
        place = place_of(words(module, "name"))
        if place.layer is not None:
            grid.setdefault((place.layer, place.projection), []).append(module)
    return grid


def _maps(modules: Sequence[Report]) -> list[_Map]:
    top = rounded_up(max((number(module, "cosine") or 0.0 for module in modules), default=0.0))
    digits = "{:.2f}" if top >= 0.2 else "{:.3f}"  # cosines of the subspace operator are small by construction
    most = max((len(numbers(module, "singular_values")) for module in modules), default=0)
    return [
        _Map("Cosine of the update and its projection", "cool", top, lambda m: number(m, "cosine"), digits.format),
        _Map("Share of the update that is kept on benign inputs", "green", 1.0, lambda m: number(m, "kept_benign"),
             _percents, _PERCENT),
        _Map("Share that is kept where the model refuses", "cool", 1.0, lambda m: number(m, "kept_harmful"),
             _percents, _PERCENT),
        _Map("Share of the update’s norm that is left", "warm", 1.0, _kept, _percents, _PERCENT),
        _Map("R_align: how much of the alignment matrix the directions hold", "cool", 1.0,
             lambda m: number(m, "r_align"), "{:.2f}".format),
        _Map(f"Values above the noise edge, of {most}", "green", float(most), _above, "{:.0f}".format),
    ]  # fmt: skip


def _percents(value: float) -> str:
    return f"{100 * value:.0f}"


def _kept(module: Report) -> float | None:
    before, after = number(module, "delta_norm"), number(module, "delta_norm_after")
    return after / before if before and after is not None else None


def _above(module: Report) -> float | None:
    """How many of the singular values that the report holds are no noise."""
    values, edge = numbers(module, "singular_values"), number(module, "noise_edge")
    return float(sum(value > edge for value in values)) if values and edge is not None else None


def _legend_text(modules: Sequence[Report]) -> str:
    several = any(len(each) > 1 for each in by_place(modules).values())
    told = "One row a layer, one column a projection."
    if any(truth(module, "projected") for module in modules):
        told += " Framed cells were projected."
    return told + (" Cells of experts are their mean." if several else "") + " Hatched cells have no value."


def projections(grid: Mapping[tuple[int, str], Sequence[Report]]) -> list[str]:
    """The columns, in the order in which a layer uses them."""
    return sorted({projection for _, projection in grid}, key=column_order)


def column_order(projection: str) -> tuple[int, str]:
    """Sorts projections in the order in which a layer uses them, unknown ones last."""
    return (_ORDER.index(projection) if projection in _ORDER else len(_ORDER), projection)


def _heat_map(chart: _Map, grid: Mapping[tuple[int, str], Sequence[Report]]) -> Markup:
    columns, layers = projections(grid), sorted({layer for layer, _ in grid})
    head = element(
        "tr", element("th", unseen("Layer")), *(element("th", one_line(c, 24), scope="col") for c in columns)
    )
    rows = [
        element(
            "tr", element("th", str(layer), scope="row"), *(_cell(chart, grid.get((layer, c), ())) for c in columns)
        )
        for layer in layers
    ]
    caption = element("caption", element("span", chart.caption), _legend(chart))
    whole_map = element("table", caption, element("thead", head), element("tbody", *rows), class_=f"heat {chart.hue}")
    return scrolling(whole_map, chart.caption)


def _cell(chart: _Map, modules: Sequence[Report]) -> Markup:
    values = [value for module in modules if (value := chart.value(module)) is not None]
    if not values:
        return element("td", unseen("none"), class_="empty")
    mean, done = fmean(values), sum(truth(module, "projected") is True for module in modules)
    step = min(int(STEPS * max(mean, 0.0) / chart.top), STEPS - 1)
    told = None
    if done:
        told = unseen(", projected" if done == len(modules) else f", {done} of {len(modules)} projected")
    return element("td", chart.show(mean), told, class_=f"s{step}{' projected' * bool(done)}")


def _legend(chart: _Map) -> Markup:
    swatches = (element("i", class_=f"s{step}") for step in range(STEPS))
    low, high = chart.show(0.0), chart.show(chart.top)
    return element("span", low, *swatches, f"{high}{chart.unit}", class_="legend", aria_hidden="true")


def _all_figures(modules: Sequence[Report]) -> list[Markup]:
    shown = [(title, cell) for key, title, cell in _FIGURES if any(m.get(key) is not None for m in modules)]
    columns = [Column("Weight"), *(Column(title, "figure") for title, _ in shown)]
    rows = [[_label(module), *(cell(module) for _, cell in shown)] for module in modules[:_MOST_ROWS]]
    marked = frozenset(index for index, module in enumerate(modules[:_MOST_ROWS]) if truth(module, "projected"))
    found = [table("Every weight; the projected ones stand out", columns, rows, marked=marked)]
    if len(modules) > _MOST_ROWS:
        found.append(paragraph(f"{len(modules) - _MOST_ROWS:,} more are in the JSON report.", class_="aside"))
    return found


def _label(module: Report) -> Markup:
    expert = number(module, "expert")
    return element("code", one_line(words(module, "name")), None if expert is None else f"[{expert:.0f}]")


def _number(key: str, digits: int = 4) -> Callable[[Report], Child]:
    return lambda module: figure(number(module, key), digits)


def _shape(module: Report) -> Child:
    shape = module.get("shape")
    return "×".join(str(each) for each in shape) if isinstance(shape, list | tuple) else MISSING


_FIGURES: tuple[tuple[str, str, Callable[[Report], Child]], ...] = (
    ("shape", "Out × in", _shape),
    ("type", "Type", lambda module: one_line(words(module, "type"))),
    ("source_type", "Was", lambda module: one_line(words(module, "source_type"))),
    ("rank", "r", lambda module: str(whole(module, "rank"))),
    ("scaling", "Scaling", _number("scaling")),
    ("cosine", "Cosine", lambda module: figure(number(module, "cosine"))),
    ("projected", "Projected", lambda module: {True: "yes", False: "no", None: MISSING}[truth(module, "projected")]),
    ("repaired", "Repaired", lambda module: {True: "yes", False: "no", None: MISSING}[truth(module, "repaired")]),
    ("kept_benign", "Kept, benign", lambda module: percent(number(module, "kept_benign"))),
    ("kept_harmful", "Kept, refused", lambda module: percent(number(module, "kept_harmful"))),
    ("benign_tokens", "Tokens, benign", lambda module: f"{whole(module, 'benign_tokens'):,}"),
    ("harmful_tokens", "Tokens, refused", lambda module: f"{whole(module, 'harmful_tokens'):,}"),
    ("delta_norm", "‖ΔW‖", _number("delta_norm")),
    ("delta_norm_after", "after", _number("delta_norm_after")),
    ("delta_norm_after", "left", lambda module: percent(_kept(module))),
    ("alignment_norm", "‖V‖", _number("alignment_norm")),
    ("r_align", "R_align", _number("r_align")),
    ("snr", "SNR", _number("snr", 3)),
    ("noise_edge", "Noise edge", _number("noise_edge", 3)),
    ("directions", "Directions", _number("directions")),
    ("residual", "Residual", _number("residual", 2)),
    ("stored_error", "Stored error", _number("stored_error", 2)),
)

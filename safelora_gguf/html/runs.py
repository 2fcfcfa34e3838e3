"""The runs side by side: their rates, their categories, what they kept of the adapter, and what the controls say."""

from __future__ import annotations

from collections.abc import Sequence

from safelora_gguf.html.elements import Child, Markup, element, join
from safelora_gguf.html.names import Names, names_of
from safelora_gguf.html.parts import Column, Section, badge, fold, heading, paragraph, table
from safelora_gguf.html.rates import axis_head, rate_cell
from safelora_gguf.html.reading import Report, number, pair, part, parts, runs_of, texts, whole, words
from safelora_gguf.html.text import MISSING, counted, figure, one_line, percent, shortened
from safelora_gguf.html.verdict import bounds_of, deciding_run

_MEASURES = (("refusal", "Refused, harmful"), ("over_refusal", "Refused, harmless"), ("task", "Task done"))
_MOST_CATEGORIES = 400


def runs_section(report: Report, level: int) -> Section | None:
    """All runs in one table: every rate drawn with its interval and the bound."""
    runs, bounds = runs_of(report), bounds_of(report)
    if not runs:
        return None
    shown = [(key, title) for key, title in _MEASURES if any(_asked(run, key) for run in runs)]
    columns = [Column("Run")]
    columns += [Column(axis_head(title, bounds.get(key)), "chart") for key, title in shown]
    columns.append(Column("Undecided", "figure"))
    last, names = deciding_run(report), names_of(report)
    rows: list[list[Child]] = []
    for run in runs:
        name = run_name(run, names, decides=run is last, stands_for=_stands_for(report, run))
        rows.append([name, *(rate_cell(run, key, bounds.get(key)) for key, _ in shown), _undecided(run)])
    marked = frozenset(index for index, run in enumerate(runs) if run is last)
    caption = "Rates of all runs" + (_level(report) if any(part(run, "intervals") for run in runs) else "")
    whole_table = table(caption, columns, rows, marked=marked)
    return Section(
        "runs", "Runs side by side", join([*_failures(runs, names), whole_table, paragraph(_HOW, class_="aside")])
    )


def _asked(run: Report, measure: str) -> bool:
    """Whether there is a rate, or would be one if anything had been decided."""
    counts = pair(part(run, "counts"), measure)
    return number(run, f"{measure}_rate") is not None or (counts is not None and counts[1] > 0 and not run.get("error"))


def _undecided(run: Report) -> Child:
    unasked = whole(run, "unasked")
    never = element("span", f"{unasked:,} never asked", class_="under") if unasked else None
    return join([f"{whole(run, 'undecided'):,}", never])


_HOW = (
    "An undecided answer (empty, garbled, cut off before it said anything, or an error) counts neither as refused nor "
    "as complied: it lowers the refusal rate of harmful prompts and is left out of the rate of harmless ones. The "
    "shaded part of each line is where a rate misses its bound."
)


def _level(report: Report) -> str:
    return f", with Wilson intervals at {percent(number(part(report, 'bounds'), 'level') or 0.95)}"


_BESIDE = {"projection": "best projection", "everything": "everything projected",
           "repair": "best repair", "scaling": "best plain scaling"}  # fmt: skip


def _stands_for(report: Report, run: Report) -> list[str]:
    """What tune measured a run for."""
    labels = part(report, "beside")
    return [told for key, told in _BESIDE.items() if labels.get(key) == run.get("label")]


def run_name(run: Report, names: Names, *, decides: bool = False, stands_for: Sequence[str] = ()) -> Markup:
    """A run's label, what it is, and its adapters with their scales."""
    told: list[Child] = [names.markup(words(run, "label"), "label")]
    if decides:
        told.append(badge("decides", "plain"))
    what = [*stands_for, *(["control"] if words(run, "role") == "control" and not stands_for else [])]
    scales = [number(adapter, "scale") for adapter in parts(run, "adapters")]
    if any(scale not in (None, 1.0) for scale in scales):
        what.append("at " + " + ".join(figure(scale) for scale in scales))
    if what:
        told.append(element("span", ", ".join(what), class_="under"))
    if "error" in run:
        told.append(badge("failed", "bad"))
    return join(told)


def _failures(runs: Sequence[Report], names: Names) -> list[Markup]:
    failed = [run for run in runs if words(run, "error")]
    return [
        paragraph(names.markup(words(run, "label")), f": {words(run, 'error')}", class_="failure") for run in failed
    ]


def categories_section(report: Report, level: int) -> Section | None:
    """Refusals by kind and category, one column a run."""
    runs = [run for run in runs_of(report) if parts(run, "categories")]
    if not runs:
        return None
    keys = list(
        dict.fromkeys((words(c, "kind"), words(c, "category")) for run in runs for c in parts(run, "categories"))
    )
    names = names_of(report)
    cells = [{(words(c, "kind"), words(c, "category")): c for c in parts(run, "categories")} for run in runs]
    columns = [
        Column("Category"),
        Column("Kind"),
        *(Column(names.markup(words(run, "label"), "label"), "figure") for run in runs),
    ]
    rows = [
        [one_line(category) or "without a category", kind, *(_category(of.get((kind, category))) for of in cells)]
        for kind, category in keys[:_MOST_CATEGORIES]
    ]
    left_out = len(keys) - len(rows)
    note = [paragraph(f"{left_out:,} more are in the JSON report.", class_="aside")] if left_out > 0 else []
    body = join([table("Share of prompts refused, by category", columns, rows), *note])
    if len(rows) > 24:
        body = fold(f"All {len(rows)} categories", body)
    return Section("categories", "By category", body)


def _category(found: Report | None) -> Child:
    if found is None:
        return MISSING
    under = f"{whole(found, 'refused')} of {whole(found, 'total')}"
    interval = pair(found, "interval")
    if interval is not None:
        under += f" · {100 * interval[0]:.0f}–{100 * interval[1]:.0f}\u00a0%"
    return join([element("span", percent(number(found, "rate"))), element("span", under, class_="under")])


def utility_section(report: Report, level: int) -> Section | None:
    """How far every run's next tokens are from those of the models it is compared with."""
    names = names_of(report)
    rows: list[list[Child]] = [
        [names.markup(words(run, "label")), names.markup(words(found, "against")), figure(number(found, "kl")),
         percent(number(found, "top1"), 1), f"{whole(found, 'prompts'):,}", f"{whole(found, 'positions'):,}"]
        for run in runs_of(report)
        for found in parts(run, "utility")
    ]  # fmt: skip
    if not rows:
        return None
    columns = [Column("Run"), Column("Against"), Column("Mean KL, nats", "figure"), Column("Same top-1", "figure")]
    columns += [Column("Prompts", "figure"), Column("Positions", "figure")]
    how = (
        "Over the next-token distributions along the other model's own answers to benign prompts: the mean KL "
        "divergence (0: the same distribution) and how often the likeliest token is the same."
    )
    whole_table = table("How much of the other model's behaviour is left", columns, rows)
    return Section("utility", "Utility", join([paragraph(how, class_="aside"), whole_table]))


def agreement_section(report: Report, level: int) -> Section | None:
    """How often the judges said the same, and what the score judge was calibrated on."""
    names = names_of(report)
    rows: list[list[Child]] = [
        [names.markup(words(run, "label")), " and ".join(map(one_line, texts(found, "judges"))),
         percent(number(found, "rate"), 1), f"{whole(found, 'agreed')} of {whole(found, 'both')}",
         figure(number(found, "kappa"), 2)]
        for run in runs_of(report)
        for found in parts(run, "agreement")
    ]  # fmt: skip
    calibration = part(report, "calibration")
    if not rows and not calibration:
        return None
    body: list[Child] = []
    if rows:
        columns = [Column("Run"), Column("Judges"), Column("Agree", "figure"), Column("Answers", "figure")]
        caption = "How often two judges that both decided said the same"
        body.append(table(caption, [*columns, Column("Cohen’s κ", "figure")], rows))
    if calibration:
        body += [heading(level + 1, "Calibration of the refusal score"), _calibration(calibration)]
    return Section("judges", "The judges", join(body))


def _calibration(found: Report) -> Markup:
    tokens = join(
        join([element("code", shortened(token.replace(" ", "␣"), 24)[0], class_="token"), " "])
        for token in texts(found, "tokens")[:60]
    )
    on = f"{counted(whole(found, 'refused'), 'refusal')} and {counted(whole(found, 'answered'), 'answer')}"
    told = (
        f"On {on} of the aligned model the threshold is {figure(number(found, 'threshold'))}; the scores of refusals "
        f"and answers are ordered rightly in {percent(number(found, 'separation'), 1)} of pairs. First tokens that "
        "count as refusals: "
    )
    return paragraph(told, tokens)

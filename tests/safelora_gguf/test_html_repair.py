"""A repair's page, read back from its elements. Oracles: the report's own figures, and the axes that are drawn."""

from __future__ import annotations

import math
import re
from statistics import median

import pytest
from html_outline import Node, section, tree
from html_reports import CATEGORIES, Report, project_report, repair_report, tune_report

from safelora_gguf.html import page


def told(report: Report) -> str:
    return tree(page(report)).one("header").text


def at(mark: Node) -> tuple[float, float]:
    if mark.tag == "circle":
        return mark.figure("cx"), mark.figure("cy")
    corners = [tuple(map(float, corner.split(","))) for corner in mark.attributes["points"].split()]
    return sum(x for x, _ in corners) / len(corners), sum(y for _, y in corners) / len(corners)


def test_the_search_puts_octaves_at_equal_steps_and_rates_upwards() -> None:
    report = repair_report()
    chart = section(page(report), "search").one("svg", "frontier")
    figures = {anchor: {each.text.split()[0]: each for each in chart.find("text")
                        if each.attributes.get("text-anchor") == anchor and re.fullmatch(r"[\d.]+( %)?", each.text)}
               for anchor in ("middle", "end")}  # fmt: skip
    one, four = (figures["middle"][name].figure("x") for name in ("1", "4"))
    lines = [line.figure("y1") for line in chart.find("line", "grid")]
    up = dict(zip((float(name) / 100 for name in figures["end"]), lines, strict=True))
    marks = {mark.one("title").text: mark for tag in ("circle", "polygon") for mark in chart.find(tag, "mark")}
    rates = [(step, key, family) for step in report["search"]
             for family, key in enumerate(("refusal_rate", "over_refusal_rate", "task_rate"))
             if step[key] is not None]  # fmt: skip
    assert len(marks) == len(rates)
    for step, key, family in rates:
        by = "text" if step["by"] == "text" else "first tokens"
        (mark,) = (mark for title, mark in marks.items()
                   if f"mark f{family}" in " ".join(mark.kinds) and title.startswith(f"mu {step['mu']:.4g}: ")
                   and title.endswith(by))  # fmt: skip
        x, y = at(mark)
        assert x == pytest.approx(one + (four - one) * math.log(step["mu"]) / math.log(4), abs=0.05)
        assert y == pytest.approx(up[0.0] + (up[1.0] - up[0.0]) * step[key], abs=0.05)
        assert ("hollow" in mark.kinds) == (by == "first tokens")
    bound = chart.one("line", "bound")
    assert bound.figure("y1") == pytest.approx(
        up[0.0] + (up[1.0] - up[0.0]) * report["bounds"]["min_refusal"], abs=0.05
    )
    chosen = chart.one("g", "chosen")
    assert chosen.one("line").figure("x1") == pytest.approx(
        one + (four - one) * math.log(4.757) / math.log(4), abs=0.05
    )
    assert chosen.one("text").text == "mu 4.757"


def test_the_search_is_a_table_too_with_the_chosen_mu_marked() -> None:
    report = repair_report()
    rows = list(section(page(report), "search").one("tbody").find("tr"))
    assert len(rows) == len(report["search"])
    assert [row.text.startswith("4.757chosen") for row in rows] == [False] * 4 + [True]
    assert [cell.text for cell in rows[3].find("td")] == ["text", "88 %", "11 %", "90 %"]


def test_it_is_said_which_prompts_calibrated_and_which_categories_only_judged() -> None:
    report = repair_report()
    prompts = section(page(report), "prompts")
    assert [row.one("th").text for row in prompts.one("tbody").find("tr")] == ["calibrate", "judge"]
    assert f"harmful: {', '.join(CATEGORIES[4:])}" in prompts.text
    assert "task:" not in prompts.text
    assert "It was calibrated on 60 other prompts; 2 categories of those that judge had no part in it." in told(report)
    assert "700 tokens" in prompts.text and "2,048 tokens" in prompts.text
    same = repair_report(halves=False)
    assert "the same ones" in section(page(same), "prompts").text
    assert "other prompts;" not in told(same)


def test_the_verdict_tells_what_is_kept_and_where() -> None:
    report = repair_report()
    benign, harmful = (median(each[key] for each in report["modules"]) for key in ("kept_benign", "kept_harmful"))
    assert f"Repaired 28 of 28 modules with mu 4.757: {benign:.0%} of".replace("%", " %") in told(report)
    assert f"{harmful:.0%} where the model refuses".replace("%", " %") in told(report)
    assert "bounds met" in told(report)
    assert "bounds missed" in told(report | {"verdict": "fail"})
    unwritten = {key: value for key, value in report.items() if key != "output"} | {"verdict": "fail"}
    assert "nothing written" in told(unwritten)
    assert "Something to know." in told(report)


@pytest.mark.parametrize(
    ("caption", "key"),
    [
        ("Share of the update that is kept on benign", "kept_benign"),
        ("Share that is kept where the model refuses", "kept_harmful"),
    ],
)
def test_every_share_stands_under_its_layer_and_projection(caption: str, key: str) -> None:
    report = repair_report()
    del report["modules"][5][key]
    maps = section(page(report), "layers").find("table", "heat")
    (found,) = (each for each in maps if each.one("caption").text.startswith(caption))
    shown = [cell.seen for row in found.one("tbody").find("tr") for cell in row.find("td")]
    assert shown == [f"{100 * each[key]:.0f}" if key in each else "" for each in report["modules"]]
    assert found.one("caption").text.endswith("100 %")


def test_without_a_random_control_none_is_spoken_of() -> None:
    report = repair_report()
    controls = section(page(report), "controls")
    assert [each.text for each in controls.one("ul", "marks").find("li")] == ["beats plain scaling"]
    assert "random subspace" not in controls.text
    assert "takes nothing away" not in told(report)
    report["controls"]["norm_ratio"] = 1.135
    assert "At 114 % of the adapter’s norm scaling takes nothing away." in told(report)


def test_a_dry_run_has_no_figures() -> None:
    report = repair_report() | {"mu": None, "captured": None, "search": [], "planned_output": {"path": "o", "bytes": 1}}
    for key in ("runs", "controls", "deciding", "flips", "verdict", "confidence", "output"):
        del report[key]
    assert "28 modules would be repaired" in told(report) and "dry run" in told(report)


def test_tune_s_page_shows_the_repair_that_won() -> None:
    repaired = repair_report()
    report = tune_report() | {"project": None, "repair": repaired}
    maps = [each.one("caption").text for each in section(page(report), "layers").find("table", "heat")]
    assert any(caption.startswith("Share that is kept where the model refuses") for caption in maps)
    assert repaired["output"]["path"] in section(page(report), "provenance").text.replace("\u200b", "")
    assert "Further" not in [each.text for each in tree(page(report)).find("h2")]
    both = tune_report() | {"project": project_report(layers=1)}
    assert section(page(both), "layers").text.count("Cosine")

"""The page in a browser, opened from a file as a double click does. Oracle: Chromium, and WCAG's contrast formula."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from html_reports import Report, hostile_report, project_report, repair_report, smoke_report, tune_report
from models import Trio

from safelora_gguf.html import page as html_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `test` has it)")

A4 = {"width": 688, "height": 1017}
"""The printed part of A4 with margins of 14 mm, in CSS pixels."""
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
REPORTS = {
    "smoke": smoke_report(), "tune": tune_report(), "project": project_report(), "repair": repair_report(),
    "hostile": hostile_report(),
}  # fmt: skip
OPEN_ALL = "document.querySelectorAll('details').forEach(each => { each.open = true })"
LOWEST_CONTRAST = """() => {
  const parse = text => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return {rgb: found.slice(0, 3), alpha: found.length > 3 ? found[3] : 1};
  };
  const over = (top, below) => top.rgb.map((value, at) => value * top.alpha + below[at] * (1 - top.alpha));
  const canvas = () => parse(getComputedStyle(document.body).backgroundColor).rgb;
  const behind = node => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), canvas());
  };
  const light = rgb => {
    const [red, green, blue] = rgb.map(value => value / 255)
      .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let lowest = [99, ""], seen = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || node.closest("script, title, .unseen")) continue;
    if (!node.getClientRects().length) continue;
    const style = getComputedStyle(node), ground = behind(node);
    const ink = over(parse(node.closest("svg") ? style.fill : style.color), ground);
    const [dark, bright] = [light(ink), light(ground)].sort((one, two) => one - two);
    const ratio = (bright + 0.05) / (dark + 0.05);
    seen += 1;
    if (ratio < lowest[0]) lowest = [ratio, node.outerHTML.slice(0, 200)];
  }
  return {ratio: lowest[0], where: lowest[1], seen};
}"""

Cli = Callable[..., subprocess.CompletedProcess[str]]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a report in a page of its own; what it asks for and complains about is in `page.asked`, `page.told`."""
    contexts = []

    def show(report: Report, **options: Any) -> Any:
        file = tmp_path / "report.html"
        file.write_text(html_page(report), encoding="utf-8")
        contexts.append(browser.new_context(**{"viewport": DESKTOP, **options}))
        page = contexts[-1].new_page()
        page.asked, page.told = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.told.append(message.text))
        page.on("pageerror", lambda error: page.told.append(str(error)))
        page.goto(file.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", REPORTS)
def test_it_asks_for_nothing_but_itself_and_complains_about_nothing(opened: Open, name: str) -> None:
    page = opened(REPORTS[name])
    page.evaluate(OPEN_ALL)
    page.wait_for_load_state("networkidle")
    assert len(page.asked) == 1
    assert page.asked[0].startswith("file:")
    assert page.told == []


def test_its_policy_stops_scripts_and_styles_that_are_not_its_own(opened: Open) -> None:
    page = opened(REPORTS["smoke"])
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.__ran = 1";
            document.body.append(script, Object.assign(document.createElement("img"), {src: "https://example.org/x.png"}));
            document.querySelector("h1").setAttribute("style", "color: red");
        }"""
    )
    assert page.evaluate("window.__ran") is None
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") != "rgb(255, 0, 0)"
    page.wait_for_load_state("networkidle")
    refused = [told for told in page.told if "Content Security Policy" in told]
    assert all(any(kind in told for told in refused) for kind in ("script", "style", "image")), page.told


def test_hostile_text_stays_text(opened: Open) -> None:
    page = opened(REPORTS["hostile"])
    page.evaluate(OPEN_ALL)
    assert page.evaluate("window.__pwned") is None
    assert page.locator("img").count() == 0
    assert page.locator("body > script").count() == 1
    assert "<script>" in page.inner_text("h1")
    assert "<script>window.__pwned=1</script>" in page.locator(".flip .prompt").first.text_content()
    assert page.locator(".said .control").first.inner_text() == "U+202E"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", REPORTS)
def test_every_text_can_be_read(opened: Open, name: str, scheme: str) -> None:
    page = opened(REPORTS[name], color_scheme=scheme)
    page.evaluate(OPEN_ALL)
    found = page.evaluate(LOWEST_CONTRAST)
    assert found["seen"] > 100
    assert found["ratio"] >= 4.5, found


def test_light_and_dark_are_the_readers_choice(opened: Open) -> None:
    grounds = {
        scheme: opened(REPORTS["smoke"], color_scheme=scheme).evaluate(
            "getComputedStyle(document.body).backgroundColor"
        )
        for scheme in ("light", "dark")
    }
    assert grounds["light"] == "rgb(255, 255, 255)"
    assert max(map(int, grounds["dark"][4:-1].split(","))) < 60


@pytest.mark.parametrize("name", REPORTS)
def test_a_phone_scrolls_the_tables_and_not_the_page(opened: Open, name: str) -> None:
    page = opened(REPORTS[name], viewport=PHONE)
    page.evaluate(OPEN_ALL)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth)")


@pytest.mark.parametrize("name", REPORTS)
def test_on_paper_nothing_is_cut(opened: Open, name: str) -> None:
    page = opened(REPORTS[name], viewport=A4, color_scheme="dark")
    page.emulate_media(media="print")
    page.evaluate(OPEN_ALL)
    widest = "Math.max(...[...document.querySelectorAll('svg')].map(each => each.getBoundingClientRect().right), 0)"
    assert page.evaluate(widest) <= A4["width"]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert page.evaluate("[...document.querySelectorAll('.bar')].every(each => !each.getClientRects().length)")


def test_it_prints(opened: Open) -> None:
    page = opened(REPORTS["tune"])
    closed = page.pdf(prefer_css_page_size=True)
    page.evaluate(OPEN_ALL)
    assert closed.startswith(b"%PDF-")
    assert len(page.pdf(prefer_css_page_size=True)) > len(closed), "what is closed stays off the paper"


def test_answers_are_closed_until_they_are_opened_by_keys_alone(opened: Open) -> None:
    page = opened(REPORTS["smoke"])
    assert page.locator("details.group[open], details.flip[open]").count() == 0
    assert not page.locator(".said").first.is_visible()
    group = page.locator("details.group").first
    group.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert group.get_attribute("open") is not None
    flip = group.locator("details.flip").first
    flip.locator("summary").focus()
    page.keyboard.press("Space")
    both = flip.locator(".answer")
    assert [both.nth(at).locator(".label").inner_text() for at in (0, 1)] == ["aligned model", "projected adapter"]
    assert both.nth(0).locator(".badge").first.inner_text() == "refused"
    assert both.nth(1).locator(".badge").first.inner_text() == "answered"
    assert both.nth(1).locator(".said").is_visible()


def test_answers_can_be_searched_and_opened_at_once(opened: Open) -> None:
    page = opened(REPORTS["smoke"])
    group = page.locator("details.group", has=page.locator("input")).last
    group.locator("summary").first.click()
    flips, wanted = group.locator("details.flip"), "task question number 3,"
    before = flips.count()
    group.locator("input").fill(wanted)
    visible = [flips.nth(at) for at in range(before) if flips.nth(at).is_visible()]
    assert 0 < len(visible) < before
    assert all(wanted in each.inner_text() for each in visible)
    group.get_by_role("button", name="Open all").click()
    assert group.locator("details.flip[open]").count() == len(visible)


def test_without_scripts_it_says_the_same(opened: Open) -> None:
    report = REPORTS["tune"]
    texts = [
        opened(report, java_script_enabled=enabled).locator("main").evaluate("node => node.textContent")
        if enabled
        else opened(report, java_script_enabled=False).locator("main").text_content()
        for enabled in (True, False)
    ]
    for added in ("Find in prompts and answers", "Open all", "Close all"):
        texts[0] = texts[0].replace(added, "")
    assert texts[0] == texts[1]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_chosen_candidate_is_seen_in_the_frontier(opened: Open, viewport: dict[str, int]) -> None:
    report = REPORTS["tune"]
    page = opened(report, viewport=viewport)
    ring, box = page.locator(".chosen .ring").first, page.locator("#frontier .scroll").first
    inner, outer, axis = ring.bounding_box(), box.bounding_box(), page.locator(".upward").first.bounding_box()
    assert axis["x"] == pytest.approx(outer["x"], abs=1), "the axis stays where the rest scrolls"
    assert axis["height"] == pytest.approx(page.locator(".frontier").first.bounding_box()["height"], abs=1)
    assert axis["x"] + axis["width"] <= inner["x"]
    assert inner["x"] + inner["width"] <= outer["x"] + outer["width"]
    middle = inner["x"] + inner["width"] / 2
    marks = page.evaluate(
        """() => [...document.querySelector(".frontier").querySelectorAll(".mark")].map(each => {
            const box = each.getBoundingClientRect();
            return [box.left + box.width / 2, each.querySelector("title").textContent, each.matches(".hollow")];
        })"""
    )
    named = [mark for mark in marks if mark[1].startswith(report["chosen"]["name"] + ":")]
    assert len(named) == 1
    assert abs(named[0][0] - middle) < 2
    assert not named[0][2]


NAMES = ("scale 0.35", "subspace rank 6 number 14 strength 0.25", "W" * 48, "字" * 48)
OUTSIDE = """() => [...document.querySelectorAll(".frontier")].flatMap(chart => {
  const view = chart.viewBox.baseVal, labels = [...chart.querySelectorAll("text")];
  return labels.map(label => [label.textContent, label.getBBox()])
    .filter(([, box]) => box.x < view.x || box.x + box.width > view.x + view.width
      || box.y < view.y || box.y + box.height > view.y + view.height)
    .map(([text]) => text);
})"""


@pytest.mark.parametrize("refused", [0.0, 0.45, 1.0])
@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_no_label_of_the_frontier_is_cut_wherever_its_mark_is(opened: Open, refused: float, kept: float) -> None:
    for name, bound in zip(NAMES, (0.02, 0.99, 0.02, 0.99), strict=True):
        report = tune_report(reached=False)
        winner = report["nearest"]
        placed = winner | {"name": name, "refusal_rate": refused, "utility": kept, "top1": kept}
        others = [each for each in report["candidates"] if each["name"] != winner["name"]]
        report |= {"candidates": [*others, placed], "nearest": placed}
        report["bounds"] = report["bounds"] | {"min_refusal": bound}
        page = opened(report)
        assert page.locator(".chosen .name").count() == 2
        assert page.evaluate(OUTSIDE) == []


def test_paths_and_digests_break_where_they_may_be_read_on(opened: Open) -> None:
    report = project_report(layers=1)
    report["inputs"][0]["path"] = "/a_long_directory/" * 8 + "adapter_model.safetensors"
    page = opened(report, viewport=PHONE)
    lines = page.evaluate(
        """() => ["#provenance .path", "#provenance .digest"].map(which => {
          const node = document.querySelector(which), lines = new Map(), range = document.createRange();
          for (const text of node.childNodes) {
            for (let at = 0; at < (text.data ?? "").length; at++) {
              range.setStart(text, at);
              range.setEnd(text, at + 1);
              const top = Math.round(range.getBoundingClientRect().top);
              lines.set(top, (lines.get(top) ?? "") + text.data[at]);
            }
          }
          return [...lines.values()];
        })"""
    )
    assert len(lines[0]) > 1
    assert all(line.endswith("/") for line in lines[0][:-1])
    assert len(lines[1]) > 1
    assert all(len(line) % 8 == 0 for line in lines[1])


def test_everything_has_a_name_for_those_who_hear_it(opened: Open) -> None:
    for report in REPORTS.values():
        page = opened(report)
        page.evaluate(OPEN_ALL)
        assert page.evaluate("[...document.querySelectorAll('table')].every(each => each.caption?.textContent.trim())")
        assert page.evaluate(
            "[...document.querySelectorAll('svg')].every(each => each.getAttribute('aria-hidden') === 'true' "
            "|| each.getAttribute('role') === 'img' && each.getAttribute('aria-label'))"
        )
        assert page.evaluate("[...document.querySelectorAll('[tabindex]')].every(each => each.ariaLabel)")
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5')].map(each => +each.tagName[1])")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        assert page.locator("html").get_attribute("lang") == "en"


def test_a_projection_reports_as_a_page(opened: Open, cli: Cli, trio: Trio, tmp_path: Path) -> None:
    file = tmp_path / "projection.html"
    done = cli("project", "--base", trio.base, "--aligned", trio.aligned, "--adapter", trio.adapter, "--threshold", 0.5,
               "--out", tmp_path / "out.gguf", "--report", file, "--json")  # fmt: skip
    report = json.loads(done.stdout)
    assert file.read_text("utf-8") == html_page(report)
    page = opened(report)
    assert page.told == []
    assert f"{report['projected']} of {report['total']} modules" in page.inner_text("h1").replace("\u00a0", " ")
    cells = page.locator("table.heat").first.locator("td:not(.empty)").count()
    assert cells == len(report["modules"])


def test_a_smoke_test_reports_as_a_page(opened: Open, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    file, family = tmp_path / "smoke.html", Path(__file__).parents[2] / "safelora_gguf" / "tiny_family"
    done = cli("smoke", "--model", family / "aligned.gguf", "--prompts", family / "prompts.jsonl", "--limit", 4,
               "--report", file, "--json")  # fmt: skip
    report = json.loads(done.stdout)
    assert file.read_text("utf-8") == html_page(report)
    page = opened(report)
    assert page.told == []
    (run,) = report["runs"]
    rates = page.locator("#runs .rate").all_inner_texts()
    assert [text.replace("\u00a0", "") for text in rates[:1]] == [f"{run['refusal_rate']:.0%}"]
    group = page.locator("details.group").last
    group.locator("summary").first.click()
    assert group.locator("details.flip").count() == len(run["responses"])

"""report.html in a real browser: Debian's chromium, where it is installed."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import write_sweep
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from ich.base.config import Config
from ich.pages.page import Curve, Frame, Stack, to_html
from ich.pages.tables import compare

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, compose_in: Callable[..., Config]) -> Path:
    """Of eight settings with two seeds each, and a failed job: ten rows with the last two."""
    models = ("vgg16", "resnet50", "inception_v3", "mobilenet_v2")
    jobs = {
        f"{model},loss={loss},seed={seed}": 0.8 + 0.2 * number + (loss == "focal")
        for number, model in enumerate(models)
        for loss in ("bce", "focal")
        for seed in (0, 1)
    }
    root = tmp_path_factory.mktemp("report")
    sweep = write_sweep(
        root / "seeds", jobs, partial(compose_in, root), failed=["vgg16,loss=bce,seed=1"]
    )
    compare(sweep, resamples=200)
    return sweep.page


@contextmanager
def opened(browser: Browser, path: Path, width: int = 1280, **media: Any) -> Iterator[Page]:
    """A page in which nothing may go wrong, and from which nothing may be fetched."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.emulate_media(**media)
    page.goto(path.as_uri())
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()


LAST = ("mean of all", "always negative")


def shown_rows(page: Page) -> list[str]:
    rows = page.locator("table.ranking tr:not(.part) th[scope=row]:visible")
    return [text.split("\n")[0] for text in rows.all_inner_texts()]


def headings(page: Page) -> list[str]:
    return page.locator("table.ranking thead button:visible").all_inner_texts()


def test_the_ranking_sorts_unfolds_and_is_searched(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        by_auc = shown_rows(page)
        assert by_auc[0] == "mobilenet_v2,loss=focal"
        assert by_auc[-3:] == ["vgg16,loss=bce", *LAST]
        page.get_by_role("button", name="trained M").click()
        assert shown_rows(page)[0].startswith("resnet50")
        page.get_by_role("button", name="trained M").click()
        assert shown_rows(page)[0].startswith("mobilenet_v2")
        assert shown_rows(page)[-2:] == [*LAST]
        page.get_by_role("button", name="setting").click()
        assert shown_rows(page) == [*sorted(by_auc[:-2]), *LAST]
        assert page.get_by_text("seed 1", exact=True).first.is_hidden()
        page.get_by_role("button", name="2 seeds").first.click()
        assert page.get_by_text("seed 1", exact=True).first.is_visible()
        page.get_by_role("searchbox").fill("VGG")
        assert shown_rows(page) == ["vgg16,loss=bce", "vgg16,loss=focal"]


def test_columns_are_switched_on_and_the_first_ones_fit(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        box = page.locator(".ranked .scroll")
        assert box.evaluate("box => box.scrollWidth - box.clientWidth") == 0
        first = ["setting", "AUC", "minus the best", "verdict", "minutes", "trained M"]
        assert headings(page) == first
        page.get_by_text("Columns", exact=True).click()
        page.get_by_role("checkbox", name="log loss").check()
        page.get_by_role("checkbox", name="minutes").uncheck()
        assert headings(page) == [*first[:4], "trained M", "log loss"]
        cells = page.locator("table.ranking tbody tr:not(.part)").first.locator("td:visible")
        assert cells.count() == len(headings(page))  # the plot, and no name


def test_a_phone_shows_the_verdict_and_a_number_of_each_setting(
    browser: Browser, report: Path
) -> None:
    with opened(browser, report, width=375) as page:
        assert headings(page) == ["setting", "AUC"]
        box = page.locator(".ranked .scroll")
        assert box.evaluate("box => box.scrollWidth - box.clientWidth") == 0
        size = page.locator(".verdict p").evaluate("e => parseFloat(getComputedStyle(e).fontSize)")
        assert size >= 16


COLOUR = "(e, name) => getComputedStyle(e)[name]"


def test_in_the_dark_and_on_paper_charts_take_the_page_s_ink(
    browser: Browser, report: Path
) -> None:
    def colours(page: Page) -> tuple[str, str, str]:
        text, back = page.locator(".chart text").first, page.locator(".chart path").first
        body = page.locator("body")
        assert text.evaluate(COLOUR, "fill") == body.evaluate(COLOUR, "color")
        assert back.evaluate(COLOUR, "fill") == body.evaluate(COLOUR, "backgroundColor")
        dot = page.locator(".chart use:not([fill])").first  # black in the picture itself
        assert dot.evaluate(COLOUR, "fill") == body.evaluate(COLOUR, "color")
        best = page.locator("td.span svg.best").first
        return (
            *(body.evaluate(COLOUR, name) for name in ("color", "backgroundColor")),
            best.evaluate(COLOUR, "color"),
        )

    white, black = "rgb(255, 255, 255)", "rgb(0, 0, 0)"
    with opened(browser, report, color_scheme="light") as page:
        light = colours(page)
        assert light[1:] == (white, "rgb(0, 114, 178)")  # Okabe and Ito's blue
    with opened(browser, report, color_scheme="dark") as page:
        dark = colours(page)
        assert all(a != b for a, b in zip(light, dark, strict=True))
    with opened(browser, report, color_scheme="dark", media="print") as page:
        assert colours(page)[:2] == (black, white)
        assert page.locator("nav").is_hidden()
        assert page.locator(".tools").is_hidden()


def test_without_colours_and_without_sight_nothing_is_lost(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        # Each verdict has a form of its own.
        forms = {
            kind: page.locator(f".legend svg.{kind} .value").first.evaluate(
                "e => e.outerHTML.replace(/class=.*?\" /, '')"
            )
            for kind in ("best", "different", "together")
        }
        assert len(set(forms.values())) == 3
        levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(e => +e.tagName[1])")
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        unnamed = "all => all.filter(e => !(e.alt || e.ariaLabel)).length"
        assert page.locator("img, svg[role=img]").evaluate_all(unnamed) == 0
        assert page.locator("figure:not(:has(figcaption))").count() == 0
        assert page.locator("svg:not([role=img], [aria-hidden], svg svg, .legend svg)").count() == 0
        said = page.locator("td.span svg title").first.text_content() or ""
        assert re.fullmatch(
            r"mobilenet_v2,loss=focal: AUC 0\.\d+ \(.* to .*\); its seeds: .*", said
        )
        over = page.locator(".chart .hover title").all_text_contents()
        assert any(text.startswith("mobilenet_v2,loss=focal: AUC") for text in over)
        page.get_by_role("link", name="Why").click()
        assert page.get_by_role("heading", name="Why").is_visible()


def test_a_study_is_scrolled_through(browser: Browser, tmp_path: Path) -> None:
    frames = []
    for n in range(4):
        out = io.BytesIO()
        Image.fromarray(np.full((32, 32), 60 * n, np.uint8)).save(out, "jpeg")
        frames.append(Frame(f"{n + 1} of 4", [("brain", out.getvalue())], [("any 0.5", n == 2)]))
    stack = Stack("Scroll.", [Curve("any", [0.1, 0.2, 0.9, 0.3], 0.5)], frames, first=2)
    (tmp_path / "a.html").write_text(to_html("Study", {}, [("Slices", [stack])]))
    with opened(browser, tmp_path / "a.html", width=390) as page:

        def shown() -> list[str]:
            return page.locator(".frame:visible h3").all_inner_texts()

        assert shown() == ["3 of 4"]
        page.locator(".frames").hover()
        page.mouse.wheel(0, 120)
        page.wait_for_function("document.querySelector('.stack input').value === '3'")
        assert shown() == ["4 of 4"]
        page.mouse.wheel(0, 120)  # stays at the last
        page.locator(".frames").press("ArrowUp")
        page.wait_for_function("document.querySelector('.stack input').value === '2'")
        page.locator(".stack input").fill("0")
        assert shown() == ["1 of 4"]
        page.locator("rect.jump").nth(1).click()
        assert shown() == ["2 of 4"]

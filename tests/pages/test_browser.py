"""report.html in a real browser: Debian's chromium, where it is installed."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture
def report(tmp_path: Path, composed: Callable[..., Config]) -> Path:
    jobs = {
        f"{m},seed={s}": v
        for m, v in {"vgg16": 0.8, "xception": 2.0, "resnet50": 1.9}.items()
        for s in (0, 1)
    }
    sweep = write_sweep(tmp_path / "seeds", jobs, composed)
    compare(sweep, resamples=200)
    return sweep.page


LAST = ("mean of all", "always negative")


def first_column(page: Page) -> list[str]:
    rows = page.locator("table.ranking tbody tr:not(.part) th[scope=row]")
    return [text.split("\n")[0] for text in rows.all_inner_texts()]


def test_the_report_opens_sorts_and_unfolds_without_an_error(
    browser: Browser, report: Path
) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    assert first_column(page)[2:] == ["vgg16", *LAST]  # by AUC, these last
    page.get_by_role("button", name="trained M").click()
    assert first_column(page) == ["resnet50", "xception", "vgg16", *LAST]
    page.get_by_role("button", name="trained M").click()
    assert first_column(page) == ["vgg16", "xception", "resnet50", *LAST]
    page.get_by_role("button", name="setting").click()
    assert first_column(page) == ["resnet50", "vgg16", "xception", *LAST]
    assert page.get_by_text("seed 1", exact=True).first.is_hidden()
    page.get_by_role("button", name="2 seeds").first.click()
    assert page.get_by_text("seed 1", exact=True).first.is_visible()
    pictures = page.locator("img")
    assert pictures.count() >= 7
    for n in range(pictures.count()):
        assert pictures.nth(n).evaluate("image => image.naturalWidth") > 300
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_the_report_fits_a_phone(browser: Browser, report: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_a_study_is_scrolled_through(browser: Browser, tmp_path: Path) -> None:
    frames = []
    for n in range(4):
        out = io.BytesIO()
        Image.fromarray(np.full((32, 32), 60 * n, np.uint8)).save(out, "jpeg")
        frames.append(Frame(f"{n + 1} of 4", [("brain", out.getvalue())], [("any 0.5", n == 2)]))
    stack = Stack("Scroll.", [Curve("any", [0.1, 0.2, 0.9, 0.3], 0.5)], frames, first=2)
    (tmp_path / "a.html").write_text(to_html("Study", {}, [("Slices", [stack])]))
    page = browser.new_page(viewport={"width": 390, "height": 800})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((tmp_path / "a.html").as_uri())

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
    wide = page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    assert (problems, wide) == ([], False)

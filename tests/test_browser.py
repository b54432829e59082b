"""report.html in a real browser: Debian's chromium, where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_up import write_sweep
from playwright.sync_api import Browser, Page, sync_playwright

from ich.config import Config
from ich.report import compare

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
    assert first_column(page)[2:] == ["vgg16", "always negative"]  # by AUC, baseline last
    page.get_by_role("button", name="trained M").click()
    assert first_column(page) == ["resnet50", "xception", "vgg16", "always negative"]
    page.get_by_role("button", name="trained M").click()
    assert first_column(page) == ["vgg16", "xception", "resnet50", "always negative"]
    page.get_by_role("button", name="setting").click()
    assert first_column(page) == ["resnet50", "vgg16", "xception", "always negative"]
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

"""Reports in a browser: nothing is wider than a phone, axe finds no fault, Tab goes through."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastproj.trak.evaluation.report import write_report
from tests.trak.evaluation.pages import PAGES

pytestmark = pytest.mark.slow

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, or the one that playwright has downloaded."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as started:
        if found is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("there is no Chromium here: apt-get install chromium")
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, path: Path, width: int, scheme: str = "light") -> Any:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_or_too_small(
    browser: Any, tmp_path: Path, kind: str, width: int
) -> None:
    page = opened(browser, write_report(tmp_path / "page.html", PAGES[kind]()), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Wider than its box is only what can be scrolled.
    wide = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter(e =>
            e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".wide")).length"""
    )
    assert wide == 0
    small = page.evaluate(
        """() => [...document.querySelectorAll("p, li, td, th, figcaption, summary, a")].filter(e =>
            e.innerText && parseFloat(getComputedStyle(e).fontSize) < 11).length"""
    )
    assert small == 0
    sides = page.locator(".side")
    if kind != "table":
        first, second = sides.nth(0).bounding_box(), sides.nth(1).bounding_box()
        beside = second["x"] >= first["x"] + first["width"]
        assert beside == (width == 1280)
    page.close()


@pytest.mark.parametrize("kind", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(browser: Any, tmp_path: Path, kind: str, scheme: str) -> None:
    """Contrast, names, roles, landmarks, headings and scrollable regions, by axe-core."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    path = write_report(tmp_path / "page.html", PAGES[kind]())
    for width in WIDTHS:
        page = opened(browser, path, width, scheme)
        for summary in page.locator("summary").all():
            summary.click()
        found = axe.run(page).response
        assert not found["violations"], [
            (v["id"], v["nodes"][0]["html"], v["nodes"][0]["failureSummary"])
            for v in found["violations"]
        ]
        assert len(found["passes"]) > 15
        page.close()


@pytest.mark.parametrize("kind", PAGES)
def test_tab_goes_through_in_the_order_of_the_page(browser: Any, tmp_path: Path, kind: str) -> None:
    page = opened(browser, write_report(tmp_path / "page.html", PAGES[kind]()), 390)
    wanted = page.locator("a[href], summary, [tabindex='0']").count()
    assert wanted >= 2
    places = []
    for _ in range(wanted):
        page.keyboard.press("Tab")
        places.append(
            page.evaluate(
                """() => { const e = document.activeElement, s = getComputedStyle(e);
                return [e.getBoundingClientRect().top + scrollY, e.getBoundingClientRect().left,
                        parseFloat(s.outlineWidth), s.outlineStyle, e.tagName]; }"""
            )
        )
    assert all(width >= 2 and style == "solid" for _, _, width, style, _ in places)
    assert "BODY" not in {place[4] for place in places}
    assert [tuple(p[:2]) for p in places] == sorted(tuple(p[:2]) for p in places)
    page.close()


def test_keys_open_a_passage_jump_to_a_target_and_scroll_a_table(
    browser: Any, tmp_path: Path
) -> None:
    page = opened(browser, write_report(tmp_path / "text.html", PAGES["text"]()), 390)
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1
    page.locator("nav a").nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#target-3').getBoundingClientRect().top < 60")
    assert page.evaluate("document.activeElement.id") == "target-3"
    page.close()
    page = opened(browser, write_report(tmp_path / "table.html", PAGES["table"]()), 390)
    page.locator(".wide").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.wide').scrollLeft > 0")
    page.close()

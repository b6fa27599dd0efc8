"""The page that `python -m opd_ray.compare` writes, in a real Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_ray.compare import PAGE_FILE, write_comparison
from opd_ray.comparison.groups import compare_runs
from tests.browser.conftest import Browser
from tests.unit.run_folders import write_study

pytestmark = pytest.mark.slow

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    for staleness in (0, 4):
        chances = {"lsm": 0.55, "lsm_block64": 0.7, "lsm_tis": 0.56}
        write_study(folder / f"runs{staleness}", chances, 3, replay={"reuse": 2, "max_staleness": staleness})
    write_comparison(compare_runs([folder], 500), folder / "out")
    return folder / "out" / PAGE_FILE


def test_opens_from_disk_without_network_or_errors_and_shows_its_pictures(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("return document.title") == "Comparison of runs"
    sizes = browser.run("return [...document.images].map(image => image.complete && image.naturalWidth)")
    assert len(sizes) == 3 and all(size > 300 for size in sizes)
    assert [name for name in browser.requests() if not name.startswith("data:")] == []
    assert browser.errors() == []


def test_says_the_verdicts(browser: Browser, page: Path) -> None:
    browser.open(page)
    rows = browser.run("return [...document.querySelectorAll('tr')].map(row => row.innerText)")
    [better] = {row.split("\t")[0] for row in rows if "\tbetter" in row and "lsm\tavg@8" in row}
    assert better == "lsm_block64"
    assert "6 better" not in browser.run("return document.querySelector('.answer').innerText")


def test_folded_tables_open_on_a_click(browser: Browser, page: Path) -> None:
    browser.open(page)
    shown = "return document.querySelector('details table').checkVisibility()"
    assert browser.run(shown) is False
    browser.run("document.querySelector('summary').click()")
    assert browser.run(shown) is True


@pytest.mark.parametrize("width", [1280, 390])
def test_only_tables_and_pictures_scroll_sideways(browser: Browser, page: Path, width: int, tmp_path: Path) -> None:
    browser.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", PHONE if width == 390 else {**PHONE, "width": 1280, "mobile": False}
    )
    try:
        browser.open(page)
        assert browser.run("return window.innerWidth") == width
        root = "document.documentElement"
        assert browser.run(f"return {root}.scrollWidth") <= browser.run(f"return {root}.clientWidth")
        # A page without its style would be as narrow.
        assert browser.run("return getComputedStyle(document.querySelector('.scroll')).overflowX") == "auto"
        assert browser.screenshot(tmp_path / "page.png").stat().st_size > 20_000
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

"""The page of a trajectory in a real browser: from disk, without network, with the run's own text in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from opd_ray.inspect import main
from opd_ray.run.trajectory_records import RECORDS_FOLDER, RecordedUse, write_records
from tests.browser.conftest import Browser
from tests.unit.dumped import SETTINGS, made_use

pytestmark = pytest.mark.slow

PIECES = ["6", " times", " 7", "\n", " is", " 42", "</script>", "<b>x</b>", "", "é", "\n", " so"] * 4

NASTY = "<img src=x onerror=window.hacked=1>"


def uses() -> list[RecordedUse]:
    """A fresh use and one that drifted, most in the second segment; the third token is masked."""
    fresh, second = (made_use(PIECES, step=step, use=use) for step, use in ((1, 1), (2, 2)))
    drift = np.where(second.segment_ids == 1, -0.5, 0.1).astype(np.float32)
    drift[9] = np.nan
    mask = np.arange(len(PIECES)) != 2
    texts = list(second.texts)
    texts[second.teacher_topk_ids[10, 0]] = NASTY
    return [fresh, replace(second, drift=drift, mask=mask, texts=tuple(texts))]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    for use in uses():
        write_records(run / RECORDS_FOLDER, 0, [use], SETTINGS)
    main([str(run), "trajectory=3"])
    return run / RECORDS_FOLDER / "trajectory-3.html"


@pytest.fixture
def opened(browser: Browser, page: Path) -> Browser:
    browser.open(page)
    return browser


def tokens(browser: Browser) -> list[WebElement]:
    return browser.driver.find_elements("css selector", "#text .t")


def card(browser: Browser) -> str:
    """The card's text; empty while it is hidden."""
    return str(browser.run("const card = document.getElementById('card'); return card.hidden ? '' : card.innerText"))


def choose(browser: Browser, group: str, value: object) -> None:
    browser.driver.find_element("css selector", f"#{group} button[data-value='{value}']").click()


def test_it_opens_without_network_and_without_an_error(opened: Browser) -> None:
    assert opened.run("return location.protocol") == "file:"
    assert opened.requests() == []
    assert opened.errors() == []


def test_the_response_stands_there_word_for_word_and_no_part_of_it_became_markup(opened: Browser) -> None:
    text = opened.run(
        "return [...document.querySelectorAll('#text .t')].map(token => "
        "[...token.childNodes].filter(node => node.nodeType === 3).map(node => node.data).join('')).join('')"
    )
    assert text == "".join(PIECES)
    assert opened.run("return document.querySelectorAll('#text b, #text img, #card img').length") == 0
    assert opened.run("return document.scripts.length") == 2


def test_pointing_at_a_token_shows_its_numbers_and_both_lists(opened: Browser) -> None:
    assert card(opened) == ""
    ActionChains(opened.driver).move_to_element(tokens(opened)[10]).perform()
    shown, use = card(opened), uses()[1]
    assert "token 11 of 48" in shown and f"id {use.response_token_ids[10]}" in shown
    assert "−0.5" in shown, "the drift"
    assert f"{use.losses[10]:.3g}" in shown
    assert shown.count("%") == 2 + 4 * 2 + 4, "two masses, teacher and student at 4 ids, the student's own 4"
    assert NASTY in shown
    assert all(use.texts[token_id] in shown for token_id in use.teacher_topk_ids[10])
    ActionChains(opened.driver).move_to_element(opened.driver.find_element("tag name", "h1")).perform()
    assert card(opened) == "", "gone with the pointer"
    assert opened.run("return window.hacked") is None
    assert opened.errors() == []


def test_a_click_keeps_the_card_and_keys_step_from_token_to_token(opened: Browser) -> None:
    tokens(opened)[4].click()
    ActionChains(opened.driver).move_to_element(opened.driver.find_element("tag name", "h1")).perform()
    assert "token 5 of 48" in card(opened)
    opened.driver.find_element("id", "text").send_keys(Keys.ARROW_RIGHT)
    assert "token 6 of 48" in card(opened)
    opened.driver.find_element("id", "text").send_keys(Keys.ESCAPE)
    assert card(opened) == ""


def backgrounds(browser: Browser) -> list[str]:
    return [str(token.value_of_css_property("background-color")) for token in tokens(browser)]


def test_each_colouring_has_its_scale_and_drift_has_two_hues(opened: Browser) -> None:
    assert opened.run("return document.querySelector('#colors [aria-checked=true]').textContent") == "drift"
    by_drift = backgrounds(opened)
    assert by_drift[8] == by_drift[10] != by_drift[0] == by_drift[20], "the segment that fell, and one that rose"
    assert by_drift[9] == "rgba(0, 0, 0, 0)", "not measured: no colour"
    assert by_drift[2] == "rgba(0, 0, 0, 0)", "masked: no colour"
    legends, seen = set(), [by_drift]
    for value in ("token_weights", "kl", "losses", "versions"):
        choose(opened, "colors", value)
        seen.append(backgrounds(opened))
        legends.add(opened.driver.find_element("id", "legend").text)
    assert len({tuple(colors) for colors in seen}) == 5 and len(legends) == 4
    assert len(set(seen[-1]) - {"rgba(0, 0, 0, 0)"}) == 2, "two versions"


def test_segments_are_marked_with_their_drift_and_gate(opened: Browser) -> None:
    marks = opened.driver.find_elements("css selector", "#text .seg")
    assert [mark.text for mark in marks] == [str(number) for number in range(6)]
    use = uses()[1]
    title = str(marks[1].get_attribute("title"))
    assert "segment 1" in title and "8 tokens" in title and f"{use.segment_gate[1]:.4g}" in title


def test_the_first_visit_says_that_it_is_fresh(opened: Browser) -> None:
    assert "drift is zero by definition" not in opened.driver.find_element("id", "words").text
    choose(opened, "uses", 0)
    assert "drift is zero by definition" in opened.driver.find_element("id", "words").text
    assert opened.errors() == []


def test_a_click_on_the_plot_goes_to_the_token(opened: Browser) -> None:
    assert len(opened.driver.find_elements("css selector", "#plot path")) == 4, "drift twice, weight, KL"
    box = opened.driver.find_element("css selector", "#plot rect")
    ActionChains(opened.driver).move_to_element_with_offset(box, 6, 0).click().perform()
    assert "token 25 of 48" in card(opened), "a little right of the middle"
    assert opened.errors() == []


def test_a_long_response_opens_too(browser: Browser, tmp_path: Path) -> None:
    pieces = [f" w{number}" for number in range(16_384)]
    write_records(tmp_path / RECORDS_FOLDER, 0, [made_use(pieces, top_k=32)], SETTINGS)
    main([str(tmp_path)])
    browser.open(tmp_path / RECORDS_FOLDER / "trajectory-3.html")
    assert browser.run("return document.querySelectorAll('#text .t').length") == len(pieces)
    assert browser.errors() == []

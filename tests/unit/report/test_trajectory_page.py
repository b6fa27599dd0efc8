"""The page of a trajectory: nothing of the run's text becomes markup, and the script gets the numbers as they are."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from opd_ray.errors import DataError
from opd_ray.report.trajectory_page import trajectory_page
from opd_ray.run.trajectory_records import RecordedUse
from tests.unit.dumped import SETTINGS, made_use

NASTY = ["</script>", "<script>", "alert(1)", "<!--", "&amp;", "{{ 7 * 7 }}", "\u2028", "'\"", "\x00", "<img src=x>"]


class Tags(HTMLParser):
    """Counts the tags of a page, and keeps the text of its data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.data = ""
        self._is_data = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self._is_data = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._is_data = False

    def handle_data(self, data: str) -> None:
        if self._is_data:
            self.data += data


def page_of(*uses: RecordedUse, run: str = "run") -> str:
    return trajectory_page(uses, 0, run=run, settings=SETTINGS)


def data_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Tags(page).data)
    return found


def unpacked(packed: dict[str, str]) -> Any:
    return np.frombuffer(base64.b64decode(packed["data"]), dtype=packed["type"])


def test_text_of_the_run_never_becomes_markup() -> None:
    plain = made_use(["a"] * len(NASTY))
    nasty = replace(
        plain,
        response_pieces=tuple(NASTY),
        prompt_text="".join(NASTY),
        prompt_id="<b>bold</b>",
        finish_reason="<i>",
        texts=tuple(NASTY[number % len(NASTY)] for number in range(len(plain.texts))),
    )
    page = page_of(nasty, run="<u>run</u>")
    assert Tags(page).tags == Tags(page_of(plain)).tags
    assert data_of(page)["pieces"] == NASTY
    assert "{{ 7 * 7 }}" in page, "a response is no template"


def test_the_page_fetches_nothing() -> None:
    page = page_of(made_use(["a", "b"]))
    assert "default-src 'none'" in page
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", page)
    assert addresses == [("data:,", "")]
    assert set(re.findall(r"https?://[^\s\"']*", page)) == {"http://www.w3.org/2000/svg"}, "a name, not an address"


def test_the_script_gets_every_visit_as_it_was_dumped() -> None:
    uses = [made_use(["4", "2"] * 9, step=step, use=use, top_k=5) for step, use in ((1, 1), (2, 2))]
    data = data_of(page_of(*uses))
    assert [(one["step"], one["use"], one["isFresh"]) for one in data["uses"]] == [(1, 1, True), (2, 2, False)]
    ids = unpacked(data["textIds"])
    for found, use in zip(data["uses"], uses, strict=True):
        for name in ("drift", "token_weights", "kl", "losses", "current_logprobs"):
            np.testing.assert_array_equal(unpacked(found[name]), getattr(use, name), err_msg=name)
        np.testing.assert_array_equal(unpacked(found["segments"]), use.segment_ids)
        np.testing.assert_array_equal(unpacked(found["mask"]), use.mask)
        np.testing.assert_array_equal(ids[unpacked(found["ownIds"])].reshape(-1, 5), use.student_topk_ids)
        rounded = unpacked(found["studentLogprobs"]).reshape(-1, 5) / -1024
        np.testing.assert_allclose(rounded, use.student_at_support_logprobs, atol=0.5 / 1024 + 1e-6)
    np.testing.assert_array_equal(ids[unpacked(data["teacherIds"])].reshape(-1, 5), uses[0].teacher_topk_ids)
    assert data["texts"] == list(uses[0].texts)


def test_log_probs_that_are_no_numbers_stand_for_probability_zero() -> None:
    logprobs = np.array([[-0.5, -np.inf, np.nan, -1e6]], dtype=np.float32)
    data = data_of(page_of(made_use(["a"], teacher_topk_logprobs=logprobs)))
    assert unpacked(data["teacherLogprobs"]).tolist() == [512, 65535, 65535, 65535]


def test_numbers_that_were_not_computed_reach_the_script_as_nan() -> None:
    drift = np.array([np.nan, 0.5], dtype=np.float32)
    data = data_of(page_of(made_use(["a", "b"], drift=drift)))
    np.testing.assert_array_equal(unpacked(data["uses"][0]["drift"]), drift)


def test_several_trajectories_are_no_page() -> None:
    with pytest.raises(DataError, match="step=N"):
        page_of(made_use(["a"], trajectory_id=1), made_use(["a"], trajectory_id=2))


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ({}, "block of 8, τ 1 (fixed), signed_mean"),
        ({"kind": "newline", "control": "shuffle"}, "newline, τ 1 (fixed), signed_mean, control: shuffle"),
        ({"kind": "off"}, "<dd>off</dd>"),
        ({"kind": "icepop", "low": 0.5, "high": 2.0}, "icepop, low 0.5, high 2"),
        ({"kind": "hard_drop", "drop_above": 0.1}, "hard drop, block_size 8, drop_above 0.1"),
    ],
)
def test_the_head_names_the_gate_and_what_it_depends_on(gate: dict[str, Any], words: str) -> None:
    settings = {**SETTINGS, "gate": SETTINGS["gate"] | gate}
    assert words in trajectory_page([made_use(["a"])], 0, run="run", settings=settings)

"""The console command `opd-ray`: verbs reach their modules with the rest of the command line."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest

from opd_ray import cli


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_hands_its_arguments_to_its_module(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []

    def fake_import(name: str) -> SimpleNamespace:
        return SimpleNamespace(main=lambda: seen.append((name, sys.argv)))

    monkeypatch.setattr(importlib, "import_module", fake_import)
    monkeypatch.setattr(sys, "argv", ["opd-ray"])
    cli.main([verb, "seed=1", "--cfg", "job"])
    assert seen == [(cli.VERBS[verb][0], [f"opd-ray {verb}", "seed=1", "--cfg", "job"])]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_module_of_every_verb_has_a_main(verb: str) -> None:
    assert callable(importlib.import_module(cli.VERBS[verb][0]).main)


def test_without_a_verb_the_usage_names_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    shown = capsys.readouterr().out
    assert all(f"\n  {verb}" in shown for verb in cli.VERBS)


def test_an_unknown_verb_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["trian"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "opd-ray: error: there is no verb 'trian': give one of train, evaluate, compare, inspect, plan\n"
    )

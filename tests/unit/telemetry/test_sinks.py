import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd_ray.config.choices import WandbMode
from opd_ray.telemetry import Sinks, WandbSink
from opd_ray.telemetry.metrics import Metric
from opd_ray.telemetry.sinks import has_wandb_login, resolve_wandb_mode
from opd_ray.types import Histogram

ROOT = Path(__file__).resolve().parents[3]


class Recorder:
    def __init__(self, error: Exception | None = None) -> None:
        self.logged: list[tuple[int, dict[str, Metric]]] = []
        self.closed = 0
        self.error = error

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        self.logged.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed += 1
        if self.error:
            raise self.error


def test_sinks_pass_everything_on() -> None:
    recorders = [Recorder(), Recorder()]
    sinks = Sinks(recorders)
    sinks.log(3, {"a/b": 1.0})
    sinks.close()
    assert [(recorder.logged, recorder.closed) for recorder in recorders] == [([(3, {"a/b": 1.0})], 1)] * 2


def test_sinks_close_all_and_raise_the_first_failure() -> None:
    recorders = [Recorder(), Recorder(OSError("first")), Recorder(OSError("second")), Recorder()]
    with pytest.raises(OSError, match="first"):
        Sinks(recorders).close()
    assert [recorder.closed for recorder in recorders] == [1, 1, 1, 1]


# W&B: which mode


def netrc_file(folder: Path, host: str = "api.wandb.ai") -> Path:
    path = folder / ".netrc"
    path.write_text(f"machine {host}\n  login user\n  password {'k' * 40}\n")
    path.chmod(0o600)
    return path


def test_auto_is_online_with_a_login_and_offline_without(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert resolve_wandb_mode(WandbMode.auto, home) == "offline"
    assert resolve_wandb_mode(WandbMode.auto, home | {"WANDB_API_KEY": "k"}) == "online"
    assert resolve_wandb_mode(WandbMode.auto, home | {"WANDB_API_KEY": ""}) == "offline"
    netrc_file(tmp_path)
    assert resolve_wandb_mode(WandbMode.auto, home) == "online"
    assert resolve_wandb_mode(WandbMode.auto, home | {"WANDB_MODE": "offline"}) == "offline"
    assert resolve_wandb_mode(WandbMode.auto, home | {"WANDB_MODE": "disabled"}) == "disabled"


def test_a_mode_that_is_set_is_taken(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}
    modes = {mode.value: resolve_wandb_mode(mode, environ) for mode in WandbMode}
    assert modes == {"auto": "disabled", "online": "online", "offline": "offline", "disabled": "disabled"}


def test_logins_are_found_for_the_right_server_only(tmp_path: Path) -> None:
    path = netrc_file(tmp_path, "wandb.example.org")
    home = {"HOME": str(tmp_path)}
    assert not has_wandb_login(home)
    assert has_wandb_login(home | {"WANDB_BASE_URL": "https://wandb.example.org"})
    elsewhere = {"HOME": "/nowhere", "WANDB_BASE_URL": "https://wandb.example.org"}
    assert has_wandb_login(elsewhere | {"NETRC": str(path)})
    path.write_text("machine machine machine {{{")
    assert not has_wandb_login(home)


# W&B: a stand-in for the library


class FakeRun:
    url = "https://wandb.example.org/run"

    def __init__(self, broken: str) -> None:
        self.broken = broken
        self.logged: list[dict[str, float]] = []

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, float]) -> None:
        if self.broken == "log":
            raise RuntimeError("server\ngone")
        self.logged.append(values)

    def finish(self) -> None:
        if self.broken == "finish":
            raise RuntimeError("no answer")


def fake_wandb(monkeypatch: pytest.MonkeyPatch, broken: str = "") -> SimpleNamespace:
    run = FakeRun(broken)
    fake = SimpleNamespace(run=run, options=None, Settings=lambda **options: options)
    fake.Histogram = lambda np_histogram: ("histogram", *(part.tolist() for part in np_histogram))

    def init(**options: Any) -> FakeRun:
        if broken == "init":
            raise ConnectionError("no network")
        fake.options = options
        return run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_metrics_carry_their_step_as_x_axis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = fake_wandb(monkeypatch)
    sink = WandbSink(WandbMode.auto, "project", "run", {"seed": 1}, tmp_path)
    sink.log(2, {"a/b": 1})
    sink.log(1, {"evaluation/pass_at_8": 0.5})  # late, and still logged
    sink.close()
    sink.log(3, {"a/b": 1})  # closed
    assert fake.run.logged == [{"a/b": 1.0, "step": 2}, {"evaluation/pass_at_8": 0.5, "step": 1}]
    assert fake.options["mode"] == "online" and fake.options["dir"] == str(tmp_path)
    assert (fake.options["project"], fake.options["name"]) == ("project", "run")
    assert fake.options["config"] == {"seed": 1}


def test_histograms_become_those_of_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = fake_wandb(monkeypatch)
    sink = WandbSink(WandbMode.offline, "project", "run", {}, tmp_path)
    sink.log(1, {"a/b": Histogram((0.0, 1.0, 2.0), (3.0, 4.0)), "a/c": 1})
    assert fake.run.logged == [{"a/b": ("histogram", [3.0, 4.0], [0.0, 1.0, 2.0]), "a/c": 1.0, "step": 1}]
    with pytest.raises(ValueError, match="do not rise"):
        sink.log(1, {"a/b": Histogram((1.0, 0.0), (3.0,))})


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failure_warns_once_and_never_raises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    fake_wandb(monkeypatch, broken)
    sink = WandbSink(WandbMode.online, "project", "run", {}, tmp_path)
    for step in range(3):
        sink.log(step, {"a/b": 1})
    sink.close()
    sink.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"failed to {'start' if broken == 'init' else broken}" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()
    assert sink.url is None


def test_a_missing_library_is_a_failure_like_any_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    WandbSink(WandbMode.offline, "project", "run", {}, tmp_path).log(1, {"a/b": 1})
    assert caplog.text.count("W&B is off") == 1


def test_online_without_a_login_never_asks_for_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake = fake_wandb(monkeypatch)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    WandbSink(WandbMode.online, "project", "run", {}, tmp_path)
    assert fake.options["mode"] == "offline"
    assert "no login found" in caplog.text


def test_disabled_imports_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    sink = WandbSink(WandbMode.disabled, "project", "run", {}, tmp_path)
    sink.log(1, {"a/b": 1})
    sink.close()
    assert os.listdir(tmp_path) == []


def test_bad_metrics_are_the_callers_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_wandb(monkeypatch)
    sink = WandbSink(WandbMode.offline, "project", "run", {}, tmp_path)
    with pytest.raises(ValueError, match="role/quantity"):
        sink.log(1, {"loss": 1})


def test_the_real_library_offline_is_quiet_and_stays_in_the_run_folder(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = (
        "import pathlib, sys\n"
        "from opd_ray.config.choices import WandbMode\n"
        "from opd_ray.telemetry import WandbSink\n"
        "from opd_ray.types import Histogram\n"
        "sink = WandbSink(WandbMode.offline, 'p', 'r', {'a': {'b': 1}}, pathlib.Path(sys.argv[1]))\n"
        "sink.log(1, {'learner/loss/mean': 0.5}); sink.log(1, {'a/b': float('nan')})\n"
        "sink.log(2, {'a/c': Histogram((0.0, 1e-300, 1.0), (3.0, 4.0))}); sink.close()\n"
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    home = tmp_path / "home"
    folder = tmp_path / "run"
    home.mkdir()
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        env=environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 1

"""Sinks for metrics: the `Sink` protocol, several sinks as one, and W&B."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from opd_ray.config.choices import WandbMode
from opd_ray.telemetry.metrics import Metric, checked_metrics
from opd_ray.types import Histogram

_log = logging.getLogger(__name__)

_INIT_TIMEOUT_S = 60.0
_FINISH_TIMEOUT_S = 60.0

ResolvedMode = Literal["online", "offline", "disabled"]


class Sink(Protocol):
    """Takes metrics in: `MetricsWriter`, `WandbSink`, or any other place."""

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Record flat metrics (`role/quantity/stat` to number or histogram) of one optimizer step."""

    def close(self) -> None:
        """Finish; nothing is logged afterwards."""


class Sinks:
    """Several sinks as one, in the given order."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Hand the metrics to every sink; a sink that raises keeps them from the ones after it."""
        for sink in self._sinks:
            sink.log(step, metrics)

    def close(self) -> None:
        """Close every sink, also when one fails; the first failure is raised at the end."""
        failure: Exception | None = None
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001  (re-raised below, once all are closed)
                failure = failure or error
        if failure is not None:
            raise failure


class WandbSink:
    """Logs to Weights & Biases; its files lie in ``<folder>/wandb``.

    W&B can never end a run: at its first failure the sink logs one warning and turns itself off. `mode`
    "auto" is online where a login is found and offline otherwise; "online" without a login records offline
    too, as W&B would stop and ask for a key. Offline runs are uploaded later with ``wandb sync``.
    """

    def __init__(self, mode: WandbMode, project: str, run_name: str, config: Mapping[str, Any], folder: Path) -> None:
        self.mode = resolve_wandb_mode(mode, os.environ)
        self._run: Any = None
        if self.mode == "disabled":
            return
        if mode is WandbMode.online and self.mode == "offline":
            _log.warning("W&B: no login found, recording offline; run `wandb login` or set WANDB_API_KEY")
        self._guard("start", lambda: self._start(project, run_name, config, folder))

    @property
    def url(self) -> str | None:
        """Where the run can be seen; None offline, disabled or after a failure."""
        url = getattr(self._run, "url", None)
        return str(url) if url else None

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Log the metrics; their x axis is "step", so that late ones still find their place."""
        if self._run is not None:
            values = checked_metrics(metrics)
            self._guard("log", lambda: self._run.log({**_as_wandb(values), "step": int(step)}))

    def close(self) -> None:
        """Finish the W&B run, waiting for uploads for a minute at most."""
        if self._run is not None:
            self._guard("finish", lambda: self._run.finish())
            self._run = None

    def _start(self, project: str, run_name: str, config: Mapping[str, Any], folder: Path) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
        )
        self._run = wandb.init(
            project=project,
            name=run_name,
            # A resumed run continues with its own curves.
            id=run_name,
            resume="allow",
            config=dict(config),
            dir=str(folder),
            mode=self.mode,
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def _guard(self, action: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  (whatever W&B raises, the run continues)
            self._run = None
            _log.warning("W&B is off for the rest of the run, it failed to %s: %s", action, _one_line(error))


def _as_wandb(metrics: Mapping[str, float | Histogram]) -> dict[str, Any]:
    """Histograms as W&B's own, which it draws over the steps."""
    import numpy as np
    import wandb

    return {
        key: wandb.Histogram(np_histogram=(np.array(value.counts), np.array(value.edges)))
        if isinstance(value, Histogram)
        else value
        for key, value in metrics.items()
    }


def resolve_wandb_mode(mode: WandbMode, environ: Mapping[str, str]) -> ResolvedMode:
    """Turn a configured mode into W&B's; ``WANDB_MODE`` decides for "auto" where it is set."""
    if mode is WandbMode.disabled:
        return "disabled"
    if mode is WandbMode.offline:
        return "offline"
    wanted = environ.get("WANDB_MODE") if mode is WandbMode.auto else None
    if wanted in ("offline", "dryrun"):
        return "offline"
    if wanted == "disabled":
        return "disabled"
    return "online" if has_wandb_login(environ) else "offline"


def has_wandb_login(environ: Mapping[str, str]) -> bool:
    """Tell whether W&B finds a key: in the environment, or in a netrc file for its server."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    home = Path(environ["HOME"]) if environ.get("HOME") else Path("~").expanduser()
    paths = [Path(environ["NETRC"]).expanduser()] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    return any(_netrc_knows(path, host) for path in paths)


def _netrc_knows(path: Path, host: str) -> bool:
    try:
        entry = netrc.netrc(str(path)).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeError):
        return False
    return entry is not None and bool(entry[2])


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

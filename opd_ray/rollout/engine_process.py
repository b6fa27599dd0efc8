"""Imported by vLLM in every process of an engine, also in those that a split engine starts by itself."""

from __future__ import annotations

from opd_ray.rollout import weight_transfer


class EngineProcess:
    """Base that vLLM gives its worker class (`worker_extension_cls`); nothing is added to it."""


# The processes of a split engine share nothing with the one that built it: the backend must be known in each.
weight_transfer.register()

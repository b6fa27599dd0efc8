"""Calls of Ray actors: how one is started under a name, and what becomes of its answers, errors and death."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from ray.exceptions import (
    ActorAlreadyExistsError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)

from opd_ray.errors import ActorDiedError, ActorError, DeadlineError, OpdError, PayloadLostError

# How long an actor whose connection broke is waited for before Ray is asked again.
_PING_S = 2.0

logger = logging.getLogger(__name__)


def start_named(actor_class: Any, name: str, options: dict[str, Any], args: Sequence[Any], **kwargs: Any) -> Any:
    """Start an actor under `name`, with something added while an actor that died still has it; returns its handle."""
    try:
        return actor_class.options(name=name, **options).remote(*args, **kwargs)
    except ActorAlreadyExistsError:
        return actor_class.options(name=f"{name}-{uuid.uuid4().hex[:4]}", **options).remote(*args, **kwargs)


async def remote_result(ref: Any, actor: str, deadline_s: float | None) -> Any:
    """Await an object reference; `deadline_s` None: as long as it takes.

    Raises the actor's own `OpdError`, `PayloadLostError` when what it was handed was lost with its node,
    `ActorDiedError` when its process ended or its answer is gone with its node, `DeadlineError` when it gave no answer,
    and `ActorError` when it failed in any other way.
    """
    try:
        # Not wait_for: before Python 3.12 it can swallow a cancellation that meets the result.
        async with asyncio.timeout(deadline_s):
            return await ref
    except (TimeoutError, GetTimeoutError) as error:
        raise DeadlineError(
            f"actor {actor} gave no answer in {deadline_s:g} s: look at its log in the Ray "
            "dashboard, or raise deadline_s"
        ) from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, OpdError):
            raise cause from None
        if isinstance(cause, ObjectLostError):
            raise PayloadLostError(
                f"what actor {actor} was handed was lost with its node: have it made again"
            ) from error
        raise actor_failed(actor, type(cause).__name__, str(cause if cause is not None else error), error) from error
    except ObjectLostError as error:
        raise ActorDiedError(f"actor {actor} died, and its answer with its node: start again") from error
    except RayActorError as error:
        raise ActorDiedError(
            f"actor {actor} died ({_death_cause(error)}): look for lack of memory or a crash in the Ray dashboard's "
            "log, and start again"
        ) from error


def actor_failed(actor: str, kind: str, text: str, traceback: object) -> ActorError:
    """The error for an actor that raised a `kind` with that text; its traceback goes into the log."""
    logger.error("actor %s failed:\n%s", actor, traceback)
    lines = text.strip().splitlines()
    return ActorError(
        f"actor {actor} failed with {kind}: {lines[-1] if lines else ''} "
        "(the traceback is in run.log of the run folder): mend the cause and start again"
    )


def _death_cause(error: RayActorError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason given"


async def death_is_known(worker: Any, deadline_s: float) -> None:
    """Wait, `deadline_s` at the most, until Ray knows what became of an actor whose connection broke.

    Of a lost node it learns after some seconds; an actor that is started before may be put on that node again.
    """
    begun = time.monotonic()
    while time.monotonic() - begun < deadline_s:
        try:
            async with asyncio.timeout(_PING_S):
                await worker.ping.remote()
            return
        except ActorUnavailableError:
            await asyncio.sleep(_PING_S / 2)
        except (TimeoutError, RayError, OpdError):
            return

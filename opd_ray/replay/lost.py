"""Payloads that are gone with the node that held them: which stored trajectories that concerns.

Nobody tells the store. The learner's ranks find out when they fetch a batch (`ReplayStore.lose`), or a snapshot or the
spilling of payloads does. What is lost is evicted, so that admission makes up for it; a running cohort goes on smaller.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection
from typing import Any

from opd_ray.errors import PayloadLostError
from opd_ray.replay.parts import StoreParts
from opd_ray.replay.spill import Spilled, settled

PAYLOAD_LOST = "payload_lost"


def in_same_payloads(parts: StoreParts, slots: Collection[int]) -> list[int]:
    """`slots` and all that lies in the same payloads; those that are not stored are passed over."""
    stored = ChainMap(parts.queue.ready, parts.drafted.members)
    lost = {stored[slot].payload_id for slot in slots if slot in stored}
    return sorted(slot for slot, member in stored.items() if member.payload_id in lost)


async def unavailable(parts: StoreParts, fetch: Callable[[Any], Any]) -> list[int]:
    """Stored slots whose payload cannot be fetched, which raises `PayloadLostError`."""
    lost = []
    for payload_id in parts.shelf.newest_in_memory():
        if not parts.shelf.holds(payload_id) or isinstance(ref := parts.shelf.ref(payload_id), Spilled):
            continue
        try:
            await settled(fetch(ref))
        except PayloadLostError:
            lost.append(payload_id)
    stored = ChainMap(parts.queue.ready, parts.drafted.members)
    return sorted(slot for slot, member in stored.items() if member.payload_id in lost)

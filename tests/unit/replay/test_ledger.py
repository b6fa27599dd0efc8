"""The ledger's books and what happens when they do not balance."""

from __future__ import annotations

import json

import pytest

from opd_ray.errors import LedgerError
from opd_ray.replay.ledger import Ledger


def used_ledger() -> Ledger:
    ledger = Ledger()
    ledger.start(10)
    ledger.store(6)
    ledger.fail(1, "timeout")
    ledger.evict(2, "stale")
    ledger.evict(1, "too_long")
    ledger.train(2)
    return ledger


def test_every_trajectory_is_in_one_place() -> None:
    ledger = used_ledger()
    ledger.check(in_flight=3, in_store=1)
    books = json.loads(json.dumps(ledger.as_dict()))
    assert books == {
        "started": 10,
        "trained": 2,
        "evicted": 3,
        "failed": 1,
        "in_store": 1,
        "in_flight": 3,
        "evicted/stale": 2,
        "evicted/too_long": 1,
        "failed/timeout": 1,
    }


@pytest.mark.parametrize(("in_flight", "in_store"), [(2, 1), (3, 0), (2, 2), (4, 0)])
def test_a_lost_or_doubled_trajectory_is_found(in_flight: int, in_store: int) -> None:
    with pytest.raises(LedgerError, match="10 trajectories were started"):
        used_ledger().check(in_flight=in_flight, in_store=in_store)


def test_counts_below_zero_are_found() -> None:
    ledger = Ledger()
    ledger.store(1)
    with pytest.raises(LedgerError):
        ledger.check(in_flight=-1, in_store=1)

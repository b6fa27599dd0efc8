"""Messages to a store: many calls in one, answers that come later, and none that is missed."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.errors import LedgerError, StoreClosedError, StoreError
from opd_ray.replay.desk import Call, Reply, StoreDesk
from opd_ray.replay.spill import SpillSpace
from opd_ray.replay.staleness import StoreConfig
from opd_ray.replay.store import NOT_YET, ReplayStore
from tests.unit.replay.store_driver import receipt


class Driver:
    """Talks to a desk in messages of (method, arguments); `answers` has what came back, by number."""

    def __init__(self, config: StoreConfig, **options: Any) -> None:
        self.store = ReplayStore(config, **options)
        self.desk = StoreDesk(self.store)
        self.answers: dict[int, Any] = {}
        self._numbers = itertools.count()

    def do(self, *calls: tuple[Any, ...]) -> Reply:
        made = [Call(next(self._numbers), str(method), args) for method, *args in calls]  # type: ignore[arg-type]
        return self.take(asyncio.run(self.desk.do(made)))

    def take(self, reply: Reply) -> Reply:
        for answer in reply.answers:
            assert answer.number not in self.answers
            self.answers[answer.number] = answer.error or answer.value
        return reply


def test_a_message_is_several_calls_and_a_failed_one_fails_alone() -> None:
    driver = Driver(StoreConfig(2, max_staleness=1))
    driver.do(("acquire_slots", 2), ("state",))
    assert driver.answers[0] == (0, 1) and driver.answers[1]["ledger/started"] == 0
    driver.do(("assign", [0, 1], ["a", "b"]), ("append", receipt([7]), ["payload"]), ("pending",))
    assert isinstance(driver.answers[3], LedgerError)
    assert (driver.answers[2], driver.answers[4]) == (None, {0: "a", 1: "b"})


def test_what_waits_is_answered_with_the_message_that_makes_it_possible() -> None:
    driver = Driver(StoreConfig(2))
    driver.do(("acquire_slots", 2), ("sample", 2, 0), ("acquire_slots", 1), ("acquire_slots", 1))
    assert driver.answers == {0: (0, 1)}
    driver.do(("append", receipt([0, 1]), ["payload"]))
    assert driver.answers[4] is None and driver.answers[1].slots == (0, 1)
    # Released and sampled in one message: room for both that wait, in their order.
    driver.do(("release", (0, 1), 1), ("sample", 2, 1))
    assert (driver.answers[2], driver.answers[3]) == ((2,), (3,)) and 6 not in driver.answers
    driver.do(("append", receipt([2, 3], 1), ["payload"]))
    assert driver.answers[6].slots == (2, 3)


def test_one_sample_at_a_time_and_the_end_of_the_data_ends_what_waits() -> None:
    driver = Driver(StoreConfig(2))
    driver.do(("acquire_slots", 2), ("sample", 2, 0), ("sample", 2, 0), ("acquire_slots", 2))
    assert isinstance(driver.answers[2], StoreError) and not {1, 3} & driver.answers.keys()
    driver.do(("fail", [0, 1], "worker_died"), ("end_of_data",))
    assert driver.answers[1] is None and isinstance(driver.answers[3], StoreClosedError)


def test_any_other_error_is_raised() -> None:
    driver = Driver(StoreConfig(2))
    with pytest.raises(AttributeError):
        driver.do(("no_such_method",))


@pytest.mark.parametrize("is_drafted", [False, True])
def test_relief_is_asked_for_and_waited_for_by_acquisitions_alone(is_drafted: bool) -> None:
    """Also where nothing can be moved, as the learner has it all."""
    driver = Driver(StoreConfig(1, max_staleness=3), spill=SpillSpace(0, bytes, bytes))
    driver.do(("acquire_slots", 1))
    driver.do(("append", receipt([0]), [b"payload"]))
    reply = driver.do(*[("sample", 1, 0)] * is_drafted, ("acquire_slots", 1), ("state",))
    assert reply.wants_relief and (0, 1) not in driver.answers.values()
    reply = driver.take(asyncio.run(driver.desk.relieve()))
    assert not reply.wants_relief and (1,) in driver.answers.values()


@given(st.integers(0, 3), st.integers(1, 2), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_nothing_that_could_go_on_is_left_waiting(max_staleness: int, reuse: int, seed: int) -> None:
    """A learner and rollouts whose calls fall into messages at random; each cohort is trained, whatever they are."""
    rng = random.Random(seed)
    driver = Driver(StoreConfig(4, reuse, max_staleness))
    outbox: list[tuple[Any, ...]] = [("sample", 4, 0), ("acquire_slots", 2)]
    seen: set[int] = set()
    version = sampled = 0
    in_flight: list[tuple[int, ...]] = []
    while version < 8:
        count = rng.randint(1, max(1, len(outbox)))
        message, outbox = outbox[:count], outbox[count:]
        driver.do(*message)
        waiting = {call.method for call in driver.desk._waiting.values()}
        assert "acquire_slots" not in waiting or driver.store.acquire_now(2) == ()
        assert "sample" not in waiting or driver.store.sample_now(4, version) is NOT_YET
        for number in sorted(driver.answers.keys() - seen):
            seen.add(number)
            answer = driver.answers[number]
            assert not isinstance(answer, Exception), answer
            if isinstance(answer, tuple):
                in_flight.append(answer)
                outbox.append(("acquire_slots", 2))
            elif hasattr(answer, "slots"):
                sampled += 1
                version += 1
                outbox += [("release", answer.slots, version), ("sample", 4, version)]
        rng.shuffle(in_flight)
        if in_flight and (not outbox or rng.random() < 0.7):
            outbox.append(("append", receipt(in_flight.pop(), driver.store.state()["version"]), [json.dumps(seed)]))
    assert sampled == 8 and driver.store.ledger()["trained"] >= 4 * (7 // reuse)

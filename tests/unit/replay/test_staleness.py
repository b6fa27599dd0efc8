"""The off-by-one table of staleness, and the protocol simulated from its description alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.errors import ConfigError, StaleBatchError
from opd_ray.replay.staleness import (
    StoreConfig,
    first_use_version,
    may_acquire,
    num_acquirable,
    staleness,
    staleness_bound,
)


@pytest.mark.parametrize(
    ("token_version", "learner_version", "expected"),
    [(0, 0, 0), (0, 1, 1), (3, 3, 0), (3, 4, 1), (3, 9, 6)],
)
def test_staleness_counts_the_optimizer_steps_between_token_and_use(
    token_version: int, learner_version: int, expected: int
) -> None:
    assert staleness(token_version, learner_version) == expected


def test_a_token_newer_than_the_learner_is_refused() -> None:
    with pytest.raises(StaleBatchError, match="version 5 reached a learner at version 4"):
        staleness(5, 4)


def test_each_further_visit_may_be_one_step_older() -> None:
    assert [staleness_bound(2, use) for use in (1, 2, 3)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("queued", "next_version", "reuse", "expected"),
    [
        (0, 0, 1, 0),
        (3, 0, 1, 0),
        (4, 0, 1, 1),
        (7, 0, 1, 1),
        (8, 0, 1, 2),
        (3, 0, 2, 0),
        (4, 0, 2, 2),
        (8, 0, 2, 4),
        (0, 5, 2, 5),
        (4, 5, 3, 8),
    ],
)
def test_first_visit_with_cohorts_of_four(queued: int, next_version: int, reuse: int, expected: int) -> None:
    config = StoreConfig(trajectories_per_step=4, reuse=reuse)
    assert first_use_version(queued, next_version, config) == expected


# Trajectories given out since the start of an undisturbed run with batches of 4, by published version 0, 1, 2, ...
@pytest.mark.parametrize(
    ("max_staleness", "reuse", "totals"),
    [
        (0, 1, [4, 8, 12, 16, 20]),  # lock-step
        (1, 1, [8, 12, 16, 20, 24]),
        (2, 1, [12, 16, 20, 24, 28]),
        (0, 2, [4, 4, 8, 8, 12]),  # lock-step: the second use asks for nothing new
        (1, 2, [4, 8, 8, 12, 12]),  # one step early
        (2, 2, [8, 8, 12, 12, 16]),
        (3, 2, [8, 12, 12, 16, 16]),
        (0, 3, [4, 4, 4, 8, 8]),
        (2, 3, [4, 8, 8, 8, 12]),
    ],
)
def test_total_slots_by_published_version(max_staleness: int, reuse: int, totals: list[int]) -> None:
    config = StoreConfig(trajectories_per_step=4, reuse=reuse, max_staleness=max_staleness)
    live = 0
    for version, total in enumerate(totals):
        # The closed form: floor(live / n) * R - version <= max_staleness.
        while (live // 4) * reuse - version <= max_staleness:
            batches = -(-version // reuse)  # formed so far
            assert may_acquire(live - 4 * batches, batches * reuse, version, config)
            live += 1
        batches = -(-version // reuse)
        assert not may_acquire(live - 4 * batches, batches * reuse, version, config)
        assert live == total


def test_reuse_one_is_the_classic_in_flight_bound() -> None:
    for max_staleness in range(5):
        config = StoreConfig(trajectories_per_step=8, max_staleness=max_staleness)
        # Nothing trained yet; then with one batch in training and nothing queued.
        assert num_acquirable(0, 0, 0, config) == (max_staleness + 1) * 8
        assert num_acquirable(0, 1, 0, config) + 8 == (max_staleness + 1) * 8


@given(
    st.integers(0, 60),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 6),
    st.one_of(st.none(), st.integers(0, 25)),
)
def test_num_acquirable_is_may_acquire_repeated(
    queued: int, next_version: int, version: int, size: int, reuse: int, bound: int, final: int | None
) -> None:
    config = StoreConfig(size, reuse, bound, final)
    count = 0
    while may_acquire(queued + count, next_version, version, config):
        count += 1
    assert num_acquirable(queued, next_version, version, config) == count


def test_no_slot_is_given_out_that_the_learner_would_not_reach() -> None:
    # Five steps with two uses each: batches are first used at versions 0, 2 and 4, and there is no fourth.
    config = StoreConfig(trajectories_per_step=4, reuse=2, max_staleness=10, final_version=5)
    assert num_acquirable(0, 0, 0, config) == 12
    assert num_acquirable(0, 4, 4, config) == 4
    assert num_acquirable(0, 6, 5, config) == 0


@pytest.mark.parametrize("arguments", [(0, 1, 0), (4, 0, 0), (4, 1, -1)])
def test_impossible_configs_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        StoreConfig(*arguments)


class Protocol:
    """The protocol as its description says, with an oracle of its own for every trajectory's age."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self.version = 0  # published
        self.learner = 0  # completed
        self.next_version = 0
        self.queue: list[dict[str, int]] = []
        self.batch: list[dict[str, int]] = []
        self.num_uses = 0
        self.worst: list[int] = []

    def acquire(self) -> bool:
        admitted = may_acquire(len(self.queue), self.next_version, self.version, self.config)
        if admitted:
            self.queue.append({"version": self.version, "done": 0})
        return admitted

    def use(self) -> bool:
        if self.num_uses == 0:
            self.next_version = self.learner
            head = self.queue[: self.config.trajectories_per_step]
            if len(head) < self.config.trajectories_per_step or not all(
                trajectory_id["done"] for trajectory_id in head
            ):
                return False
            del self.queue[: len(head)]
            self.batch, self.num_uses = head, self.config.reuse
        number = self.config.reuse - self.num_uses + 1
        for trajectory_id in self.batch:
            assert self.learner - trajectory_id["version"] <= self.config.max_staleness + number - 1
        self.num_uses -= 1
        self.next_version = self.learner + 1 + self.num_uses
        self.learner += 1
        return True

    def drop_batch(self) -> None:
        self.batch = self.batch[1:]
        if self.num_uses and not self.batch:
            self.num_uses, self.next_version = 0, self.learner

    def finish(self) -> None:
        """From here the learner gets its next batch if everything pending completes."""
        self.version = self.learner
        while not self.use():
            for trajectory_id in self.queue:
                trajectory_id["done"] = 1
            if self.use():
                break
            assert self.acquire(), "no trajectory may be acquired and no batch can be formed: deadlock"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bound_and_progress_in_any_order_of_events(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    config = StoreConfig(size, data.draw(st.integers(1, 3)), data.draw(st.integers(0, 4)))
    protocol = Protocol(config)
    events = st.sampled_from(["acquire", "acquire", "done", "done", "use", "publish", "drop", "drop_batch"])
    for event in data.draw(st.lists(events, max_size=80)):
        if event == "acquire":
            protocol.acquire()
        elif event == "done" and protocol.queue:
            protocol.queue[data.draw(st.integers(0, len(protocol.queue) - 1))]["done"] = 1
        elif event == "use" and protocol.learner - protocol.version < 2:  # the learner may run ahead of publishing
            protocol.use()
        elif event == "publish":
            protocol.version = min(protocol.version + 1, protocol.learner)
        elif event == "drop" and protocol.queue:  # a failure or an eviction
            del protocol.queue[data.draw(st.integers(0, len(protocol.queue) - 1))]
        elif event == "drop_batch":
            protocol.drop_batch()
    for _ in range(3 * config.reuse):
        protocol.finish()

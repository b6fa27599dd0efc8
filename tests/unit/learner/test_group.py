"""Which of several ranks' errors a call of the learner group raises."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from opd_ray.errors import ActorDiedError, ActorError, DivergedError, LearnerLostError, OpdError
from opd_ray.learner import group as learner_group
from opd_ray.learner.group import LearnerGroup
from opd_ray.learner.spec import LostTrajectories, RankBatch
from opd_ray.replay.batch import SampledBatch
from opd_ray.types import SampleInfo

GLOO = ActorError("connection closed by peer")
DIED = ActorDiedError("learner-1 died")
DIVERGED = DivergedError("the loss is nan")


class FakeGroup(LearnerGroup):
    """Ranks whose calls end, after some turns of the event loop, with an error or None; None turns are endless."""

    def __init__(self, outcomes: list[tuple[int | None, OpdError | None]]) -> None:
        super().__init__("learner", 1.0)
        self.workers = list(range(len(outcomes)))
        self._outcomes = outcomes
        self.num_cancelled = 0

    async def result(self, ref: int, index: int) -> int:
        turns, error = self._outcomes[index]
        try:
            if turns is None:
                await asyncio.Event().wait()
            for _ in range(turns or 0):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if error is not None:
            raise error
        return 10 * index + ref


def outcome(*outcomes: tuple[int | None, OpdError | None]) -> tuple[FakeGroup, list[int]]:
    group = FakeGroup(list(outcomes))
    return group, asyncio.run(group.all(lambda worker: worker))


def test_results_come_in_the_order_of_the_ranks() -> None:
    assert outcome((5, None), (0, None), (2, None))[1] == [0, 11, 22]


@pytest.mark.parametrize(
    ("outcomes", "raised"),
    [
        ([(0, GLOO), (9, DIED)], DIED),
        ([(9, DIED), (0, DIVERGED)], DIED),
        ([(0, GLOO), (9, LearnerLostError("lost"))], None),
        ([(0, GLOO), (9, DIVERGED)], DIVERGED),
        ([(9, DIVERGED), (0, GLOO)], DIVERGED),
        ([(0, None), (3, GLOO)], GLOO),
    ],
)
def test_a_death_goes_before_what_a_rank_says_and_that_before_what_follows_from_it(
    outcomes: list[tuple[int | None, OpdError | None]], raised: OpdError | None
) -> None:
    with pytest.raises(OpdError) as caught:
        outcome(*outcomes)
    assert caught.value is (raised or outcomes[1][1])


def test_ranks_that_hang_after_a_failure_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_group, "_LAST_WORDS_S", 0.01)
    group = FakeGroup([(None, None), (1, DIED), (None, None)])
    with pytest.raises(ActorDiedError):
        asyncio.run(group.all(lambda worker: worker))
    assert group.num_cancelled == 2


class FakeRank:
    """A rank that cannot fetch some references, and knows what it was told to forget."""

    def __init__(self) -> None:
        self.lost: set[str] = set()
        self.forgot: list[tuple[int, ...]] = []
        self.train_step = self

    def remote(self, part: RankBatch, refs: list[str]) -> Any:
        self.forgot.append(part.last_uses)
        lost = [
            part.infos[place].trajectory_id for place, (payload, _) in part.rows.items() if refs[payload] in self.lost
        ]
        return LostTrajectories(tuple(lost)) if self.lost else f"report of {len(part.rows)}"


class GroupOfFakes(LearnerGroup):
    def __init__(self, num_ranks: int) -> None:
        super().__init__("learner", 1.0)
        self.workers = [FakeRank() for _ in range(num_ranks)]
        self.tokens_per_microbatch, self.reuse = 1000, 2

    async def result(self, ref: Any, index: int) -> Any:
        return ref


def test_what_any_rank_misses_is_said_and_later_forgotten_by_all() -> None:
    infos = tuple(SampleInfo(trajectory_id, 0, 1, 0.0, 3, 5) for trajectory_id in range(6))
    batch = SampledBatch(
        ("a", "b", "c"), tuple((trajectory_id // 2, trajectory_id % 2) for trajectory_id in range(6)), infos
    )
    group = GroupOfFakes(2)
    for rank in group.workers:
        rank.lost = {"b"}
    assert asyncio.run(group.train_step(batch, 0)) == LostTrajectories((2, 3))
    for rank in group.workers:
        rank.lost = set()
    for expected in ((2, 3), ()):
        reports = asyncio.run(group.train_step(batch.without((2, 3)), 0))
        assert isinstance(reports, list) and len(reports) == 2
        assert [sorted(rank.forgot[-1]) for rank in group.workers] == [sorted(expected)] * 2

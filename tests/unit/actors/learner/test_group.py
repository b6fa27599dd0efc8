"""Which of several ranks' errors a call of the learner group raises."""

from __future__ import annotations

import asyncio

import pytest

from opd_ray.actors.learner import group as learner_group
from opd_ray.actors.learner.group import LearnerGroup
from opd_ray.errors import ActorDiedError, ActorError, DivergedError, LearnerLostError, OpdError

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

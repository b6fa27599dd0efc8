import logging

import pytest

from opd_ray.cluster.faults import RestartBudget
from opd_ray.errors import ActorDiedError

DEATH = ActorDiedError("actor rollout-0 died (killed): start again")


def test_restarts_are_counted_and_said_until_the_budget_is_used_up(caplog: pytest.LogCaptureFixture) -> None:
    budget = RestartBudget("rollout", 2)
    with caplog.at_level(logging.WARNING):
        budget.spend(DEATH)
        budget.spend(DEATH)
    assert [record.message.split("; ")[1] for record in caplog.records] == [
        "it is replaced (1 of at most 2)",
        "it is replaced (2 of at most 2)",
    ]
    with pytest.raises(
        ActorDiedError, match="2 of group rollout were replaced .*max_restarts=2: mend the cause"
    ) as end:
        budget.spend(DEATH)
    assert end.value.__cause__ is DEATH and budget.used == 2


def test_without_a_budget_the_first_death_is_final() -> None:
    with pytest.raises(ActorDiedError, match="faults.max_restarts=0"):
        RestartBudget("learner", 0).spend(DEATH)

"""Which policy version the next cohort will meet: the `version` and `next_version` of `staleness`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Schedule:
    """The published version, the running cohort's visits left, and the learner version of the next cohort's first."""

    version: int
    next_version: int
    last_visit_version: int
    visits_left: int = 0

    @classmethod
    def at(cls, version: int, visits_left: int = 0) -> Schedule:
        """Nothing is out at `version`; the running cohort, last visited one step ago, still has `visits_left`."""
        return cls(version, version + visits_left, version - 1, visits_left)

    def publish(self, version: int) -> None:
        """All engines have `version`."""
        self.version = version
        self.next_version = max(self.next_version, version + self.visits_left)

    def anchor(self, learner_version: int) -> None:
        """The learner asks for a new cohort at `learner_version`."""
        self.next_version = learner_version

    def visit(self, learner_version: int) -> None:
        """The running cohort is visited at `learner_version`."""
        self.visits_left -= 1
        self.last_visit_version = learner_version
        self.next_version = learner_version + 1 + self.visits_left

    def give_up_visits(self) -> None:
        """The running cohort has no member left."""
        self.visits_left = 0
        self.next_version = max(self.last_visit_version + 1, self.version)

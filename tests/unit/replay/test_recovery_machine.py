"""Any order of the store's calls, with snapshots and stores that die: nothing lost uncounted, nothing trained twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.unit.replay.store_driver import WaitsError
from tests.unit.replay.store_machine import Shot, StoreMachine


class RecoveryMachine(StoreMachine):
    """A controller with a journal; the learner and the producers go on when the store dies."""

    def __init__(self) -> None:
        super().__init__()
        self.mark: int | None = None
        self.uncommitted: Shot | None = None

    @rule()
    def announce_snapshot(self) -> None:
        self.mark, self.uncommitted = self.journal.mark(), None

    @precondition(lambda self: self.mark is not None)
    @rule()
    def snapshot(self) -> None:
        self.uncommitted = self.shoot()

    @precondition(lambda self: self.uncommitted is not None)
    @rule()
    def commit(self) -> None:
        assert self.mark is not None and self.uncommitted is not None
        self.journal.snapshot_taken(self.mark, self.uncommitted.num_given)
        self.shot, self.mark, self.uncommitted = self.uncommitted, None, None

    @rule()
    def take_snapshot(self) -> None:
        self.announce_snapshot()
        self.snapshot()
        self.commit()

    def crash_and_restore(self) -> None:
        super().crash_and_restore()
        self.mark = self.uncommitted = None

    @rule()
    def crash_and_recover(self) -> None:
        self.recover(is_answered=True, published=self.published)

    def recover(self, is_answered: bool, published: int) -> None:
        """A new store; `is_answered`: the last release was."""
        self.store = self.new_store()
        since = self.journal.since(published, self.learner - len(self.out))
        self.loop.run_until_complete(self.store.recover(since, self.shot.folder, self.put))
        before = self.stored
        goes_on = is_answered and not self.out and self.learner == self.shot.published
        kept = {
            slot: visits
            for slot, visits in self.shot.stored
            if slot not in self.in_flight
            and self.fate.get(slot) != "failed/test"
            and (goes_on if visits else not self.all_visits[slot])
        }
        self.stored = set(kept)
        self.visits |= kept
        # Perhaps stored again since, after an append that was not answered.
        self.data_of |= {slot: data for slot, data in self.shot.data_of if slot in kept}
        self.came_back = self.came_back or not self.stored <= before
        self.running = tuple(slot for slot, visits in sorted(kept.items()) if visits)
        self.visits_left = self.config.reuse - kept[self.running[0]] if self.running else 0
        num_given = max([self.shot.num_given, *(slot + 1 for slot in self.acquired_at)])
        ended_before = dict(self.shot.fate)
        self.fate = {
            slot: ended_before.get(slot) or self.end_of(slot)
            for slot in range(num_given)
            if slot not in self.in_flight and slot not in self.stored
        }
        self.in_flight.sort()
        assert self.store.pending() == dict(self.journal.in_flight)
        assert list(self.store.pending()) == self.in_flight

    def end_of(self, slot: int) -> str:
        """What is known of a slot that had not ended at the snapshot."""
        if slot in self.completed:
            return "trained"
        return "failed/test" if self.fate.get(slot) == "failed/test" else "evicted/store_lost"

    def last_words(self, is_shot: bool) -> None:
        """A snapshot of the store after a call that was not answered, if it comes so far."""
        mark = self.journal.mark()
        self.mark = self.uncommitted = None
        if is_shot:
            self.shot = self.shoot()
            self.journal.snapshot_taken(mark, self.shot.num_given)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), is_shot=st.booleans())
    def append_unanswered(self, data: st.DataObject, is_shot: bool) -> None:
        slots = self.pick(data, self.in_flight)
        self.append_to_store(slots)
        in_flight, stored = [*self.in_flight], {*self.stored}
        self.in_flight = [slot for slot in in_flight if slot not in slots]
        self.stored.update(slots)
        self.visits |= dict.fromkeys(slots, 0)
        self.last_words(is_shot)
        self.in_flight, self.stored = in_flight, stored
        self.recover(is_answered=True, published=self.published)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def fail_unanswered(self, data: st.DataObject) -> None:
        self.store.fail(self.pick(data, self.in_flight), "test")
        self.recover(is_answered=True, published=self.published)

    @rule(count=st.integers(1, 6), is_shot=st.booleans())
    def acquire_unanswered(self, count: int, is_shot: bool) -> None:
        try:
            slots = self.call(self.store.acquire_slots(count))
        except WaitsError:
            return
        in_flight = [*self.in_flight]
        self.in_flight += slots
        self.last_words(is_shot)
        self.in_flight = in_flight
        self.recover(is_answered=True, published=self.published)

    @precondition(lambda self: self.learner - self.published < 2)
    @rule(is_shot=st.booleans())
    def sample_unanswered(self, is_shot: bool) -> None:
        if not self.visits_left:
            self.sweep()
        try:
            self.call(self.store.sample(self.config.trajectories_per_step, self.learner))
        except WaitsError:
            return
        self.last_words(is_shot)
        self.recover(is_answered=True, published=self.published)

    @precondition(lambda self: self.out)
    @rule(is_shot=st.booleans(), is_version_known=st.booleans())
    def release_unanswered(self, is_shot: bool, is_version_known: bool) -> None:
        slots = self.step()
        self.last_words(is_shot)
        self.recover(is_answered=False, published=self.published - (not is_version_known))
        self.store.release(slots, self.published)
        self.journal.released(slots)


TestRecoveryMachine = RecoveryMachine.TestCase
TestRecoveryMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

"""Any order of the store's calls: books balanced, bound held, payloads let go or spilled, no deadlock."""

from __future__ import annotations

from hypothesis import settings

from tests.unit.replay.store_machine import StoreMachine

TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

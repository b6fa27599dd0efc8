"""What is refused of a call to the store, before it changes anything."""

from __future__ import annotations

from collections.abc import Container, Sequence

from opd_ray.errors import LedgerError, StoreError


def refuse_repeated(slots: Sequence[int], verb: str) -> None:
    """Raise `LedgerError` when a call names a slot twice."""
    if len(set(slots)) != len(slots):
        raise LedgerError(f"{verb} names a slot twice among {len(slots)}: name each slot once")


def require(slots: Sequence[int], where: Container[int], verb: str, state: str) -> None:
    """Raise `LedgerError` unless all `slots` are named once and are `where`, which holds those that are `state`."""
    refuse_repeated(slots, verb)
    missing = sorted(slot for slot in slots if slot not in where)
    if missing:
        raise LedgerError(
            f"{verb} names {len(missing)} slots that are not {state} (first: {missing[:4]}): each slot ends once"
        )


def refuse_misfit(num_trajectories: int, trajectories_per_step: int, learner_version: int, published: int) -> None:
    """Raise `StoreError` when a sample is not one cohort, or its learner is behind what is published."""
    if num_trajectories != trajectories_per_step:
        raise StoreError(
            f"{num_trajectories} trajectories were asked for and a cohort has {trajectories_per_step}: ask for "
            "trajectories_per_step"
        )
    if learner_version < published:
        raise StoreError(
            f"the learner asks at version {learner_version} and version {published} is published: "
            "restore learner and store from the same checkpoint"
        )


def refuse_older(policy_version: int, published: int) -> None:
    """Raise `StoreError` when versions go back."""
    if policy_version < published:
        raise StoreError(f"policy version {policy_version} is below the published {published}: never go back")


def refuse_used(num_started: int) -> None:
    """Raise `StoreError` when a store that gave out slots is to be filled from a snapshot."""
    if num_started:
        raise StoreError(f"a store that gave out {num_started} slots was in use: make a new one to restore")

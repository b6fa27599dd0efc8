"""Checks of a call to the store, before it changes anything."""

from __future__ import annotations

from collections.abc import Container, Sequence

from opd_ray.errors import LedgerError, StoreError


def require_once(trajectory_ids: Sequence[int], verb: str) -> None:
    """Raise `LedgerError` when a call names a trajectory twice."""
    if len(set(trajectory_ids)) != len(trajectory_ids):
        raise LedgerError(f"{verb} names a trajectory twice among {len(trajectory_ids)}: name each once")


def require(trajectory_ids: Sequence[int], where: Container[int], verb: str, state: str) -> None:
    """Raise `LedgerError` unless all are named once and are in `where`, which holds those that are `state`."""
    require_once(trajectory_ids, verb)
    missing = sorted(trajectory_id for trajectory_id in trajectory_ids if trajectory_id not in where)
    if missing:
        raise LedgerError(
            f"{verb} names {len(missing)} trajectories that are not {state} (first: {missing[:4]}): each ends once"
        )


def require_whole_batch(
    num_trajectories: int, trajectories_per_step: int, learner_version: int, published: int
) -> None:
    """Raise `StoreError` when a sample is not one batch, or its learner is behind what is published."""
    if num_trajectories != trajectories_per_step:
        raise StoreError(
            f"{num_trajectories} trajectories were asked for and a batch has {trajectories_per_step}: ask for "
            "trajectories_per_step"
        )
    if learner_version < published:
        raise StoreError(
            f"the learner asks at version {learner_version} and version {published} is published: "
            "restore learner and store from the same checkpoint"
        )


def require_newer(policy_version: int, published: int) -> None:
    """Raise `StoreError` when versions decrease."""
    if policy_version < published:
        raise StoreError(f"policy version {policy_version} is below the published {published}: versions only grow")

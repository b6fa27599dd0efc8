"""Need against what there is: a run is refused for the one number that cannot fit, and warned of what may not.

A job is refused for what takes more than there is whatever the run meets (`Amount.least`): weights, optimizer state,
one sequence's KV cache. What it takes with responses of full length only warns: responses may be shorter, and a run
that works is never refused. The planner, which starts nothing, refuses that too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd_ray.planning.amounts import Amount, WorkerNeed, expected, gib, least
from opd_ray.planning.cluster import Cluster
from opd_ray.planning.layout import Seat
from opd_ray.planning.learner_need import remedy
from opd_ray.planning.needs import Needs
from opd_ray.planning.overheads import DRIVER_AND_STORE, RAY_NODE

# What measured peaks were above the expected ones at most (0.19: rank 0 of smollm2, see benchmarks/results/plan.json).
MARGIN = 0.2
_MEMORY_REMEDY = "use larger nodes, a smaller model, or fewer workers (learner.num_ranks, rollout.num_engines)"


@dataclass(frozen=True, slots=True)
class Check:
    """One need against one limit, in bytes.

    Where `is_hard` is false, more than the limit is no reason to refuse; `outcome` says what comes of it.
    """

    what: str
    place: str
    amounts: tuple[Amount, ...]
    have: float
    remedy: str
    is_hard: bool = True
    outcome: str = "the run may end for lack of memory"
    margin: float = MARGIN
    actions: str = ""

    @property
    def expected(self) -> float:
        """Bytes with responses of full length."""
        return expected(self.amounts)

    @property
    def least(self) -> float:
        """Bytes in any case."""
        return least(self.amounts)

    @property
    def verdict(self) -> str:
        """``fits``, ``tight`` (within the margin), ``may not fit`` (at full length) or ``does not fit``."""
        if self.least > self.have and self.is_hard:
            return "does not fit"
        if self.expected > self.have:
            return "may not fit"
        return "tight" if self.expected * (1 + self.margin) > self.have else "fits"

    def refusal(self) -> str:
        """One line with the number that does not fit, its largest parts, and what to change."""
        parts = sorted((a for a in self.amounts if a.least), key=lambda amount: -amount.least)[:3]
        words = ", ".join(f"{amount.name} {gib(amount.least)}" for amount in parts)
        return f"{self.what} needs at least {gib(self.least)} {self.place} ({words}), there are {gib(self.have)}: " + (
            self.remedy
        )

    def refusal_at_full_length(self) -> str:
        """One line with the number that does not fit where responses are of full length."""
        parts = sorted(self.amounts, key=lambda amount: -amount.expected)[:3]
        words = ", ".join(f"{amount.name} {gib(amount.expected)}" for amount in parts)
        return (
            f"{self.what} needs {gib(self.expected)} {self.place} with responses of full length ({words}), there are "
            f"{gib(self.have)}: {self.actions or self.remedy}"
        )

    def warning(self) -> str:
        """One line about what may not fit."""
        place = f"{self.place} " if self.place else ""
        return (
            f"{self.what} may need {gib(self.expected)} {place}with responses of full length, there are "
            f"{gib(self.have)}: {self.outcome}"
        )


def checks(needs: Needs, seats: Sequence[Seat], cluster: Cluster) -> list[Check]:
    """All checks, GPUs first; a GPU whose memory nobody knows is not checked."""
    found = []
    if cluster.gpu_bytes is not None:
        found += [_gpu_check(needs, need, cluster.gpu_bytes) for need in needs.workers_and_engine if need.gpus]
    if not needs.rollout.gpus:
        found.append(_kv_check(needs))
    # Of several nodes nobody knows for sure which worker Ray puts where.
    is_sure = len(seats) == 1
    hosts = [_host_check(needs, seat, is_head=index == 0, is_hard=is_sure) for index, seat in enumerate(seats)]
    found += hosts
    if not is_sure:
        amounts = tuple(amount for check in hosts for amount in check.amounts)
        have = sum(check.have for check in hosts)
        found.append(Check("all nodes together", "of memory", amounts, have, _MEMORY_REMEDY))
    return found + [_object_store_check(needs, seat) for seat in seats]


def _gpu_check(needs: Needs, need: WorkerNeed, gpu_bytes: float) -> Check:
    # Ray's parts of a GPU say nothing of memory: the worker may still use all that others leave.
    have = gpu_bytes * need.device_share
    fix = remedy(needs.learner_input, have) if need.role == "learner" else need.actions
    return Check(need.role, "a GPU", need.device, have, fix, actions=need.actions)


def _kv_check(needs: Needs) -> Check:
    given = needs.rollout_input
    fix = "raise rollout.kv_cache_gib, or lower rollout.max_response_tokens"
    one = (given.one_sequence,)
    return Check("rollout, one sequence,", "of KV cache", one, given.kv_cache_bytes, fix, margin=0.0)


def _host_check(needs: Needs, seat: Seat, *, is_head: bool, is_hard: bool) -> Check:
    amounts = [Amount.possible("Ray", RAY_NODE, "its processes and the libraries")]
    if is_head:
        amounts.append(Amount.possible("driver, store", DRIVER_AND_STORE, "their processes"))
    for need in needs.workers:
        count = seat.workers.get(need.role, 0)
        if count:
            how = f"{count} x {gib(expected(need.host))}"
            total = count * expected(need.host)
            amounts.append(Amount(f"{need.role} x {count}", total, count * least(need.host), need.host[0].origin, how))
    amounts += _in_object_store(needs, seat)
    if is_head and needs.teacher_engine is not None and not needs.rollout.gpus:
        engine = needs.teacher_engine
        amounts.append(Amount.possible(engine.role, expected(engine.host), "while the teacher is evaluated"))
    return Check(f"node {seat.node.name}", "of memory", tuple(amounts), seat.node.memory, _MEMORY_REMEDY, is_hard)


def _object_store_check(needs: Needs, seat: Seat) -> Check:
    amounts = tuple(_in_object_store(needs, seat))
    fix = "set replay.spill_bytes, or start Ray with a larger object store"
    name = f"object store of {seat.node.name}"
    return Check(name, "", amounts, seat.node.object_store, fix, False, "Ray then writes objects to disk")


def _in_object_store(needs: Needs, seat: Seat) -> list[Amount]:
    """Payloads lie where a teacher made them (and are copied to the learners' nodes), weights where they are used."""
    teachers = seat.workers.get("teacher", 0) / needs.teacher.count
    share = max(teachers, 0.5 if seat.workers.get("learner") else 0.0)
    payloads = needs.store.payloads
    found = [Amount.possible("trajectories", payloads.expected * share, payloads.how)] if share else []
    if seat.workers.get("rollout") or seat.workers.get("learner"):
        found.append(needs.store.weights)
    return found


def warnings(found: Sequence[Check], cluster: Cluster) -> list[str]:
    """One line for each check that may not fit, and for memory that other processes use now."""
    said = [check.warning() for check in found if check.verdict in ("tight", "may not fit")]
    for check in found:
        for node in cluster.nodes:
            if node.free is None or check.what != f"node {node.name}" or check.verdict != "fits":
                continue
            if check.least > node.free:
                said.append(
                    f"{check.what} needs at least {gib(check.least)} of memory, {gib(node.free)} are free now: "
                    "other processes use the rest"
                )
    return said


def refusal(found: Sequence[Check], *, at_full_length: bool) -> str | None:
    """The line for the check that is furthest beyond its limit; None where all fit."""
    failing = [check for check in found if check.verdict == "does not fit"]
    if failing:
        return max(failing, key=lambda check: check.least / max(check.have, 1.0)).refusal()
    failing = [check for check in found if check.verdict == "may not fit" and check.is_hard]
    if failing and at_full_length:
        return max(failing, key=lambda check: check.expected / max(check.have, 1.0)).refusal_at_full_length()
    return None

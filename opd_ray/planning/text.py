"""A plan as text: what each group needs, the checks, who lies where, and what moves in a step."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.table import Table

from opd_ray.planning.amounts import Amount, WorkerNeed, expected, gib
from opd_ray.planning.cluster import Cluster
from opd_ray.planning.verdict import MARGIN
from opd_ray.planning.whole_plan import Plan

_WIDTH = 120
_COLORS = {"fits": "green", "tight": "yellow", "may not fit": "red", "does not fit": "red"}


def write_plan(plan: Plan, stream: TextIO) -> None:
    """Write the whole plan to `stream`; in colour on a terminal."""
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=_WIDTH)
    needs = plan.needs
    for role, shape in (("student", needs.student), ("teacher", needs.teacher_shape)):
        console.print(f"{role}: {shape.source}, {shape.num_parameters:,} parameters", soft_wrap=True)
    console.print(_cluster(plan.cluster))
    for need in needs.workers_and_engine:
        console.print(_need(need))
    console.print(_checks(plan))
    console.print(_placement(plan))
    console.print(_traffic(plan))
    for note in needs.rollout.notes:
        console.print(f"rollout: {note}", soft_wrap=True)
    store = needs.store
    console.print(
        f"store: at most {store.num_trajectories} trajectories, {store.bytes_per_trajectory:,.0f} bytes each at full "
        "length",
        soft_wrap=True,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold", expand=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 or name in ("how", "origin", "verdict", "") else "right")
    return table


def _cluster(cluster: Cluster) -> Table:
    table = _table(f"\nhardware: {cluster.source}", "node", "CPUs", "memory", "object store", "GPUs", "a GPU", "origin")
    for node in cluster.nodes:
        gpu = gib(node.gpu_bytes) if node.gpu_bytes is not None else "unknown" if node.gpus else "-"
        origin = node.gpu_origin.value if node.gpus else cluster.origin.value
        table.add_row(
            node.name, f"{node.cpus:g}", gib(node.memory), gib(node.object_store), f"{node.gpus:g}", gpu, origin
        )
    return table


def _need(need: WorkerNeed) -> Table:
    asked = f"{need.cpus:.3g} CPU" + (f", {need.gpus:g} GPU" if need.gpus else "")
    table = _table(
        f"\n{need.role}: {need.count} x ({asked} each by Ray's count)", "what", "bytes", "at least", "origin", "how"
    )
    for place, amounts in (("a GPU", need.device + need.filling), ("memory", need.host)):
        for amount in amounts:
            if amount.expected:
                _add(table, amount, place)
        if amounts:
            table.add_row(f"[bold]{place}, in all[/bold]", gib(expected(amounts)))
    return table


def _add(table: Table, amount: Amount, place: str) -> None:
    at_least = gib(amount.least) if amount.least else "-"
    table.add_row(f"{place}: {amount.name}", gib(amount.expected), at_least, amount.origin.value, amount.how)


def _checks(plan: Plan) -> Table:
    title = f"\nagainst what there is (fits: with {MARGIN:.0%} to spare)"
    table = _table(title, "what", "full length", "at least", "there are", "verdict")
    for check in plan.checks:
        color = _COLORS[check.verdict]
        verdict = f"[{color}]{check.verdict}[/{color}]"
        name = f"{check.what.rstrip(',')} {check.place}".strip()
        table.add_row(name, gib(check.expected), gib(check.least), gib(check.have), verdict)
    return table


def _placement(plan: Plan) -> Table:
    table = _table("\nplacement (by placement.*; of several nodes Ray may choose others)", "node", "workers")
    table.columns[1].justify = "left"
    for seat in plan.seats:
        workers = ", ".join(f"{role} x {count}" for role, count in seat.workers.items())
        table.add_row(seat.node.name, workers or "none")
    return table


def _traffic(plan: Plan) -> Table:
    table = _table("\nbytes of one optimizer step", "from -> to", "full length", "half of it", "how")
    for stage in plan.stages:
        table.add_row(stage.name, gib(stage.full), gib(stage.half), stage.how)
    return table

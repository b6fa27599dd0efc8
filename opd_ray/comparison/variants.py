"""Runs by variant: the config keys that differ, split into variants and conditions, and each variant's base.

All of it is read off the configs, never off names:

- run-local keys (`RUN_LOCAL`) tell runs of one variant apart and are not compared; without a gate, neither are the keys
  of the gate;
- variant keys (`VARIANT`): the experiment's name, objective, gate, support; a difference makes another variant;
- any other key that differs makes another condition. Variants are compared within a condition only.

The ungated base of a variant has the same condition and the same variant keys, but ``gate.kind=off``; the gate that a
control imitates has the same keys, but ``gate.control=none``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from opd_ray.comparison.run_record import RunRecord

RUN_LOCAL = ("seed", "runs_dir", "resume", "deadline_s", "checkpoint.", "telemetry.", "faults.")
VARIANT = ("experiment", "objective.", "gate.", "teacher.support")
GATE, KIND, CONTROL = "gate.", "gate.kind", "gate.control"
OFF = "off"
ABSENT = "not set"
_MAX_NAMED_KEYS = 4

Settings = tuple[tuple[str, str], ...]
"""Config keys and values, sorted."""
Role = Literal["variant", "condition", "not compared"]
"""What a config key's difference makes."""


@dataclass(slots=True)
class Group:
    """Runs that differ in nothing but their seed; `settings` are their variant keys without the experiment's name."""

    settings: dict[str, str]
    condition: Settings
    runs: dict[int, RunRecord] = field(default_factory=dict)
    name: str = ""

    @property
    def gate(self) -> str:
        """Kind of gate, `off` without."""
        return self.settings.get(KIND, OFF)

    @property
    def control(self) -> str:
        """`shuffle` or `noise` for a control, else `none`."""
        return self.settings.get(CONTROL, "none")

    @property
    def experiments(self) -> list[str]:
        """Names that the experiment goes by, mostly one."""
        return sorted({run.experiment for run in self.runs.values()})


def is_one_of(key: str, names: Sequence[str]) -> bool:
    """Whether `key` is one of `names`, or inside one that ends with a point."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def differing(configs: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """Keys that do not have one value in all configs, each with its values, sorted; an absent key has `ABSENT`."""
    found = list(configs)
    keys = sorted({key for config in found for key in config})
    values = {key: sorted({config.get(key, ABSENT) for config in found}, key=_numbers_first) for key in keys}
    return {key: distinct for key, distinct in values.items() if len(distinct) > 1}


def _numbers_first(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def group_runs(runs: Sequence[RunRecord]) -> tuple[list[Group], list[RunRecord]]:
    """Group finished runs by config; of one variant's runs with the same seed the newest counts.

    Returns:
        The groups, named, by condition and then ungated first; and the older runs that another one replaced.
    """
    condition_keys = [key for key in differing(run.config for run in runs) if not is_one_of(key, VARIANT + RUN_LOCAL)]
    groups: dict[Settings, Group] = {}
    replaced = []
    for run in sorted(runs, key=lambda run: run.age_key):
        condition = tuple((key, run.config.get(key, ABSENT)) for key in condition_keys)
        settings = _variant_settings(run)
        group = groups.setdefault((*sorted(settings.items()), *condition), Group(settings, condition))
        if run.seed in group.runs:
            replaced.append(group.runs[run.seed])
        group.runs[run.seed] = run
    ordered = sorted(groups.values(), key=_order)
    _name(ordered)
    return ordered, replaced


def _variant_settings(run: RunRecord) -> dict[str, str]:
    kept = {key: value for key, value in run.config.items() if is_one_of(key, VARIANT) and key != "experiment"}
    return without_gate(kept) if kept.get(KIND, OFF) == OFF else kept


def without_gate(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings of the ungated base: no key of the gate is left, as none has an effect."""
    return {key: value for key, value in settings.items() if not key.startswith(GATE)}


def base_of(group: Group, groups: Iterable[Group]) -> Group | None:
    """The ungated base of a gated group among `groups`; None for an ungated one or where it is not there."""
    if group.gate == OFF:
        return None
    return _same(group.condition, without_gate(group.settings), groups)


def imitated_by(group: Group, groups: Iterable[Group]) -> Group | None:
    """The gate that a control imitates; None where `group` is no control, or the gate is not there."""
    if group.control == "none":
        return None
    return _same(group.condition, {**group.settings, CONTROL: "none"}, groups)


def _same(condition: Settings, settings: Mapping[str, str], groups: Iterable[Group]) -> Group | None:
    return next((g for g in groups if g.condition == condition and g.settings == settings), None)


def _order(group: Group) -> tuple[object, ...]:
    condition = tuple(_numbers_first(value) for _, value in group.condition)
    loss = tuple(sorted(without_gate(group.settings).items()))
    return condition, loss, group.gate != OFF, group.control != "none", group.experiments


def _name(groups: Sequence[Group]) -> None:
    """Name each group by its experiment, and by the keys that tell it from others of that name and condition."""
    for group in groups:
        twins = [g for g in groups if g.condition == group.condition and g.experiments == group.experiments]
        gated = [g.settings for g in twins if g.gate != OFF]
        keys = set(differing(without_gate(twin.settings) for twin in twins)) | set(differing(gated))
        # Without a gate its keys are not there: that it is off says it all.
        marks = [f"{key}={group.settings.get(key, ABSENT)}" for key in sorted(keys) if key in group.settings]
        if 0 < len(gated) < len(twins) and (group.gate == OFF or KIND not in keys):
            marks.insert(0, f"{KIND}={group.gate}")
        group.name = " · ".join([" / ".join(group.experiments), *marks])


def condition_name(condition: Settings, number: int) -> str:
    """``replay.max_staleness=2 · replay.reuse=4``; empty where the runs have one condition only.

    Where more than four keys differ it is ``condition NUMBER``: `number` is its place among the conditions.
    """
    if len(condition) > _MAX_NAMED_KEYS:
        return f"condition {number}"
    return " · ".join(f"{key}={value}" for key, value in condition)


def role_of(key: str) -> Role:
    """What a difference in `key` makes: another variant, another condition, or nothing that is compared."""
    if is_one_of(key, RUN_LOCAL):
        return "not compared"
    return "variant" if is_one_of(key, VARIANT) else "condition"

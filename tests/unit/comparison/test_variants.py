from pathlib import Path
from typing import Any

import pytest

from opd_ray.comparison.run_record import RunRecord
from opd_ray.comparison.variants import Group, base_of, condition_name, differing, group_runs, imitated_by, role_of
from tests.unit.run_folders import config


def run(experiment: str, seed: int = 0, name: str = "", **changes: Any) -> RunRecord:
    flat: dict[str, str] = {}
    for key, value in config(experiment, seed, changes).items():
        flat |= {f"{key}.{k}": str(v) for k, v in value.items()} if isinstance(value, dict) else {key: str(value)}
    return RunRecord(Path(name or f"{experiment}-s{seed}"), flat, "finished")


@pytest.fixture(autouse=True)
def _no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunRecord, "age_key", property(lambda self: self.path.name))


def names(groups: list[Group]) -> list[str]:
    return [group.name for group in groups]


def test_seeds_of_one_config_are_one_variant_wherever_they_ran() -> None:
    groups, replaced = group_runs([run("lsm", 0), run("lsm", 1, runs_dir="elsewhere", telemetry={"progress": False})])
    assert names(groups) == ["lsm"] and sorted(groups[0].runs) == [0, 1] and replaced == []


def test_of_two_runs_with_the_same_seed_the_newer_counts() -> None:
    old, new = run("lsm", 0, name="lsm-1"), run("lsm", 0, name="lsm-2")
    groups, replaced = group_runs([new, old])
    assert groups[0].runs == {0: new} and replaced == [old]


def test_variants_are_named_by_experiment_and_by_what_tells_them_apart() -> None:
    sharper, ungated = run("lsm_block64", gate={"tau": 2.0}), run("lsm_block64", 1, gate={"kind": "off"})
    groups, _ = group_runs([run("lsm"), run("lsm_block64"), sharper, ungated])
    # The last has no gate, so it is lsm by another name.
    assert names(groups) == ["lsm / lsm_block64", "lsm_block64 · gate.tau=1.0", "lsm_block64 · gate.tau=2.0"]


def test_without_a_gate_its_keys_do_not_matter() -> None:
    groups, replaced = group_runs([run("lsm", 0), run("lsm", 1, gate={"tau": 5.0, "control": "shuffle"})])
    assert names(groups) == ["lsm"] and replaced == []
    assert groups[0].control == "none"


def test_a_custom_experiment_with_and_without_gate_says_so() -> None:
    groups, _ = group_runs([run("custom"), run("custom", gate={"kind": "block"})])
    assert names(groups) == ["custom · gate.kind=off", "custom · gate.kind=block"]


def test_other_differences_make_conditions_and_bases_stay_within_them() -> None:
    runs = [
        run(experiment, replay={"reuse": reuse, "max_staleness": 0})
        for experiment in ("lsm_block64", "lsm")
        for reuse in (10, 2)
    ]
    groups, _ = group_runs(runs)
    assert [group.condition for group in groups] == [(("replay.reuse", "2"),)] * 2 + [(("replay.reuse", "10"),)] * 2
    assert names(groups) == ["lsm", "lsm_block64"] * 2
    assert base_of(groups[1], groups) is groups[0] and base_of(groups[3], groups) is groups[2]
    assert base_of(groups[3], groups[:2]) is None


def test_the_base_has_the_same_objective_and_no_gate_whatever_it_is_called() -> None:
    renamed = run("my_baseline", objective={"kind": "opd"})
    groups, _ = group_runs([run("lsm"), renamed, run("opd_block64"), run("lsm_tis"), run("lsm_block64")])
    found = {group.name: base_of(group, groups) for group in groups}
    bases = {name: base.name if base else None for name, base in found.items()}
    assert bases == {
        "lsm": None, "lsm_block64": "lsm", "lsm_tis": "lsm", "my_baseline": None, "opd_block64": "my_baseline"
    }  # fmt: skip


def test_another_support_is_another_variant_with_another_base() -> None:
    groups, _ = group_runs([run("lsm"), run("lsm_block64", teacher={"support": "student_topk"})])
    assert [base_of(group, groups) for group in groups] == [None, None]
    assert groups[0].condition == ()


def test_conditions_are_named_by_their_keys_unless_there_are_many() -> None:
    few = (("learner.lr", "0.1"), ("replay.reuse", "2"))
    assert condition_name((), 1) == "" and condition_name(few, 1) == "learner.lr=0.1 · replay.reuse=2"
    assert condition_name(tuple((f"data.{key}", "1") for key in "abcde"), 3) == "condition 3"


def test_a_control_imitates_the_gate_with_the_same_keys() -> None:
    groups, _ = group_runs([run("lsm"), run("lsm_block64"), run("lsm_block64_shuffle"), run("lsm_tis")])
    found = {group.name: imitated_by(group, groups) for group in groups}
    [control] = [name for name, gate in found.items() if gate]
    assert control == "lsm_block64_shuffle" and found[control] is groups[1]
    assert imitated_by(groups[-1], [groups[0]]) is None


def test_what_differs_is_listed_with_absent_keys_and_numbers_in_order() -> None:
    found = differing([{"a": "10", "b": "x"}, {"a": "9", "b": "x", "c": "y"}])
    assert found == {"a": ["9", "10"], "c": ["not set", "y"]}
    assert differing([]) == {}


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("seed", "not compared"), ("checkpoint.every", "not compared"), ("runs_dir", "not compared"),
        ("experiment", "variant"), ("gate.tau", "variant"), ("objective.kind", "variant"),
        ("teacher.support", "variant"), ("teacher.top_k", "condition"), ("replay.reuse", "condition"),
        ("seedling", "condition"),
    ],
)  # fmt: skip
def test_the_role_of_a_key(key: str, role: str) -> None:
    assert role_of(key) == role

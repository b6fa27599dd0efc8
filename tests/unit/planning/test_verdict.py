"""The whole check: what fits, what may not, and the one line of what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from opd_ray.config.choices import PlacementStrategy
from opd_ray.config.schema import RunConfig
from opd_ray.errors import ConfigError, ResourceError
from opd_ray.main import conf_dir, to_run_config
from opd_ray.planning.amounts import GIB
from opd_ray.planning.cluster import Cluster, Hardware, Node, described
from opd_ray.planning.layout import lay_out
from opd_ray.planning.model_files import read_shape
from opd_ray.planning.whole_plan import Plan, make_plan
from opd_ray.training.sources import model_path

A800 = Hardware(nodes=1, cpus_per_node=64, memory_gib=512, gpus_per_node=8, gpu_gib=79)
LAPTOP = Hardware(nodes=1, cpus_per_node=2, memory_gib=24, gpus_per_node=0, gpu_gib=0)


def config(scale: str, *overrides: str) -> RunConfig:
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return to_run_config(compose("run", ["+experiment=lsm_block64", f"scale={scale}", *overrides]))


def plan(cfg: RunConfig, hardware: Hardware | Cluster) -> Plan:
    cluster = described(hardware) if isinstance(hardware, Hardware) else hardware
    student, teacher = (read_shape(model_path(path)) for path in (cfg.student.path, cfg.teacher.path))
    return make_plan(cfg, student, teacher, cluster)


def verdicts(found: Plan) -> dict[str, str]:
    return {check.what: check.verdict for check in found.checks}


def test_the_papers_line_fits_eight_gpus_of_80_gb() -> None:
    found = plan(config("qwen3_1p7b"), A800)
    assert set(verdicts(found).values()) == {"fits"}
    assert found.warnings == []
    found.require_fit()
    (seat,) = found.seats
    assert seat.workers == {"learner": 2, "rollout": 4, "teacher": 2}


@pytest.mark.parametrize("scale", ["tiny", "smollm2"])
def test_the_small_scales_fit_a_laptop(scale: str) -> None:
    plan(config(scale), LAPTOP).require_fit()
    # The README's least machine.
    plan(config(scale), replace(LAPTOP, memory_gib=12)).require_fit()


def test_a_learner_that_cannot_fit_is_refused_with_what_would() -> None:
    found = plan(config("qwen3_1p7b", "learner.num_ranks=1"), replace(A800, gpu_gib=24))
    with pytest.raises(
        ResourceError,
        match=r"^learner needs at least 26\.6 GiB a GPU \(masters, moments 19\.2 GiB, weights 3\.2 GiB, gradients "
        r"3\.2 GiB\), there are 24\.0 GiB: set learner\.num_ranks=2 \(at least 15\.4 GiB each\)$",
    ):
        found.require_fit()


def test_what_does_not_fit_at_full_length_is_said_and_refused_by_the_planner_only() -> None:
    found = plan(config("qwen3_1p7b", "learner.gradient_checkpointing=false"), replace(A800, gpu_gib=48))
    assert verdicts(found)["learner"] == "may not fit"
    assert any(line.startswith("learner may need") for line in found.warnings)
    found.require_fit()
    with pytest.raises(
        ResourceError,
        match=r"^learner needs .* with responses of full length \(activations .*there are 48\.0 GiB: set "
        r"learner\.gradient_checkpointing=true",
    ):
        found.require_fit(at_full_length=True)


def test_what_fits_without_the_margin_is_tight() -> None:
    found = plan(config("smollm2"), LAPTOP)
    need = next(check for check in found.checks if check.what == "node node-0").expected
    tight = plan(config("smollm2"), replace(LAPTOP, memory_gib=1.1 * need / GIB))
    assert verdicts(tight)["node node-0"] == "tight"
    assert any(line.startswith("node node-0 may need") for line in tight.warnings)
    tight.require_fit(at_full_length=True)


def test_an_engine_must_have_room_for_one_sequence() -> None:
    cfg = config("qwen3_1p7b", "rollout.gpu_memory_utilization=0.1", "evaluation.teacher=false")
    with pytest.raises(ResourceError, match=r"^rollout needs at least 5\.2 GiB a GPU .*one sequence.*there are 2\.4"):
        plan(cfg, replace(A800, gpu_gib=24)).require_fit()
    # The teacher's engine, which evaluates it before training, is larger.
    cfg = config("qwen3_1p7b", "rollout.gpu_memory_utilization=0.3")
    with pytest.raises(ResourceError, match=r"^teacher-engine needs .*evaluation\.teacher=false"):
        plan(cfg, replace(A800, gpu_gib=24)).require_fit()
    with pytest.raises(ResourceError, match=r"^rollout, one sequence, needs .*raise rollout\.kv_cache_gib"):
        plan(config("smollm2", "rollout.max_response_tokens=60000"), replace(LAPTOP, memory_gib=999)).require_fit()


def test_host_memory_is_summed_over_the_workers_of_a_node() -> None:
    with pytest.raises(ResourceError, match=r"^node node-0 needs at least .* of memory \(learner x 2 "):
        plan(config("smollm2"), replace(LAPTOP, memory_gib=4)).require_fit()


def test_on_several_nodes_only_the_sum_is_sure() -> None:
    small = replace(LAPTOP, nodes=2, memory_gib=3)
    found = plan(config("smollm2"), small)
    assert verdicts(found)["node node-0"] == "may not fit"
    assert verdicts(found)["all nodes together"] != "fits"
    with pytest.raises(ResourceError, match="^all nodes together needs"):
        plan(config("smollm2"), replace(small, memory_gib=1)).require_fit()


def test_a_full_object_store_is_no_reason_to_refuse() -> None:
    node = Node("here", cpus=2, memory=64 * GIB, object_store=1.0)
    found = plan(config("smollm2"), Cluster((node,), "test"))
    assert any("writes objects to disk" in line for line in found.warnings)
    found.require_fit()


def test_memory_in_use_by_others_is_said_and_not_refused() -> None:
    node = Node("here", cpus=2, memory=64 * GIB, object_store=20 * GIB, free=GIB)
    found = plan(config("smollm2"), Cluster((node,), "test"))
    assert [line for line in found.warnings if "1.0 GiB are free now" in line]
    found.require_fit()


def test_gpus_of_unknown_memory_are_not_checked() -> None:
    node = Node("here", cpus=64, memory=512 * GIB, object_store=100 * GIB, gpus=8)
    found = plan(config("qwen3_1p7b", "learner.num_ranks=1"), Cluster((node,), "test"))
    assert "learner" not in verdicts(found)
    found.require_fit()


def test_too_few_gpus_or_none_on_one_node_are_refused() -> None:
    with pytest.raises(ResourceError, match="asks for 8 GPUs .*there are 4"):
        plan(config("qwen3_1p7b"), replace(A800, gpus_per_node=4))
    cfg = config("qwen3_1p7b", "rollout.num_engines=1", "rollout.num_gpus=2", "rollout.tensor_parallel=2")
    with pytest.raises(ResourceError, match="worker of rollout asks for .*2 GPUs, no node has them"):
        plan(cfg, replace(A800, nodes=8, gpus_per_node=1))


def test_workers_lie_together_or_apart_as_the_config_says() -> None:
    two = replace(A800, nodes=2, gpus_per_node=4)
    found = plan(config("qwen3_1p7b"), two)
    assert [seat.workers for seat in found.seats] == [{"learner": 2, "rollout": 2}, {"rollout": 2, "teacher": 2}]
    packed = plan(config("qwen3_1p7b", "placement.rollout=pack"), replace(two, gpus_per_node=8))
    assert packed.seats[0].workers == {"learner": 2, "rollout": 4, "teacher": 1}
    # Weights go to each node with an engine once.
    for one, nodes in ((found, 2), (packed, 1)):
        weights = next(stage for stage in one.stages if stage.name == "learner -> engines")
        assert weights.full == nodes * one.needs.weight_bytes


@pytest.mark.parametrize(
    ("change", "words"),
    [({"memory_gib": 0.0}, r"hardware\.memory_gib=0"), ({"gpu_gib": 0.0}, r"hardware\.gpu_gib=0")],
)
def test_hardware_must_be_described_whole(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        described(replace(A800, **change))


def test_lay_out_never_loses_a_worker() -> None:
    found = plan(config("tiny"), LAPTOP)
    crowded = replace(found.cluster, nodes=(replace(found.cluster.nodes[0], cpus=0.1),) * 3)
    strategies = {need.role: PlacementStrategy.pack for need in found.needs.workers}
    seats = lay_out(found.needs.workers, crowded, strategies)
    assert sum(sum(seat.workers.values()) for seat in seats) == sum(need.count for need in found.needs.workers)

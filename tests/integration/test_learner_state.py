"""A learner that continues from a saved state trains as if it had never stopped, and refuses what is not its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opd_ray.config.choices import Dtype, Offload
from opd_ray.config.schema import RunConfig
from opd_ray.errors import CheckpointError
from opd_ray.learner.step_report import RankReport
from opd_ray.trajectory.codec import decode
from opd_ray.trajectory.rows import scored_rows
from opd_ray.types import SampleInfo
from tests.integration.batches import scored_payload
from tests.integration.conftest import save_random_model
from tests.integration.runs import small_config
from tests.integration.variants import States, VariantGroup, VariantResult, VariantStep

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

LENGTHS = [40, 9, 33, 64, 1, 50, 17]
SAVED_AFTER = 3
# Exact to the last bit, not so in each step's times.
COMPARED = ("loss_sum", "ungated_loss_sum", "weight_sum", "num_tokens", "divisor", "grad_norm", "lr", "tau", "kl_sum")


def config_of(
    experiment: str, stage: int = 1, dtype: Dtype = Dtype.float32, offload: Offload = Offload.none
) -> RunConfig:
    overrides = ("learner.lr=1e-3", "learner.lr_schedule=cosine", "num_steps=8", "gate.block_size=16")
    cfg = small_config(experiment, *overrides, "learner.weight_decay=0.1", "learner.grad_clip=0.05")
    return replace(cfg, learner=replace(cfg.learner, zero_stage=stage, dtype=dtype, offload=offload))


def five_steps() -> list[VariantStep]:
    """Two uses of a batch, the first of another one, which comes fresh, its second, and a third batch.

    Saved after the third step, the state holds the learner's own log-probs that the fourth is gated with.
    """
    steps = []
    for version, (seed, uses, staleness) in enumerate([(3, 1, 0), (3, 2, 1), (4, 1, 0), (4, 2, 1), (5, 1, 1)]):
        payload = scored_payload(LENGTHS, seed=seed)
        infos = tuple(
            SampleInfo(row.trajectory_id, staleness, uses, 0.0, len(row.prompt_token_ids), len(row.response_token_ids))
            for row in scored_rows(decode(payload))
        )
        steps.append(VariantStep(payload, tuple(range(len(LENGTHS))), infos, version))
    return steps


def folders(root: Path, *names: str) -> list[Path]:
    found = [root / name for name in names]
    for folder in found:
        folder.mkdir(parents=True)
    return found


def unbroken(group: VariantGroup, cfg: RunConfig, model: Path, middle: Path, end: Path) -> VariantResult:
    return group.run(cfg, str(model), five_steps(), 100, States(save={SAVED_AFTER: middle, 5: end}))


def resumed(group: VariantGroup, cfg: RunConfig, model: Path, middle: Path, end: Path | None = None) -> VariantResult:
    save = {} if end is None else {5 - SAVED_AFTER: end}
    return group.run(cfg, str(model), five_steps()[SAVED_AFTER:], 100, States(middle, save))


def numbers(reports: list[RankReport]) -> list[list[float]]:
    return [[getattr(report, name) for name in COMPARED] for report in reports]


# Each number of ranks, stage, dtype and experiment once; the other combinations are slow.
CASES = [
    ("lsm_block64", 1, 1, Dtype.float32),
    ("opd_block64", 1, 2, Dtype.bfloat16),
    ("lsm_block64_tau_quantile", 3, 2, Dtype.float32),
    ("lsm_block64_engine_calibrated", 2, 2, Dtype.bfloat16),
]
SLOW_CASES = [
    ("lsm_block64", 1, 2, Dtype.float32),
    ("lsm_block64", 2, 1, Dtype.float32),
    ("lsm_block64", 2, 2, Dtype.float32),
    ("lsm_block64", 3, 1, Dtype.float32),
    ("lsm_block64", 3, 2, Dtype.float32),
    ("opd_block64", 1, 1, Dtype.bfloat16),
    ("opd_block64", 2, 1, Dtype.bfloat16),
    ("opd_block64", 2, 2, Dtype.bfloat16),
    ("opd_block64", 3, 1, Dtype.bfloat16),
    ("opd_block64", 3, 2, Dtype.bfloat16),
]
OFFLOADED = [
    ("lsm_block64", 2, 2, Dtype.float32, Offload.optimizer),
    ("lsm_block64", 3, 2, Dtype.float32, Offload.optimizer),
    ("opd_block64", 3, 2, Dtype.bfloat16, Offload.parameters),
]


@pytest.mark.parametrize(
    ("experiment", "stage", "num_ranks", "dtype", "offload"),
    [
        *((*case, Offload.none) for case in CASES),
        *(pytest.param(*case, Offload.none, marks=pytest.mark.slow) for case in SLOW_CASES),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in OFFLOADED[:-1]),
        OFFLOADED[-1],
    ],
)
def test_a_resumed_learner_equals_the_unbroken_one_to_the_last_bit(
    one_rank: VariantGroup,
    two_ranks: VariantGroup,
    student_folder: Path,
    tmp_path: Path,
    experiment: str,
    stage: int,
    num_ranks: int,
    dtype: Dtype,
    offload: Offload,
) -> None:
    group = one_rank if num_ranks == 1 else two_ranks
    cfg = config_of(experiment, stage, dtype, offload)
    middle, end, again = folders(tmp_path, "middle", "end", "again")
    whole = unbroken(group, cfg, student_folder, middle, end)
    rest = resumed(group, cfg, student_folder, middle, again)
    for found, expected in zip(rest.reports, whole.reports[SAVED_AFTER:], strict=True):
        assert numbers(found) == numbers(expected)
    assert whole.reports[3][0].weight_sum != whole.reports[3][0].num_tokens, "the gate must bite in the fourth step"
    for name, weight in whole.weights.items():
        assert torch.equal(rest.weights[name], weight), name
    # Masters, moments, counters and random states, by their checksums.
    assert json.loads((again / "learner.json").read_text()) == json.loads((end / "learner.json").read_text())


def test_a_state_of_before_the_first_step_can_be_loaded(
    two_ranks: VariantGroup, student_folder: Path, tmp_path: Path
) -> None:
    """AdamW has no moments yet."""
    cfg = config_of("lsm_block64", 1)
    begin, end, again = folders(tmp_path, "begin", "end", "again")
    two_ranks.run(cfg, str(student_folder), five_steps()[:2], 100, States(save={0: begin, 2: end}))
    two_ranks.run(cfg, str(student_folder), five_steps()[:2], 100, States(begin, {2: again}))
    assert json.loads((again / "learner.json").read_text()) == json.loads((end / "learner.json").read_text())


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"), [((1, 1), (2, 3)), ((2, 3), (1, 2)), ((2, 2), (2, 3))], ids=["more", "fewer", "stage"]
)
def test_another_number_of_ranks_or_stage_goes_on_within_rounding(
    one_rank: VariantGroup,
    two_ranks: VariantGroup,
    student_folder: Path,
    tmp_path: Path,
    saved_by: tuple[int, int],
    loaded_by: tuple[int, int],
) -> None:
    groups = {1: one_rank, 2: two_ranks}
    cfg, other = (config_of("lsm_block64", stage) for _, stage in (saved_by, loaded_by))
    middle, end = folders(tmp_path, "middle", "end")
    whole = unbroken(groups[saved_by[0]], cfg, student_folder, middle, end)
    rest = resumed(groups[loaded_by[0]], other, student_folder, middle)
    for found, expected in zip(rest.reports, whole.reports[SAVED_AFTER:], strict=True):
        for name in ("loss_sum", "weight_sum", "num_tokens"):
            totals = [sum(getattr(report, name) for report in reports) for reports in (found, expected)]
            assert totals[0] == pytest.approx(totals[1], rel=1e-5), name
        assert found[0].grad_norm == pytest.approx(expected[0].grad_norm, rel=1e-4)
        assert found[0].lr == expected[0].lr
        # The engine's log-probs stand in for those that a rank has forgotten.
        assert sum(r.engine_behavior_tokens for r in found) == sum(r.engine_behavior_tokens for r in expected)
    for name, weight in whole.weights.items():
        assert float((rest.weights[name] - weight).abs().mean()) < 1e-3 * cfg.learner.lr, name


def damaged(folder: Path, name: str, kind: str) -> Path:
    """A copy of the state with its file `name` taken away, cut short, or one byte changed."""
    copy = folder.with_name(f"{kind}-{name}")
    shutil.copytree(folder, copy)
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if kind != "without":
        path.write_bytes(data if kind == "changed" else data[: len(data) // 2])
    return copy


def test_what_cannot_be_resumed_is_refused_by_all_ranks_before_anything_has_changed(
    two_ranks: VariantGroup, student_folder: Path, tmp_path: Path
) -> None:
    cfg = config_of("lsm_block64", 3)
    good, foreign, end, again = folders(tmp_path, "good", "foreign", "end", "again")
    unbroken(two_ranks, cfg, student_folder, good, end)
    other_model = save_random_model(tmp_path / "model", seed=5, vocab_size=600)
    two_ranks.run(cfg, str(other_model), [], 100, States(save={0: foreign}))
    files = ("learner.json", "optimizer-00001.safetensors", "rank-00000.safetensors")
    bad = [damaged(good, name, kind) for name in files for kind in ("without", "cut", "changed")]
    states = States(save={SAVED_AFTER: again}, refused=(*bad, foreign, tmp_path / "nowhere"))
    found = two_ranks.run(cfg, str(student_folder), five_steps()[:SAVED_AFTER], 100, states)
    first, second = found.refusals
    assert first == second
    for folder, message in zip(bad, first[: len(bad)], strict=True):
        assert folder.name in message and message.endswith(("use an older checkpoint", "name a checkpoint folder"))
    assert "'model.embed_tokens.weight' has shape [600, 64] there" in first[-2]
    assert first[-1].endswith("name a checkpoint folder")
    # Trained after all that, as if nothing had been tried.
    assert json.loads((again / "learner.json").read_text()) == json.loads((good / "learner.json").read_text())


def test_a_state_that_cannot_be_written_is_an_error_on_every_rank(
    two_ranks: VariantGroup, student_folder: Path, tmp_path: Path
) -> None:
    states = States(save={0: tmp_path / "missing"})
    with pytest.raises(CheckpointError, match="make room"):
        two_ranks.run(config_of("lsm"), str(student_folder), [], 100, states)

"""The learner's step equals a plain one-process step with full logits, and does not depend on how it is spread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_ray.config.choices import GateKind, Offload
from opd_ray.config.schema import RunConfig
from opd_ray.errors import DivergedError, ModelError, SchemaError
from opd_ray.learner.columns import learner_columns
from opd_ray.learner.step_report import RankReport, step_metrics
from opd_ray.main import conf_dir
from opd_ray.models.tokenization import load_tokenizer, newline_token_mask
from opd_ray.trajectory.codec import decode
from opd_ray.trajectory.rows import scored_rows
from opd_ray.types import SampleInfo
from tests.integration.batches import reference_step, scored_payload, stale_infos, with_only
from tests.integration.runs import small_config
from tests.integration.variants import VariantGroup, VariantResult, VariantStep

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

# One for each part of the step that has code of its own; the other experiments combine these parts.
QUICK = {
    "lsm_block64",
    "lsm_block64_capped",
    "lsm_block64_sampled_drift",
    "lsm_block64_shuffle",
    "lsm_block64_tau_quantile",
    "lsm_high_entropy",
    "lsm_with_sampled",
    "opd_recompute_icepop",
}
EXPERIMENTS = [
    pytest.param(path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
    for path in sorted((conf_dir() / "experiment").glob("*.yaml"))
]
LENGTHS = [40, 9, 33, 64, 1, 50, 17]
OVERRIDES = (
    "learner.lr=1e-3",
    "learner.weight_decay=0.1",
    "learner.grad_clip=0.05",
    "gate.block_size=16",
    "gate.min_span=4",
    "gate.max_span=32",
)
# The made-up behaviour is far off: these bounds keep some of it.
BOUNDS = {
    "opd_geometric_mask": ("gate.low=0.22", "gate.high=3"),
    "lsm_geometric_mask": ("gate.low=0.22", "gate.high=3"),
    "opd_hard_drop": ("gate.drop_above=1.5",),
    "lsm_hard_drop": ("gate.drop_above=1.5",),
    "lsm_block64_sampled_drift": ("gate.drift_tokens=4",),
}


def config_of(experiment: str, *overrides: str) -> RunConfig:
    return small_config(experiment, *OVERRIDES, *BOUNDS.get(experiment, ()), *overrides)


def with_zero(cfg: RunConfig, stage: int) -> RunConfig:
    return replace(cfg, learner=replace(cfg.learner, zero_stage=stage))


def test_what_is_kept_in_host_memory_changes_no_number(two_ranks: VariantGroup, student_folder: Path) -> None:
    """Optimizer state offloaded under ZeRO 2, and the parameters too under ZeRO 3, with activations recomputed."""
    cfg = config_of("lsm_block64")
    whole = two_ranks.run(with_zero(cfg, 2), str(student_folder), two_batches(), budget=150)
    for stage, offload in ((2, Offload.optimizer), (3, Offload.optimizer), (3, Offload.parameters)):
        learner = replace(cfg.learner, zero_stage=stage, offload=offload, gradient_checkpointing=True)
        offloaded = two_ranks.run(replace(cfg, learner=learner), str(student_folder), two_batches(), budget=150)
        assert_same(offloaded, whole, cfg)


def two_batches(order: tuple[int, ...] = tuple(range(len(LENGTHS)))) -> list[VariantStep]:
    """A fresh batch and its second use, then a batch that comes one step old and its second use."""
    steps = []
    for version, (seed, uses, staleness) in enumerate([(3, 1, 0), (3, 2, 1), (4, 1, 1), (4, 2, 2)]):
        payload = scored_payload(LENGTHS, seed=seed)
        infos = tuple(
            SampleInfo(row.trajectory_id, staleness, uses, 0.0, len(row.prompt_token_ids), len(row.response_token_ids))
            for row in scored_rows(decode(payload))
        )
        steps.append(VariantStep(payload, order, infos, version))
    return steps


def columns_of(cfg: RunConfig) -> tuple[str, ...]:
    return learner_columns(cfg.objective, cfg.gate, probes=cfg.telemetry.probe_positions > 0)


def losses(result: VariantResult, cfg: RunConfig) -> list[float]:
    is_gated = cfg.gate.kind is not GateKind.off
    metrics = [step_metrics(reports, is_gated=is_gated, min_support_mass=0.0) for reports in result.reports]
    return [float(step["learner/loss/mean"]) for step in metrics]  # type: ignore[arg-type]


def assert_same(found: VariantResult, expected: VariantResult, cfg: RunConfig) -> None:
    assert losses(found, cfg) == pytest.approx(losses(expected, cfg), rel=1e-4, abs=1e-6)
    for name, weight in expected.weights.items():
        # AdamW's first step is lr * sign(gradient): where it is nearly zero, rounding decides.
        difference = (found.weights[name] - weight).abs()
        assert float(difference.mean()) < 1e-3 * cfg.learner.lr, name


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_step_depends_neither_on_how_it_is_spread_nor_on_columns_that_it_has_no_use_for(
    one_rank: VariantGroup, two_ranks: VariantGroup, student_folder: Path, experiment: str
) -> None:
    """One rank and one microbatch, against two ranks with ZeRO 3 and several microbatches each of ruined payloads."""
    cfg = config_of(experiment)
    whole = one_rank.run(cfg, str(student_folder), two_batches(), budget=10_000)
    ruined = [replace(step, payload=with_only(step.payload, columns_of(cfg))) for step in two_batches()]
    spread = two_ranks.run(with_zero(cfg, 3), str(student_folder), ruined, budget=100)
    assert_same(spread, whole, cfg)


@pytest.mark.parametrize("experiment", ["opd", "lsm", "lsm_block64_tau_staleness"])
def test_every_column_that_a_step_reads_is_one_that_it_needs(
    one_rank: VariantGroup, student_folder: Path, experiment: str
) -> None:
    """Were one of the table's columns not used, its ruin would not show."""
    cfg = config_of(experiment)
    payload = scored_payload(LENGTHS, seed=3)
    columns = columns_of(cfg)
    for missing in columns:
        ruined = with_only(payload, tuple(name for name in columns if name != missing))
        step = VariantStep(ruined, tuple(range(len(LENGTHS))), stale_infos(payload), 0)
        try:
            report = one_rank.run(cfg, str(student_folder), [step], budget=10_000).reports[0][0]
        except SchemaError as error:
            assert missing in str(error) or missing == "version_values"
        else:
            assert report.removed["not_finite"] == sum(LENGTHS), missing


@pytest.mark.parametrize(
    "experiment", ["opd_block64", "lsm_block64", "lsm_newline", "lsm_block64_capped", "opd_recompute_tis"]
)
def test_a_step_does_not_depend_on_the_order_of_its_trajectories(
    one_rank: VariantGroup, two_ranks: VariantGroup, student_folder: Path, experiment: str
) -> None:
    cfg = config_of(experiment)
    whole = one_rank.run(cfg, str(student_folder), two_batches(), budget=10_000)
    turned = two_ranks.run(cfg, str(student_folder), two_batches((6, 2, 5, 0, 3, 1, 4)), budget=150)
    assert_same(turned, whole, cfg)


WRITTEN_OUT = [
    "lsm",
    "lsm_block64",
    "lsm_newline",
    "lsm_token_gate",
    "lsm_sequence_gate",
    "lsm_tis",
    "lsm_icepop",
    "lsm_geometric_mask",
    "lsm_hard_drop",
    "opd_block64",
    "opd_recompute",
    "opd_recompute_tis",
    "opd_recompute_icepop",
    "forward_kl",
    "forward_kl_renormalized",
    "tail_kl_forward",
    "tail_kl_reverse",
    "jsd",
]


@pytest.mark.parametrize("experiment", WRITTEN_OUT)
def test_a_step_equals_the_references(two_ranks: VariantGroup, student_folder: Path, experiment: str) -> None:
    """Losses, gradient norms and weights, within 1e-5; for `lsm` and `lsm_block64` all of it is the reference's own."""
    cfg = with_zero(config_of(experiment, "learner.lr=5e-4"), 1 + len(experiment) % 3)
    payload = scored_payload(LENGTHS, seed=3)
    infos = stale_infos(payload)
    step = VariantStep(payload, tuple(range(len(LENGTHS))), infos, 5)
    result = two_ranks.run(cfg, str(student_folder), [step], budget=100)
    model = AutoModelForCausalLM.from_pretrained(student_folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    newlines = torch.from_numpy(newline_token_mask(load_tokenizer(str(student_folder)), model.config.vocab_size))
    loss, norm = reference_step(model, scored_rows(decode(payload)), cfg, newlines)
    assert losses(result, cfg)[0] == pytest.approx(loss, rel=1e-5)
    assert result.reports[0][0].grad_norm == pytest.approx(norm, rel=1e-4)
    assert norm > cfg.learner.grad_clip, "the case must exercise clipping"
    assert set(result.weights) == set(before) | {"lm_head.weight"}, "a tied head must be published by its own name too"
    moved = 0.0
    for name, parameter in model.named_parameters():
        difference = (result.weights[name] - parameter.detach()).abs()
        # AdamW's first step is lr * sign(gradient): only gradients of nearly zero may land elsewhere.
        assert float(difference.max()) < 1e-5, name
        assert float(difference.mean()) < 1e-4 * cfg.learner.lr, name
        moved = max(moved, float((parameter.detach() - before[name]).abs().max()))
    assert moved > 1e-4, "the step must have moved the weights"


@pytest.mark.parametrize("stage", [0, 3])
def test_samples_of_a_prompt_train_as_if_each_were_computed_alone(
    one_rank: VariantGroup, two_ranks: VariantGroup, student_folder: Path, stage: int
) -> None:
    """One rank with everything in a microbatch; two ranks with ZeRO 3 and several, of which one has a placeholder."""
    cfg = config_of("lsm_block64")
    payload = scored_payload(LENGTHS, seed=3, samples_per_prompt=3)
    infos = tuple(replace(info, prompt_id=f"p{info.trajectory_id // 3}") for info in stale_infos(payload))
    step = VariantStep(payload, (4, 2, 5, 0, 3, 1, 6), infos, 5)
    if stage:
        result = two_ranks.run(with_zero(cfg, stage), str(student_folder), [step], budget=100)
    else:
        result = one_rank.run(cfg, str(student_folder), [step], budget=10_000)
        (report,) = result.reports[0]
        # Prompts of 5, 5 and 6 tokens, and each response but its last token; now and then two begin alike.
        assert report.model_tokens - report.computed_tokens >= 2 * 5 + 2 * 5
    model = AutoModelForCausalLM.from_pretrained(student_folder)
    loss, norm = reference_step(model, scored_rows(decode(payload)), cfg, None)
    assert losses(result, cfg)[0] == pytest.approx(loss, rel=1e-5)
    assert result.reports[0][0].grad_norm == pytest.approx(norm, rel=1e-4)
    for name, parameter in model.named_parameters():
        difference = (result.weights[name] - parameter.detach()).abs()
        assert float(difference.mean()) < 1e-4 * cfg.learner.lr, name


def only_step(group: VariantGroup, cfg: RunConfig, folder: Path, lengths: list[int], version: int = 0) -> RankReport:
    """The first rank's report of one step on stale trajectories."""
    payload = scored_payload(lengths, seed=3)
    step = VariantStep(payload, tuple(range(len(lengths))), stale_infos(payload), version)
    return group.run(cfg, str(folder), [step], budget=100).reports[0][0]


def test_skipping_the_full_vocabulary_at_staleness_zero_changes_nothing(
    one_rank: VariantGroup, student_folder: Path
) -> None:
    """With reuse 1 a fresh batch needs no log-probs; to remember them for a second use, it does."""
    fresh = two_batches()[:1]
    cfg = config_of("lsm_block64", "replay.reuse=1")
    skipped = one_rank.run(cfg, str(student_folder), fresh, budget=10_000)
    computed = one_rank.run(config_of("lsm_block64"), str(student_folder), fresh, budget=10_000)
    assert skipped.reports[0][0].mismatch_tokens == 0
    assert computed.reports[0][0].mismatch_tokens == sum(LENGTHS)
    assert losses(skipped, cfg) == losses(computed, cfg)
    for name, weight in computed.weights.items():
        assert torch.equal(skipped.weights[name], weight), name


@pytest.mark.parametrize("gated", ["gate.tau=0", "fresh"])
def test_a_gate_that_cannot_bite_is_the_ungated_step_to_the_last_bit(
    one_rank: VariantGroup, student_folder: Path, gated: str
) -> None:
    steps = two_batches()[:1] if gated == "fresh" else two_batches()
    cfg = config_of("lsm_block64", *([] if gated == "fresh" else [gated]))
    with_gate = one_rank.run(cfg, str(student_folder), steps, budget=10_000)
    without = one_rank.run(config_of("lsm"), str(student_folder), steps, budget=10_000)
    assert losses(with_gate, cfg) == losses(without, config_of("lsm"))
    for name, weight in without.weights.items():
        assert torch.equal(with_gate.weights[name], weight), name


def test_a_rank_without_a_valid_token_takes_part(two_ranks: VariantGroup, student_folder: Path) -> None:
    """The longest trajectory has a rank to itself, and a teacher that is NaN all along."""
    lengths = [90, 40, 40]
    payload = scored_payload(lengths, seed=3, without_teacher=(0,))
    step = VariantStep(payload, (0, 1, 2), stale_infos(payload), 0)
    cfg = config_of("lsm_block64")
    first, second = two_ranks.run(cfg, str(student_folder), [step], budget=100).reports[0]
    assert (first.num_tokens, second.num_tokens) == (0, 80)
    assert first.removed == {"not_finite": 90}
    assert first.divisor == second.divisor == pytest.approx(second.weight_sum)
    assert np.isfinite(first.grad_norm) and first.grad_norm > 0


def test_masked_tokens_are_counted_by_rule(one_rank: VariantGroup, student_folder: Path) -> None:
    cfg = config_of("lsm", "objective.mask_rules=[special_tokens,end_of_sequence]")
    report = only_step(one_rank, cfg, student_folder, LENGTHS)
    rows = scored_rows(decode(scored_payload(LENGTHS, seed=3)))
    special = set(load_tokenizer(str(student_folder)).all_special_ids)
    expected = sum(int(token_id) in special for row in rows for token_id in row.response_token_ids)
    assert expected > 0
    # A token that two rules name is counted by the first.
    assert report.removed == {"not_finite": 0, "special_tokens": expected, "end_of_sequence": 0}
    assert report.num_tokens == sum(LENGTHS) - expected


def test_entropy_selection_really_selects(one_rank: VariantGroup, student_folder: Path) -> None:
    report = only_step(one_rank, config_of("lsm_high_entropy"), student_folder, LENGTHS)
    kept = sum(-(-length // 5) for length in LENGTHS)
    assert report.num_tokens == kept
    assert report.removed["low_entropy"] == sum(LENGTHS) - kept


def test_controls_differ_from_step_to_step_and_not_from_run_to_run(
    one_rank: VariantGroup, student_folder: Path
) -> None:
    cfg = config_of("lsm_block64_shuffle")
    found = [only_step(one_rank, cfg, student_folder, LENGTHS, version).loss_sum for version in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_sampled_drift_reports_its_error(one_rank: VariantGroup, student_folder: Path) -> None:
    report = only_step(one_rank, config_of("lsm_block64_sampled_drift"), student_folder, LENGTHS)
    metrics = step_metrics([report], is_gated=True, min_support_mass=0.0)
    assert 0 < float(metrics["gate/drift_sampling_error/rms"]) < 10  # type: ignore[arg-type]


def test_a_kernel_for_gpus_is_refused_on_a_cpu(one_rank: VariantGroup, student_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"learner\.head_kernel=torch"):
        only_step(one_rank, config_of("lsm", "learner.head_kernel=triton"), student_folder, LENGTHS)


def test_gates_that_all_underflow_end_the_run(one_rank: VariantGroup, student_folder: Path) -> None:
    with pytest.raises(DivergedError, match=r"gate\.tau"):
        only_step(one_rank, config_of("lsm_block64", "gate.tau=1e6"), student_folder, LENGTHS)

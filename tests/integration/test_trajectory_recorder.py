"""What real learner ranks dump of their steps: the right numbers, and the very same run with and without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_ray.models.loading import pad_rows
from opd_ray.models.tokenization import load_tokenizer
from opd_ray.run.trajectory_records import RECORDS_FOLDER, RecordedUse, read_uses, record_entries
from opd_ray.trajectory.codec import decode
from opd_ray.trajectory.rows import scored_rows
from tests.integration.test_learner import LENGTHS, config_of, losses, two_batches, with_zero
from tests.integration.variants import VariantGroup

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

# One each for: gate and LSM, gradient through log-probs, drift on some tokens only, positions that leave by entropy;
# the slow ones: spans, no gate and no log-probs, weights planned from the whole step, a support that is one id wider.
EXPERIMENTS = ["lsm_block64", "opd_block64", "lsm_block64_sampled_drift", "lsm_high_entropy"]
SLOW_EXPERIMENTS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("lsm_newline", "lsm", "lsm_block64_shuffle", "lsm_with_sampled")
]


def dumped(run: Path) -> list[list[RecordedUse]]:
    """The uses of each step."""
    uses = read_uses(record_entries(run))
    return [[use for use in uses if use.step == step] for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, *SLOW_EXPERIMENTS])
def test_a_dump_changes_no_bit_of_a_run_and_adds_up_to_its_losses(
    two_ranks: VariantGroup, student_folder: Path, tmp_path: Path, experiment: str
) -> None:
    cfg = with_zero(config_of(experiment, f"telemetry.record_trajectories={len(LENGTHS)}"), 3)
    without = two_ranks.run(cfg, str(student_folder), two_batches(), budget=100)
    found = two_ranks.run(cfg, str(student_folder), two_batches(), budget=100, dump=tmp_path / RECORDS_FOLDER)
    assert losses(found, cfg) == losses(without, cfg)
    for name, weight in without.weights.items():
        assert torch.equal(found.weights[name], weight), name
    for uses, loss in zip(dumped(tmp_path), losses(found, cfg), strict=True):
        assert [use.trajectory_id for use in uses] == list(range(len(LENGTHS)))
        mask = np.concatenate([use.mask for use in uses])
        weights, of_tokens = (
            np.concatenate([getattr(use, name) for use in uses])[mask] for name in ("token_weights", "losses")
        )
        assert weights.mean() == pytest.approx(1, rel=1e-5)
        assert (weights * of_tokens).mean() == pytest.approx(loss, rel=1e-4, abs=1e-6)
        for use in uses:
            _assert_consistent(use, experiment)


def _assert_consistent(use: RecordedUse, experiment: str) -> None:
    """The numbers of a use agree with each other."""
    if experiment.startswith("lsm") and experiment != "lsm_with_sampled":
        np.testing.assert_allclose(use.kl, use.losses, rtol=1e-4, atol=1e-5)
    sampled_at = use.student_topk_ids == use.response_token_ids[:, None]
    has = sampled_at.any(1)
    np.testing.assert_allclose(use.student_topk_logprobs[sampled_at], use.current_logprobs[has], rtol=1e-5, atol=1e-5)
    is_gated = experiment != "lsm" and not experiment.endswith(("entropy", "sampled"))
    assert use.is_measured == (is_gated and not use.is_fresh)
    if not use.is_measured:
        assert not use.drift.any() or not is_gated
        return
    counts = use.mask & np.isfinite(use.drift)
    sums = np.bincount(use.segment_ids[counts], use.drift[counts], minlength=len(use.segment_drift))
    means = sums / np.bincount(use.segment_ids[counts], minlength=len(use.segment_drift)).clip(1)
    np.testing.assert_allclose(use.segment_drift, means, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(use.segment_gate, np.exp(-np.abs(means)), rtol=1e-3)
    is_sampled = experiment == "lsm_block64_sampled_drift" and len(use.drift) > 4  # tokens measured in a segment
    assert np.isnan(use.drift).any() == is_sampled


def test_a_dump_tells_what_a_plain_forward_pass_finds(
    one_rank: VariantGroup, student_folder: Path, tmp_path: Path
) -> None:
    """The first step's log-probs are those of the untrained student; of seven trajectories, three are recorded."""
    cfg = config_of("opd_block64", "telemetry.record_trajectories=3")
    one_rank.run(cfg, str(student_folder), two_batches()[:1], budget=200, dump=tmp_path / RECORDS_FOLDER)
    uses = read_uses(record_entries(tmp_path))
    assert [use.trajectory_id for use in uses] == [0, 2, 4]
    rows = scored_rows(decode(two_batches()[0].payload))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student_folder), load_tokenizer(str(student_folder))
    for use in uses:
        row = rows[use.trajectory_id]
        block = pad_rows([row.prompt_token_ids], [row.response_token_ids], 0, torch.device("cpu"))
        with torch.no_grad():
            logprobs = model(block.input_ids).logits[0][block.positions].log_softmax(-1).numpy()
        sampled = np.take_along_axis(logprobs, row.response_token_ids[:, None].astype(np.int64), 1)[:, 0]
        at_support = np.take_along_axis(logprobs, row.teacher_topk_ids.astype(np.int64), 1)
        np.testing.assert_allclose(use.current_logprobs, sampled, atol=1e-4)
        np.testing.assert_allclose(use.student_at_support_logprobs, at_support, atol=1e-4)
        np.testing.assert_allclose(use.student_topk_logprobs, -np.sort(-logprobs, axis=1)[:, :4], atol=1e-4)
        np.testing.assert_allclose(use.entropy, -(np.exp(logprobs) * logprobs).sum(1), atol=1e-4)
        np.testing.assert_array_equal(use.teacher_topk_ids, row.teacher_topk_ids)
        np.testing.assert_array_equal(use.engine_logprobs, row.behavior_logprobs)
        assert use.is_fresh and not use.drift.any()
        assert "".join(use.response_pieces) == tokenizer.decode(row.response_token_ids)
        assert use.prompt_text == tokenizer.decode(row.prompt_token_ids)
